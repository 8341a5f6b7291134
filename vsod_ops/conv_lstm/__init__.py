"""Convolutional LSTM: the whole sequence, or one step of it.

function   public functions: argument checks, autocast
op         torch op: schema, fake kernel, autograd, choice of backend
reference  the definition, in plain PyTorch (csrc/conv_lstm/ holds the CPU kernel)
module     ConvLSTM, stacked layers, and converters for weights from elsewhere
"""

from .function import conv_lstm, conv_lstm_cell
from .module import ConvLSTM

__all__ = ["ConvLSTM", "conv_lstm", "conv_lstm_cell"]
