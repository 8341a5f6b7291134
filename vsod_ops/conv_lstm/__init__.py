"""Convolutional LSTM: the whole sequence, or one step of it.

function   public functions: argument checks, autocast
op         torch op: schema, fake kernel, autograd, choice of backend
reference  the definition, in plain PyTorch
"""

from .function import conv_lstm, conv_lstm_cell

__all__ = ["conv_lstm", "conv_lstm_cell"]
