"""Shunted attention in plain PyTorch: the definition that every kernel is tested against.

For head h of group g:  out[:, h] = softmax(scale * q[:, h] @ k_h^T) @ v_h.
Scores are materialised (N x N_g per head), so this is for truth and small sizes.
Softmax and both products run in float32 (float64 for float64 input).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads(tensor: Tensor, keys: Sequence[Tensor]) -> list[Tensor]:
    """Split the heads (dim 1) of `tensor` into the groups of `keys`."""
    return list(tensor.split([k.shape[1] for k in keys], dim=1))


def forward(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, D) in q's dtype and lse (B, H, N) in the compute dtype."""
    dtype = _compute_dtype(q.dtype)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)
    for q_g, k_g, v_g, out_g, lse_g in zip(
        _heads(q, keys), keys, values, _heads(out, keys), _heads(lse, keys), strict=True
    ):
        scores = scale * (q_g.to(dtype) @ k_g.to(dtype).mT)  # (B, H_g, N, N_g)
        lse_g.copy_(scores.logsumexp(-1))
        out_g.copy_(scores.softmax(-1) @ v_g.to(dtype))
    return out, lse


def differentiable(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """The same as `forward`, of functions that autograd and every transform know."""
    dtype = _compute_dtype(q.dtype)
    outs, lses = [], []
    for q_g, k_g, v_g in zip(_heads(q, keys), keys, values, strict=True):
        scores = scale * (q_g.to(dtype) @ k_g.to(dtype).mT)  # (B, H_g, N, N_g)
        outs.append(scores.softmax(-1) @ v_g.to(dtype))
        lses.append(scores.detach().logsumexp(-1))
    return torch.cat(outs, 1).to(q.dtype), torch.cat(lses, 1)


def backward(
    grad_out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return (dq, dkeys, dvalues), each shaped like and in the dtype of its input.

    With P = exp(scores - lse):  dV = P^T dO,  dS = P * (dO V^T - sum(dO * out)),
    dQ = scale * dS K,  dK = scale * dS^T Q.
    """
    dtype = _compute_dtype(q.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)  # (B, H, N, 1)
    dq = torch.empty_like(q)
    dkeys, dvalues = [], []
    for q_g, k_g, v_g, do_g, lse_g, delta_g, dq_g in zip(
        *(_heads(q, keys), keys, values),
        *(_heads(x, keys) for x in (grad_out, lse, delta, dq)),
        strict=True,
    ):
        q_f, k_f, v_f, do_f = (x.to(dtype) for x in (q_g, k_g, v_g, do_g))
        probs = (scale * (q_f @ k_f.mT) - lse_g.unsqueeze(-1)).exp()
        dscores = scale * probs * (do_f @ v_f.mT - delta_g)
        dq_g.copy_(dscores @ k_f)
        dkeys.append(torch.empty_like(k_g).copy_(dscores.mT @ q_f))
        dvalues.append(torch.empty_like(v_g).copy_(probs.mT @ do_f))
    return dq, dkeys, dvalues
