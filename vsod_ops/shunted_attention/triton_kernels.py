"""Shunted attention on GPUs: all head groups in one launch, forward and backward.

What is computed is in reference.py.  Scores never leave the chip:

forward   A program owns one tile of BM query rows of one head and walks over that head's keys in
          blocks of BN with an online softmax in base 2 (running maximum, running sum, float32).
backward  delta = rowsum(dO * out) first.  Then one launch whose programs are of two kinds: those
          that own a tile of BO keys and walk over the queries (dK, dV; four products a block), and
          those that own a tile of BO queries and walk over the keys (dQ; three products a block).
          Recomputing P in both costs 7 products where 5 would do, and needs no atomics: every sum
          has a fixed order, so repeats are equal to the bit.  Together the two kinds fill the
          machine: at N=3920 with two long and two short heads on 132 multiprocessors each kind
          alone keeps about half of it busy.

Groups cost differently, so the launch order is longest work first: a program's number is mapped to
its group by a few compares on tuples of arguments, and the hardware hands out numbers in order.
A group with few keys has few dK/dV programs, each with the full query loop; where that leaves
multiprocessors idle the loop is split, partial sums go to a float32 workspace (at most N / N_g
times the size of dK and dV) and a last small launch adds them in order.

Tile sizes are timed once per shape class, batch left out; `_makespan` then carries the timings
over to other batches and lengths, since 62 tiles on 132 multiprocessors want another tile size
than 620.  docs/attention.md has the figures.

Names: p_ pointer, b_ block, o_ offset, m_ mask.  VEC is how many elements (16 bytes at most) every
row is aligned to, 0 if the last dimension is not contiguous: it gives wide and asynchronous copies
without a compilation for each stride.
"""

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Groups that one launch takes; further ones go into further launches.
MAX_GROUPS = 8
# Query loops are split at multiples of this; every BI divides it.
_SPLIT_ROWS = 128
# Float32 rows that a program of the two small kernels handles.
_DELTA_ROWS = 32
_REDUCE_ROWS = 16

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _pick(values, index, G: tl.constexpr):
    """values[index], a run-time index into a tuple of G scalars."""
    picked = values[0]
    for g in tl.static_range(1, G):
        picked = tl.where(index == g, values[g], picked)
    return picked


@triton.jit
def _pick_stride(strides, index, dim: tl.constexpr, G: tl.constexpr):
    """Stride `dim` of group `index`, from G times 4 strides."""
    picked = strides[dim].to(tl.int64)
    for g in tl.static_range(1, G):
        picked = tl.where(index == g, strides[4 * g + dim].to(tl.int64), picked)
    return picked


@triton.jit
def _head(p_group, strides, index, b, h, G: tl.constexpr):
    """Pointer to head (b, h) of the group's tensor, and its row and column stride."""
    o_b = b.to(tl.int64) * _pick_stride(strides, index, 0, G)
    o_h = h.to(tl.int64) * _pick_stride(strides, index, 1, G)
    p_head = _pick(p_group, index, G) + o_b + o_h
    return p_head, _pick_stride(strides, index, 2, G), _pick_stride(strides, index, 3, G)


