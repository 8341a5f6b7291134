"""Convolutional LSTM: the whole sequence, or one step of it.

function   public functions: argument checks, autocast
op         torch op: schema, fake kernel, autograd, choice of backend
reference  the definition, in plain PyTorch
triton/    GPU kernels for any number of channels, backend "triton"
module     ConvLSTM, stacked layers, and converters for weights from elsewhere

Backends "cpu" and "cuda" (few channels) are in csrc/conv_lstm/, "reference" in reference.py.
"""

from .function import conv_lstm, conv_lstm_cell
from .module import ConvLSTM

__all__ = ["ConvLSTM", "conv_lstm", "conv_lstm_cell"]
