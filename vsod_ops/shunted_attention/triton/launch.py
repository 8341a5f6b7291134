"""Forward and backward of the op: scratch memory, choice of tiles, launches."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import triton_tuning as tuning
from . import plan
from .backward import (
    shunted_attention_bwd_delta_kernel,
    shunted_attention_bwd_kernel,
    shunted_attention_bwd_reduce_kernel,
)
from .forward import shunted_attention_fwd_kernel
from .tiles import Strided

TUNED_KERNELS = {"forward": shunted_attention_fwd_kernel, "backward": shunted_attention_bwd_kernel}
timings = tuning.Timings()
# Per exact shape: the tile that is launched.
_tiles: dict[tuple, plan.Tile] = {}
# Tuples of two kinds may be equal, so the kind is a part of the key.
_opaque = functools.lru_cache(maxsize=4096, typed=True)(tuning.opaque)


def forward(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, D) in q's dtype and lse (B, H, N) float32."""
    batch, heads, queries, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    vec = row_alignment((q, out, *keys, *values))
    with tuning.current(q.device):
        for part in _launches(q, keys):
            arguments = {
                **_flat("q", q),
                **_flat("out", out),
                "p_lse": lse,
                "keys": _picked(keys, part),
                "values": _picked(values, part),
                "groups": _opaque(part.groups),
                "n_heads": heads,
                "n_queries": queries,
                "scale": scale,
            }
            _launch_tuned("forward", q, part, part.work, arguments, _constants(part, q, vec))
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_q: bool,
    need_keys: Sequence[bool],
    need_values: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return (dq, dkeys, dvalues); a gradient that is not needed has shape (0,)."""
    batch, heads, queries, head_dim = q.shape

    def gradient(x: Tensor, need: bool) -> Tensor:
        return torch.empty_like(x) if need else x.new_empty(0)

    dq = gradient(q, need_q)
    dkeys = [gradient(k, need) for k, need in zip(keys, need_keys, strict=True)]
    dvalues = [gradient(v, need) for v, need in zip(values, need_values, strict=True)]
    written = [x for x in (dq, *dkeys, *dvalues) if x.dim() == 4]
    if not written:
        return dq, dkeys, dvalues

    lse = lse.contiguous()
    stats = lse.new_empty((2, *lse.shape))
    vec = row_alignment((q, *keys, *values, out, *written))
    grad_vec = row_alignment((grad_out,))
    padded_dim = max(16, plan.power_of_2(head_dim))
    with tuning.current(q.device):
        delta_programs = batch * heads * plan.cdiv(queries, plan.DELTA_ROWS)
        shunted_attention_bwd_delta_kernel[(delta_programs,)](
            **_flat("grad", grad_out),
            **_flat("out", out),
            p_lse=lse,
            p_stats=stats,
            n_heads=heads,
            n_queries=queries,
            n_stats=lse.numel(),
            D=head_dim,
            BD=padded_dim,
            VEC=vec,
            GRAD_VEC=grad_vec,
            INTERPRET=tuning.INTERPRET,
            ROWS=plan.DELTA_ROWS,
        )
        for part in _launches(q, keys):
            real = part.order[: part.real]
            needs = (
                need_q,
                tuple([need_keys[g] for g in real]),
                tuple([need_values[g] for g in real]),
            )
            workers = tuning.describe(q.device.index).workers
            planned = plan.backward(part, queries, head_dim, needs, workers)
            if not planned.work:
                continue
            partial = lse.new_empty(planned.workspace) if planned.workspace else stats
            gradients = {"dkeys": _picked(dkeys, part), "dvalues": _picked(dvalues, part)}
            arguments = {
                **_flat("q", q),
                **_flat("grad", grad_out),
                "p_stats": stats,
                **_flat("dq", dq),
                "p_partial": partial,
                "keys": _picked(keys, part),
                "values": _picked(values, part),
                **gradients,
                "groups": _opaque(part.groups),
                "splits": _opaque(planned.splits),
                "segments": _opaque(planned.segments),
                "n_heads": heads,
                "n_queries": queries,
                "n_stats": lse.numel(),
                "scale": scale,
            }
            constants = _constants(part, q, vec) | {
                "S": len(planned.segments.kinds),
                "GRAD_VEC": grad_vec,
                "NEED_Q": need_q,
                "NEED_K": any(needs[1]),
                "NEED_V": any(needs[2]),
            }
            _launch_tuned("backward", q, part, planned.work, arguments, constants)
            if planned.reduce_programs:
                shunted_attention_bwd_reduce_kernel[(planned.reduce_programs, 2)](
                    p_partial=partial,
                    **gradients,
                    groups=_opaque(part.groups),
                    splits=_opaque(planned.splits),
                    G=len(part.order),
                    D=head_dim,
                    BD=padded_dim,
                    ROWS=plan.REDUCE_ROWS,
                )
    return dq, dkeys, dvalues


def _launches(q: Tensor, keys: Sequence[Tensor]) -> tuple[plan.Launch, ...]:
    lengths, heads = tuple([k.shape[2] for k in keys]), tuple([k.shape[1] for k in keys])
    return plan.launches(q.shape[0], q.shape[2], lengths, heads)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides; a gradient that is not needed has none."""
    return x.stride() if x.dim() == 4 else (0, 0, 0, 0)


