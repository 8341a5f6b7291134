"""Video salient object detection with `vsod_ops`: MSSA and MSST-ConvLSTM, whole."""
