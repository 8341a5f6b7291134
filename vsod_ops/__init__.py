"""Fused torch operators for video salient object detection.

shunted_attention, ShuntedAttention   attention whose head groups see keys at different rates
conv_lstm, conv_lstm_cell, ConvLSTM   convolutional LSTM over a sequence of feature maps
dense_crf                             fully connected CRF over the pixels of an image

Each runs on several backends, "cpu" and "cuda" (compiled), "triton" and "reference" (plain
PyTorch); ``python -m vsod_ops.doctor`` says which are here and which one an op takes.
"""

from .conv_lstm import ConvLSTM, conv_lstm, conv_lstm_cell
from .dense_crf import dense_crf
from .shunted_attention import ShuntedAttention, shunted_attention

__all__ = [
    "ConvLSTM",
    "ShuntedAttention",
    "conv_lstm",
    "conv_lstm_cell",
    "dense_crf",
    "shunted_attention",
]
__version__ = "0.1.0"
