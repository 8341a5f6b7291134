"""ConvLSTM on GPUs, in Triton.

kernels    the kernels: what is computed, and how
plan       tiles: which there are for an architecture, and grids
launch     forward and backward of the op: how tensors are packed, scratch memory, launches

docs/conv_lstm.md has the figures.
"""
