"""The motion prior of MSST-ConvLSTM: optical flow, its regions, fitting, and a cache on disk."""
