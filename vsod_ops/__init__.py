"""Fused torch operators for video salient object detection."""

from .shunted_attention import ShuntedAttention, shunted_attention

__all__ = ["ShuntedAttention", "shunted_attention"]
__version__ = "0.1.0"
