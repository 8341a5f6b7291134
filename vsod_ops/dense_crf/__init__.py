"""Fully connected CRF over the pixels of an image: the post-processing of saliency maps.

function   public function: argument checks, presets
op         torch op: schema, fake kernel, autograd, checks of values, choice of backend
reference  the definition, all pairs of pixels, in plain PyTorch

Backends "cpu" and "cuda" are in csrc/dense_crf/, "reference" in reference.py.
"""

from .function import PRESETS, dense_crf

__all__ = ["PRESETS", "dense_crf"]
