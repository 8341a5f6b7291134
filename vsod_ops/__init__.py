"""Fused torch operators for video salient object detection."""

from .conv_lstm import ConvLSTM, conv_lstm, conv_lstm_cell
from .shunted_attention import ShuntedAttention, shunted_attention

__all__ = ["ConvLSTM", "ShuntedAttention", "conv_lstm", "conv_lstm_cell", "shunted_attention"]
__version__ = "0.1.0"
