"""Synthetic clips with exact masks, made when they are read."""

from .clip import SPLITS, SyntheticClip, open_synthetic, synthetic_clip

__all__ = ["SPLITS", "SyntheticClip", "open_synthetic", "synthetic_clip"]