def _flat(name: str, x: Tensor) -> dict[str, Any]:
    """x and its strides as arguments of their own: to read opaque ones costs registers."""
    s_b, s_h, s_row, s_col = _strides(x)
    return {
        f"p_{name}": x,
        f"s_{name}_b": s_b,
        f"s_{name}_h": s_h,
        f"s_{name}_row": s_row,
        f"s_{name}_col": s_col,
    }


def _picked(tensors: Sequence[Tensor], part: plan.Launch) -> Strided:
    """The launch's tensors, one a group, and their strides."""
    picked = [tensors[g] for g in part.order]
    strides = zip(*[_strides(x) for x in picked], strict=True)
    return Strided(tuple(picked), *[tuning.opaque(stride) for stride in strides])


def row_alignment(tensors: Iterable[Tensor]) -> int:
    """VEC: elements that every row of all tensors is aligned to, 0 if rows are not contiguous."""
    bits, itemsize = 16, 1
    for x in tensors:
        s_b, s_h, s_n, s_d = x.stride()
        if s_d != 1:
            return 0
        itemsize = x.element_size()
        bits |= x.data_ptr() | (s_b | s_h | s_n) * itemsize
    return (bits & -bits) // itemsize


def _constants(part: plan.Launch, q: Tensor, vec: int) -> dict[str, Any]:
    """The constants that both tuned kernels take."""
    head_dim = q.shape[3]
    precision = tuning.precision(q.dtype)
    exact = q.dtype == torch.float32 and precision == "ieee"
    return {
        "G": len(part.order),
        "D": head_dim,
        "BD": max(16, plan.power_of_2(head_dim)),
        "VEC": vec,
        "PRECISION": precision,
        "SLICE": (16 if head_dim <= 16 else 32) if exact else 0,
        "INTERPRET": tuning.INTERPRET,
    }


def _launch_tuned(
    kind: str,
    q: Tensor,
    part: plan.Launch,
    work: tuple[plan.Work, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Launch one of the two tuned kernels with the tile for its shape."""

    def launch(tile: plan.Tile) -> None:
        TUNED_KERNELS[kind][(plan.programs(work, tile.owned),)](
            **arguments,
            **constants,
            BO=tile.owned,
            BI=tile.walked,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )

    key = (kind, q.device.index, q.dtype, work, *constants.values())
    tile = _tiles.get(key)
    if tile is None:
        tile = choose_tile(kind, q, part, work, constants, launch)
        if not tuning.is_capturing():
            _tiles[key] = tile
    launch(tile)


def choose_tile(kind, q, part, work, constants, launch) -> plan.Tile:
    """The tile for an exact shape, timing all of them if its class is new."""
    if tuning.INTERPRET:
        return plan.INTERPRETER_TILE
    device = tuning.describe(q.device.index)
    precision, head_dim = constants["PRECISION"], constants["D"]
    tiles = plan.admitted_tiles(kind, device, q.dtype, precision, head_dim)

    def span(tile: plan.Tile) -> float:
        return plan.makespan(work, tile.owned, device.workers)

    buckets = plan.power_of_2(q.shape[2]), plan.power_of_2(part.groups.lengths[0])
    shape_class = (kind, q.device.index, q.dtype, *buckets, *constants.values())
    return timings.fastest(shape_class, tiles, span, launch, lambda: min(tiles, key=span))
