"""The motion prior of MSST-ConvLSTM: from flow, from regions of it, fitted, and kept on disk."""
