"""Coarse labels of MSST-ConvLSTM: masks for frames that nobody drew any for."""
