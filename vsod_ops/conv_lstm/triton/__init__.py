"""ConvLSTM on GPUs, in Triton.

forward    its kernels: what is computed, and how
backward   the same
tiles      what the kernels of both directions share
plan       tiles: which there are for an architecture, and grids
launch     forward and backward of the op: how tensors are packed, scratch memory, launches

docs/conv_lstm.md has the figures.
"""
