"""Attention whose head groups see keys at different reduction rates.

function   public function: argument checks, autocast
op         torch op: schema, fake kernel, autograd, choice of backend
reference  the definition, in plain PyTorch
triton_kernels  GPU kernels (csrc/shunted_attention/ holds the CPU kernel)
module     ShuntedAttention, the layer over video tokens
"""

from .function import shunted_attention
from .module import ShuntedAttention

__all__ = ["ShuntedAttention", "shunted_attention"]
