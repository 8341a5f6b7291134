"""The public function: argument checks and autocast, then the torch op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import schemas, transforms
from ..backends import check_name
from . import op, reference

MAX_HEAD_DIM = 256
PLAIN = (Tensor, torch.nn.Parameter)  # not a FakeTensor or another that holds no numbers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shunted_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention whose head groups see keys at different reduction rates.

    ``out[:, h] = softmax(scale * q[:, h] @ k_h^T) @ v_h``, where head h of group g takes its
    ``k_h``, ``v_h`` from ``keys[g]``, ``values[g]``.  Group 0 owns the first H_0 heads of q,
    group 1 the next H_1, and so on.  Softmax and both accumulations are in float32 (float64 for
    float64 input); no N x N_g matrix is ever in memory.  Any strides.  Differentiable once in q,
    keys and values; under ``vmap`` what is mapped over is a larger batch; forward-mode AD and the
    rest of ``torch.func`` run the definition, with scores in memory.
    Source: shunted self-attention (Ren et al. 2022), over space and time as in the multi-scale
    self-attention of MSSA (2023).

    Args:
        q: (B, H, N, D) float32, float16, bfloat16 or float64; D from 1 to 256.
        keys: G tensors (B, H_g, N_g, D), q's dtype and device; sum of H_g is H, each N_g >= 1.
        values: G tensors, values[g] shaped like keys[g].
        scale: factor of the scores, finite; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, N) float32, not
            differentiable.
        backend: "cpu", "triton" or "reference"; None takes the fastest that can run
            (``python -m vsod_ops.doctor`` says which).  "triton" takes CPU tensors when
            TRITON_INTERPRET=1 is set before triton is first imported.

    Returns:
        out (B, H, N, D) in q's dtype and memory order; with ``return_lse`` also lse.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        Four heads over a clip of 5 frames of 28 x 28 tokens, two of them at an eighth of the keys:

        >>> q = torch.randn(1, 4, 5 * 28 * 28, 64)
        >>> keys = [torch.randn(1, 2, 5 * 28 * 28, 64), torch.randn(1, 2, 3 * 14 * 14, 64)]
        >>> values = [torch.randn_like(k) for k in keys]
        >>> shunted_attention(q, keys, values).shape
        torch.Size([1, 4, 3920, 64])
    """
    if backend is None and _is_quick(q, keys, values, scale):
        try:
            out, lse = op.eager(q, keys, values, scale)
        except RuntimeError:
            _check(q, keys, values)  # has the words for what the compiled module does not take
            raise
        return (out, lse.float()) if return_lse else out

    keys, values = _check(q, keys, values)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
            raise TypeError(f"scale must be None or a number, got {type(scale).__name__}")
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    check_name(backend)

    dtype = transforms.autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, keys, values = q.to(dtype), [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
    tensors = (q, *keys, *values)
    mapped = transforms.only_vmap() and not transforms.has_tangent(tensors)
    if not mapped and transforms.applies("shunted_attention", tensors, backend):
        out, lse = reference.differentiable(q, keys, values, op.factor(q, scale))
    else:
        # Dynamo shows a scale that changes as a float.
        is_symbol = isinstance(scale, torch.SymFloat) or torch.compiler.is_dynamo_compiling()
        if backend is None and (scale is None or not is_symbol):
            out, lse = op.unnamed(q, keys, values, scale)
        else:
            out, lse = op.shunted_attention(q, keys, values, scale, backend)
    return (out, lse.float()) if return_lse else out


def _is_quick(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale) -> bool:
    """Whether the compiled module can take the arguments as they are, and checks them itself."""
    return (
        transforms.is_eager()  # first: torch.compile looks at no more of this
        and type(keys) in (list, tuple)
        and type(values) in (list, tuple)
        and all(type(t) in PLAIN and t.is_cpu for t in (q, *keys, *values))
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and schemas.has_cpu_kernels()
    )


def _check(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    _check_tensor("q", q)
    for name, tensors in (("keys", keys), ("values", values)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(
                f"{name} must be a list or tuple of tensors, one a head group, "
                f"got {type(tensors).__name__}"
            )
        if len(tensors) == 0:
            raise ValueError(f"{name} is empty: at least one head group is needed")
    if len(keys) != len(values):
        raise ValueError(f"keys has {len(keys)} groups but values has {len(values)}")

    batch, heads, _, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q has head_dim {head_dim}; it must be from 1 to {MAX_HEAD_DIM}")
    autocast = transforms.autocast_dtype(q.device.type) is not None and q.dtype != torch.float64
    for g, (k, v) in enumerate(zip(keys, values, strict=True)):
        for name, x in ((f"keys[{g}]", k), (f"values[{g}]", v)):
            _check_tensor(name, x)
            casts = autocast and x.dtype != torch.float64  # which autocast leaves alone
            if x.dtype != q.dtype and not casts:
                raise TypeError(f"{name} is {x.dtype} but q is {q.dtype}")
            if x.device != q.device:
                raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
            if x.shape[0] != batch:
                raise ValueError(f"{name} has batch size {x.shape[0]} but q has {batch}")
            if x.shape[3] != head_dim:
                raise ValueError(f"{name} has head_dim {x.shape[3]} but q has {head_dim}")
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"keys[{g}] has {k.shape[1]} heads but values[{g}] has {v.shape[1]}")
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"keys[{g}] has length {k.shape[2]} but values[{g}] has {v.shape[2]}")
        if k.shape[1] == 0:
            raise ValueError(f"keys[{g}] has no heads; leave an empty group out")
        if k.shape[2] == 0:
            raise ValueError(f"keys[{g}] has length 0; every group needs at least one key")
    if (total := sum(k.shape[1] for k in keys)) != heads:
        counts = " + ".join(str(k.shape[1]) for k in keys)
        raise ValueError(f"keys have {counts} = {total} heads but q has {heads}")
    return list(keys), list(values)


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (B, H, N, D), got shape {tuple(x.shape)}")