@triton.jit
def _rows(p_head, s_row, s_col, o_first, ROWS: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr):
    """Pointers to the rows from o_first on."""
    o_row = tl.arange(0, ROWS).to(tl.int64)
    o_col = tl.arange(0, BD)
    if VEC == 0:
        p_tile = p_head + (o_first + o_row)[:, None] * s_row + o_col.to(tl.int64)[None, :] * s_col
    else:
        p_first = p_head + o_first * s_row
        p_tile = p_first + o_row[:, None] * s_row + o_col[None, :]  # [ROWS, BD]
        bytes: tl.constexpr = VEC * (p_head.dtype.element_ty.primitive_bitwidth // 8)
        p_tile = tl.multiple_of(p_tile, [1, bytes])
    return p_tile


@triton.jit
def _load(
    p_tile,
    n_rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The tile's elements; rows from n_rows on (when MASKED) and columns from D on are 0."""
    m_col = tl.arange(0, BD)[None, :] < D
    m_row = tl.arange(0, ROWS)[:, None] < n_rows
    if MASKED and D < BD:
        b_tile = tl.load(p_tile, mask=m_row & m_col, other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row, other=0.0)
    elif D < BD:
        b_tile = tl.load(p_tile, mask=m_col, other=0.0)
    else:
        b_tile = tl.load(p_tile)
    if INTERPRET:  # the interpreter multiplies bfloat16 as if it were integers
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def _store(p_tile, b_tile, n_rows, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    m_tile = (tl.arange(0, ROWS)[:, None] < n_rows) & (tl.arange(0, BD)[None, :] < D)
    tl.store(p_tile, b_tile.to(p_tile.dtype.element_ty), mask=m_tile)


@triton.jit
def _fwd_step(
    b_acc, b_max, b_sum, b_q, p_k, p_v, sk_row, sk_col, sv_row, sv_col, o_n, length, scale2,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax."""
    p_tile = _rows(p_k, sk_row, sk_col, o_n, BN, BD, VEC)
    b_k = _load(p_tile, length - o_n, BN, D, BD, MASKED, INTERPRET)  # [BN, BD]
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BM, BN]
    if MASKED:
        # After the scale: 0 * -inf would turn a padded key into NaN.
        b_s = tl.where((tl.arange(0, BN) < length - o_n)[None, :], b_s * scale2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BM]
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale2)
    # A row that has seen only -inf subtracts 0, as -inf - -inf would poison what follows.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    if MASKED:
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BM, BN]
    else:
        b_p = tl.exp2(b_s * scale2 - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    p_tile = _rows(p_v, sv_row, sv_col, o_n, BN, BD, VEC)
    b_v = _load(p_tile, length - o_n, BN, D, BD, MASKED, INTERPRET)  # [BN, BD]
    b_acc = b_acc * b_decay[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


_FWD_ARGS = (
    "p_q p_out p_lse p_keys p_values q_strides out_strides key_strides value_strides lengths "
    "group_heads first_heads first_pairs n_heads n_queries n_bucket length_bucket"
).split()


@triton.jit(do_not_specialize=_FWD_ARGS, do_not_specialize_on_alignment=_FWD_ARGS)
def shunted_attention_fwd_kernel(
    p_q,  # (B, H, N, D)
    p_out,  # (B, H, N, D)
    p_lse,  # (B, H, N), contiguous
    p_keys,  # G of (B, H_g, N_g, D), most keys first
    p_values,  # G of (B, H_g, N_g, D)
    q_strides,
    out_strides,
    key_strides,  # G times 4
    value_strides,
    lengths,  # G: N_g
    group_heads,  # G: H_g
    first_heads,  # G: the group's first head in q
    first_pairs,  # G: how many (b, h) pairs come before the group's
    n_heads,
    n_queries,
    scale,
    n_bucket,
    length_bucket,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid: (pairs * ceil(N / BM),), all tiles of one pair side by side so that they share keys."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_queries, BM)
    pair = pid // n_tiles
    o_m = pid % n_tiles * BM
    g = 0
    for i in tl.static_range(1, G):
        g = tl.where(pair >= first_pairs[i], i, g)
    pair -= _pick(first_pairs, g, G)
    length = _pick(lengths, g, G)
    n_group = _pick(group_heads, g, G)
    b = pair // n_group
    h_group = pair % n_group
    h = _pick(first_heads, g, G) + h_group
    p_k, sk_row, sk_col = _head(p_keys, key_strides, g, b, h_group, G)
    p_v, sv_row, sv_col = _head(p_values, value_strides, g, b, h_group, G)

    p_q_head, sq_row, sq_col = _head((p_q,), q_strides, 0, b, h, 1)
    p_tile = _rows(p_q_head, sq_row, sq_col, o_m, BM, BD, VEC)
    b_q = _load(p_tile, n_queries - o_m, BM, D, BD, True, INTERPRET)  # [BM, BD]
    # The sign of the scale goes into q, so that the largest score stays the largest when scaled.
    b_q = tl.where(scale < 0, -b_q, b_q)
    scale2 = tl.abs(scale) * _LOG2E

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    full = length // BN * BN
    for o_n in tl.range(0, full, BN):
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, p_k, p_v, sk_row, sk_col, sv_row, sv_col, o_n, length,
            scale2, D, BD, BN, VEC, PRECISION, INTERPRET, False,
        )  # fmt: skip
    for o_n in tl.range(full, length, BN, num_stages=1):  # the last, partial block
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, p_k, p_v, sk_row, sk_col, sv_row, sv_col, o_n, length,
            scale2, D, BD, BN, VEC, PRECISION, INTERPRET, True,
        )  # fmt: skip

    p_out_head, so_row, so_col = _head((p_out,), out_strides, 0, b, h, 1)
    p_tile = _rows(p_out_head, so_row, so_col, o_m, BM, BD, VEC)
    _store(p_tile, b_acc / b_sum[:, None], n_queries - o_m, BM, D, BD)
    # A score of +inf makes the sum NaN; the log-sum-exp is then +inf.
    b_lse = tl.where(b_max == float("inf"), b_max, (b_max + tl.log2(b_sum)) * _LN2)
    o_row = o_m + tl.arange(0, BM)
    p_row = p_lse + (b.to(tl.int64) * n_heads + h) * n_queries + o_row
    tl.store(p_row, b_lse, mask=o_row < n_queries)


_DELTA_ARGS = "p_grad p_out p_delta grad_strides out_strides n_heads n_queries".split()


@triton.jit(do_not_specialize=_DELTA_ARGS, do_not_specialize_on_alignment=_DELTA_ARGS)
def shunted_attention_bwd_delta_kernel(
    p_grad,  # (B, H, N, D), gradient of out
    p_out,  # (B, H, N, D)
    p_delta,  # (B, H, N), contiguous
    grad_strides,
    out_strides,
    n_heads,
    n_queries,
    D: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = rowsum(dO * out).  Grid: (B * H * ceil(N / ROWS),)."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_queries, ROWS)
    pair = pid // n_tiles
    o_m = pid % n_tiles * ROWS
    b = pair // n_heads
    h = pair % n_heads
    p_grad_head, sg_row, sg_col = _head((p_grad,), grad_strides, 0, b, h, 1)
    p_out_head, so_row, so_col = _head((p_out,), out_strides, 0, b, h, 1)
    p_tile = _rows(p_grad_head, sg_row, sg_col, o_m, ROWS, BD, GRAD_VEC)
    b_grad = _load(p_tile, n_queries - o_m, ROWS, D, BD, True, INTERPRET)  # [ROWS, BD]
    p_tile = _rows(p_out_head, so_row, so_col, o_m, ROWS, BD, VEC)
    b_out = _load(p_tile, n_queries - o_m, ROWS, D, BD, True, INTERPRET)  # [ROWS, BD]
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)  # [ROWS]
    o_row = o_m + tl.arange(0, ROWS)
    tl.store(p_delta + pair.to(tl.int64) * n_queries + o_row, b_delta, mask=o_row < n_queries)


@triton.jit
def _dkdv_step(
    b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, sq_row, sq_col, sg_row, sg_col, o_m,
    n_queries, scale2, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, VEC: tl.constexpr,
    GRAD_VEC: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One query block of dK and dV.  Scores are kept transposed: no operand needs a transpose."""
    o_row = o_m + tl.arange(0, BI)
    m_row = (o_row < n_queries)[None, :]
    p_tile = _rows(p_q, sq_row, sq_col, o_m, BI, BD, VEC)
    b_q = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    p_tile = _rows(p_grad, sg_row, sg_col, o_m, BI, BD, GRAD_VEC)
    b_do = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    if MASKED:
        b_lse = tl.load(p_lse + o_row, mask=o_row < n_queries, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_row)
    b_st = tl.dot(b_k, b_q.T, input_precision=PRECISION)  # [BO, BI]
    b_pt = tl.exp2(b_st * scale2 - (b_lse * _LOG2E)[None, :])  # [BO, BI]
    if MASKED:  # selected, not multiplied: an infinite key times a padded query is NaN
        b_pt = tl.where(m_row, b_pt, 0.0)
    if NEED_V:
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    if NEED_K:
        if MASKED:
            b_delta = tl.load(p_delta + o_row, mask=o_row < n_queries, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_row)
        b_dpt = tl.dot(b_v, b_do.T, input_precision=PRECISION)  # [BO, BI]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        if MASKED:
            b_dst = tl.where(m_row, b_dst, 0.0)
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _dq_step(
    b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, sk_row, sk_col, sv_row, sv_col, o_n, length,
    scale2, D: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of dQ."""
    p_tile = _rows(p_k, sk_row, sk_col, o_n, BI, BD, VEC)
    b_k = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    p_tile = _rows(p_v, sv_row, sv_col, o_n, BI, BD, VEC)
    b_v = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BO, BI]
    b_p = tl.exp2(b_s * scale2 - b_lse2[:, None])
    b_dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)  # [BO, BI]
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASKED:
        b_ds = tl.where((tl.arange(0, BI) < length - o_n)[None, :], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


_BWD_ARGS = (
    "p_q p_grad p_lse p_delta p_dq p_partial p_keys p_values p_dkeys p_dvalues q_strides "
    "grad_strides dq_strides key_strides value_strides dkey_strides dvalue_strides lengths "
    "group_heads first_heads need_keys need_values n_splits split_rows o_partials part_sizes "
    "segment_kinds segment_groups segment_rows segment_repeats n_heads n_queries n_bucket "
    "length_bucket"
).split()


@triton.jit(do_not_specialize=_BWD_ARGS, do_not_specialize_on_alignment=_BWD_ARGS)
def shunted_attention_bwd_kernel(
    p_q,  # (B, H, N, D)
    p_grad,  # (B, H, N, D), gradient of out
    p_lse,  # (B, H, N), contiguous
    p_delta,  # (B, H, N), contiguous
    p_dq,  # (B, H, N, D)
    p_partial,  # float32 workspace of the groups whose query loop is split
    p_keys,  # G of (B, H_g, N_g, D)
    p_values,
    p_dkeys,
    p_dvalues,
    q_strides,
    grad_strides,
    dq_strides,
    key_strides,  # G times 4
    value_strides,
    dkey_strides,
    dvalue_strides,
    lengths,  # G: N_g
    group_heads,  # G: H_g
    first_heads,  # G: the group's first head in q
    need_keys,  # G: 1 if dkeys[g] is wanted
    need_values,
    n_splits,  # G: parts of the query loop
    split_rows,  # G: queries of a part, a multiple of _SPLIT_ROWS unless there is one part
    o_partials,  # G: where the group's workspace (split, dK | dV, b, h, n, D) begins
    part_sizes,  # G: B * H_g * N_g * D
    segment_kinds,  # S: 1 for dK and dV, 0 for dQ; most work a program first
    segment_groups,  # S: group
    segment_rows,  # S: N_g or N, cut into tiles of BO
    segment_repeats,  # S: pairs * splits, programs a tile
    n_heads,
    n_queries,
    scale,
    n_bucket,
    length_bucket,
    G: tl.constexpr,
    S: tl.constexpr,
    NEED_Q: tl.constexpr,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """Grid: (sum over segments of ceil(rows / BO) * repeats,)."""
    pid = tl.program_id(0)
    first = 0
    s = 0
    for i in tl.static_range(1, S):
        end = first + tl.cdiv(segment_rows[i - 1], BO) * segment_repeats[i - 1]
        past = (pid >= end) & (s == i - 1)
        s = tl.where(past, i, s)
        first = tl.where(past, end, first)
    pid -= first
    g = _pick(segment_groups, s, S)
    n_tiles = tl.cdiv(_pick(segment_rows, s, S), BO)
    o_tile = pid % n_tiles * BO
    pair = pid // n_tiles
    length = _pick(lengths, g, G)
    n_group = _pick(group_heads, g, G)
    scale2 = scale * _LOG2E
    if _pick(segment_kinds, s, S) == 1:
        if NEED_K or NEED_V:
            parts = _pick(n_splits, g, G)
            part = pair % parts
            pair = pair // parts
            b = pair // n_group
            h_group = pair % n_group
            h = _pick(first_heads, g, G) + h_group
            p_k, sk_row, sk_col = _head(p_keys, key_strides, g, b, h_group, G)
            p_v, sv_row, sv_col = _head(p_values, value_strides, g, b, h_group, G)
            p_q_head, sq_row, sq_col = _head((p_q,), q_strides, 0, b, h, 1)
            p_grad_head, sg_row, sg_col = _head((p_grad,), grad_strides, 0, b, h, 1)
            o_pair = (b.to(tl.int64) * n_heads + h) * n_queries
            n_left = length - o_tile
            p_tile = _rows(p_k, sk_row, sk_col, o_tile, BO, BD, VEC)
            b_k = _load(p_tile, n_left, BO, D, BD, True, INTERPRET)  # [BO, BD]
            p_tile = _rows(p_v, sv_row, sv_col, o_tile, BO, BD, VEC)
            b_v = _load(p_tile, n_left, BO, D, BD, True, INTERPRET)  # [BO, BD]
            b_dk = tl.zeros([BO, BD], tl.float32)
            b_dv = tl.zeros([BO, BD], tl.float32)
            rows = _pick(split_rows, g, G)
            start = part * rows
            end = tl.minimum(start + rows, n_queries)
            full = start + (end - start) // BI * BI
            for o_m in tl.range(start, full, BI):
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, b_v, p_q_head, p_grad_head, p_lse + o_pair,
                    p_delta + o_pair, sq_row, sq_col, sg_row, sg_col, o_m, n_queries, scale2,
                    NEED_K, NEED_V, D, BD, BI, VEC, GRAD_VEC, PRECISION, INTERPRET, False,
                )  # fmt: skip
            for o_m in tl.range(full, end, BI, num_stages=1):  # the last, partial block
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, b_v, p_q_head, p_grad_head, p_lse + o_pair,
                    p_delta + o_pair, sq_row, sq_col, sg_row, sg_col, o_m, n_queries, scale2,
                    NEED_K, NEED_V, D, BD, BI, VEC, GRAD_VEC, PRECISION, INTERPRET, True,
                )  # fmt: skip
            b_dk *= scale
            if parts == 1:
                if NEED_K:
                    if _pick(need_keys, g, G) == 1:
                        p_dk, s_row, s_col = _head(p_dkeys, dkey_strides, g, b, h_group, G)
                        p_tile = _rows(p_dk, s_row, s_col, o_tile, BO, BD, VEC)
                        _store(p_tile, b_dk, n_left, BO, D, BD)
                if NEED_V:
                    if _pick(need_values, g, G) == 1:
                        p_dv, s_row, s_col = _head(p_dvalues, dvalue_strides, g, b, h_group, G)
                        p_tile = _rows(p_dv, s_row, s_col, o_tile, BO, BD, VEC)
                        _store(p_tile, b_dv, n_left, BO, D, BD)
            else:
                size = _pick(part_sizes, g, G).to(tl.int64)
                p_part = p_partial + _pick(o_partials, g, G).to(tl.int64) + 2 * part * size
                p_part += pair.to(tl.int64) * length * D
                row = tl.full([], D, tl.int64)
                if NEED_K:
                    p_part_tile = _rows(p_part, row, 1, o_tile, BO, BD, 1)
                    _store(p_part_tile, b_dk, n_left, BO, D, BD)
                if NEED_V:
                    p_part_tile = _rows(p_part + size, row, 1, o_tile, BO, BD, 1)
                    _store(p_part_tile, b_dv, n_left, BO, D, BD)
    else:
        if NEED_Q:
            b = pair // n_group
            h_group = pair % n_group
            h = _pick(first_heads, g, G) + h_group
            p_k, sk_row, sk_col = _head(p_keys, key_strides, g, b, h_group, G)
            p_v, sv_row, sv_col = _head(p_values, value_strides, g, b, h_group, G)
            p_q_head, sq_row, sq_col = _head((p_q,), q_strides, 0, b, h, 1)
            p_grad_head, sg_row, sg_col = _head((p_grad,), grad_strides, 0, b, h, 1)
            n_left = n_queries - o_tile
            p_tile = _rows(p_q_head, sq_row, sq_col, o_tile, BO, BD, VEC)
            b_q = _load(p_tile, n_left, BO, D, BD, True, INTERPRET)  # [BO, BD]
            p_tile = _rows(p_grad_head, sg_row, sg_col, o_tile, BO, BD, GRAD_VEC)
            b_do = _load(p_tile, n_left, BO, D, BD, True, INTERPRET)  # [BO, BD]
            o_pair = (b.to(tl.int64) * n_heads + h) * n_queries
            o_row = o_tile + tl.arange(0, BO)
            m_row = o_row < n_queries
            b_lse2 = tl.load(p_lse + o_pair + o_row, mask=m_row, other=0.0) * _LOG2E  # [BO]
            b_delta = tl.load(p_delta + o_pair + o_row, mask=m_row, other=0.0)  # [BO]
            b_dq = tl.zeros([BO, BD], tl.float32)
            full = length // BI * BI
            for o_n in tl.range(0, full, BI):
                b_dq = _dq_step(
                    b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, sk_row, sk_col, sv_row, sv_col,
                    o_n, length, scale2, D, BD, BI, VEC, PRECISION, INTERPRET, False,
                )  # fmt: skip
            for o_n in tl.range(full, length, BI, num_stages=1):  # the last, partial block
                b_dq = _dq_step(
                    b_dq, b_q, b_do, b_lse2, b_delta, p_k, p_v, sk_row, sk_col, sv_row, sv_col,
                    o_n, length, scale2, D, BD, BI, VEC, PRECISION, INTERPRET, True,
                )  # fmt: skip
            p_dq_head, s_row, s_col = _head((p_dq,), dq_strides, 0, b, h, 1)
            p_tile = _rows(p_dq_head, s_row, s_col, o_tile, BO, BD, VEC)
            _store(p_tile, b_dq * scale, n_left, BO, D, BD)


_REDUCE_ARGS = (
    "p_partial p_dkeys p_dvalues dkey_strides dvalue_strides lengths group_heads need_keys "
    "need_values n_splits o_partials part_sizes first_programs"
).split()


@triton.jit(do_not_specialize=_REDUCE_ARGS, do_not_specialize_on_alignment=_REDUCE_ARGS)
def shunted_attention_bwd_reduce_kernel(
    p_partial,  # float32 workspace, (split, dK | dV, b, h, n, D) a group
    p_dkeys,  # G of (B, H_g, N_g, D)
    p_dvalues,
    dkey_strides,  # G times 4
    dvalue_strides,
    lengths,  # G: N_g
    group_heads,  # G: H_g
    need_keys,  # G: 1 if dkeys[g] is wanted
    need_values,
    n_splits,  # G
    o_partials,  # G
    part_sizes,  # G: B * H_g * N_g * D
    first_programs,  # G
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the parts of dK (program_id(1) == 0) and dV in order.  Grid: (tiles of (b, h, n), 2)."""
    pid = tl.program_id(0)
    g = 0
    for i in tl.static_range(1, G):
        g = tl.where(pid >= first_programs[i], i, g)
    o_first = (pid - _pick(first_programs, g, G)) * ROWS
    length = _pick(lengths, g, G)
    n_group = _pick(group_heads, g, G)
    size = _pick(part_sizes, g, G).to(tl.int64)
    is_value = tl.program_id(1)
    wanted = tl.where(is_value == 1, _pick(need_values, g, G), _pick(need_keys, g, G))
    if wanted == 1:
        o_row = o_first.to(tl.int64) + tl.arange(0, ROWS)  # over b, h, n
        o_col = tl.arange(0, BD)
        m_tile = (o_row * D < size)[:, None] & (o_col < D)[None, :]
        p_tile = p_partial + _pick(o_partials, g, G).to(tl.int64) + is_value * size
        p_tile = p_tile + o_row[:, None] * D + o_col[None, :]  # [ROWS, BD]
        b_sum = tl.zeros([ROWS, BD], tl.float32)
        for _ in range(_pick(n_splits, g, G)):
            b_sum += tl.load(p_tile, mask=m_tile, other=0.0)
            p_tile += 2 * size
        b = o_row // (length * n_group)
        h = o_row // length % n_group
        n = o_row % length
        for kind in tl.static_range(2):
            if kind == is_value:
                if kind == 0:
                    p_grad = _pick(p_dkeys, g, G)
                    strides = dkey_strides
                else:
                    p_grad = _pick(p_dvalues, g, G)
                    strides = dvalue_strides
                o_out = b * _pick_stride(strides, g, 0, G) + h * _pick_stride(strides, g, 1, G)
                o_out += n * _pick_stride(strides, g, 2, G)
                o_out = o_out[:, None] + o_col[None, :] * _pick_stride(strides, g, 3, G)
                tl.store(p_grad + o_out, b_sum.to(p_grad.dtype.element_ty), mask=m_tile)
