"""Attention whose head groups see keys at different reduction rates.

function   public function: argument checks, autocast
op         torch op: schema, fake kernel, autograd, choice of backend
reference  the definition, in plain PyTorch
triton/    GPU kernels, backend "triton"
module     ShuntedAttention, the layer over video tokens

Backend "cpu" is in csrc/shunted_attention/, "reference" in reference.py.
"""

from .function import shunted_attention
from .module import ShuntedAttention

__all__ = ["ShuntedAttention", "shunted_attention"]
