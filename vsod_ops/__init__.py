"""Fused torch operators for video salient object detection."""

from .dense_crf import dense_crf
from .shunted_attention import ShuntedAttention, shunted_attention

__all__ = ["ShuntedAttention", "dense_crf", "shunted_attention"]
__version__ = "0.1.0"
