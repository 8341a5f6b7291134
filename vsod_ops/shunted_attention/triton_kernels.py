"""Shunted attention on GPUs: all head groups in one launch, forward and backward.

What is computed is in reference.py.  Scores never leave the chip:

forward   A program owns one tile of BO query rows of one head and walks over that head's keys in
          blocks of BI with an online softmax in base 2 (running maximum, running sum, float32).
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

import contextlib
import functools
import heapq
import inspect
import math
import threading
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
# Rows that a program of the two small kernels handles.
_DELTA_ROWS = 16
_REDUCE_ROWS = 8

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


def _jit(kernel):
    """triton.jit without a compilation for each stride and alignment: VEC says all that counts."""
    parameters = inspect.signature(kernel).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=numbers, do_not_specialize_on_alignment=numbers)


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
        # Added up in this order it costs the fewest registers.
        p_tile = (p_first + o_col)[None, :] + o_row[:, None] * s_row  # [ROWS, BD]
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
def _load_slice(
    p_head,
    s_row,
    s_col,
    o_first,
    n_rows,
    o_slice,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    VEC: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Columns o_slice .. o_slice + SLICE of the rows from o_first on, [ROWS, SLICE]."""
    p_tile = _rows(p_head + o_slice * s_col, s_row, s_col, o_first, ROWS, SLICE, VEC)
    m_row = tl.arange(0, ROWS)[:, None] < n_rows
    m_col = tl.arange(0, SLICE)[None, :] < D - o_slice
    return tl.load(p_tile, mask=m_row & m_col, other=0.0)


@triton.jit
def _product(
    b_acc, b_a, p_a, sa_row, sa_col, o_a, n_a, b_b, p_b, sb_row, sb_col, o_b, n_b,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, D: tl.constexpr, A_VEC: tl.constexpr,
    B_VEC: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """b_acc + b_a @ b_b^T, where b_a holds the rows from o_a on at p_a and b_b those from o_b on.

    Without tensor cores a product wants whole rows of both factors in registers, which spills.  So
    exact float32 products (SLICE > 0) leave b_a and b_b alone and read slices of columns instead.
    """
    if SLICE > 0:
        for o_slice in tl.range(0, D, SLICE):
            b_a_slice = _load_slice(p_a, sa_row, sa_col, o_a, n_a, o_slice, A_ROWS, D, A_VEC, SLICE)
            b_b_slice = _load_slice(p_b, sb_row, sb_col, o_b, n_b, o_slice, B_ROWS, D, B_VEC, SLICE)
            b_acc = tl.dot(b_a_slice, b_b_slice.T, b_acc, input_precision=PRECISION)
    else:
        b_acc = tl.dot(b_a, b_b.T, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def _store(
    p_head,
    s_row,
    s_col,
    o_first,
    b_tile,
    n_rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    """Write rows below n_rows and columns below D of b_tile to the rows from o_first on."""
    b_tile = b_tile.to(p_head.dtype.element_ty)
    m_row = tl.arange(0, ROWS)[:, None] < n_rows
    if BD >= 128:
        # In halves: whole rows would share addresses with the loads before the loop, which keeps
        # them in registers across it.
        HALF: tl.constexpr = BD // 2
        b_half = tl.permute(tl.reshape(b_tile, [ROWS, 2, HALF]), [0, 2, 1])
        b_low, b_high = tl.split(b_half)  # [ROWS, HALF] each
        o_col = tl.arange(0, HALF)[None, :]
        p_tile = _rows(p_head, s_row, s_col, o_first, ROWS, HALF, VEC)
        tl.store(p_tile, b_low, mask=m_row & (o_col < D))
        p_tile = _rows(p_head + HALF * s_col, s_row, s_col, o_first, ROWS, HALF, VEC)
        tl.store(p_tile, b_high, mask=m_row & (o_col + HALF < D))
    else:
        p_tile = _rows(p_head, s_row, s_col, o_first, ROWS, BD, VEC)
        tl.store(p_tile, b_tile, mask=m_row & (tl.arange(0, BD)[None, :] < D))


@triton.jit
def _fwd_step(
    b_acc, b_max, b_sum, b_q, p_q, sq_row, sq_col, o_m, n_queries, p_k, sk_row, sk_col, p_v,
    sv_row, sv_col, o_n, length, scale, D: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    INTERPRET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax."""
    p_tile = _rows(p_k, sk_row, sk_col, o_n, BI, BD, VEC)
    b_k = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    b_s = _product(
        tl.zeros([BO, BI], tl.float32), b_q, p_q, sq_row, sq_col, o_m, n_queries - o_m,
        b_k, p_k, sk_row, sk_col, o_n, length - o_n, BO, BI, D, VEC, VEC, PRECISION, SLICE,
    )  # fmt: skip
    if SLICE > 0:
        b_s = tl.where(scale < 0, -b_s, b_s)
    scale2 = tl.abs(scale) * _LOG2E
    if MASKED:
        # After the scale: 0 * -inf would turn a padded key into NaN.
        b_s = tl.where((tl.arange(0, BI) < length - o_n)[None, :], b_s * scale2, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BO]
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale2)
    # A row that has seen only -inf subtracts 0, as -inf - -inf would poison what follows.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    if MASKED:  # noqa: SIM108
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BO, BI]
    else:
        b_p = tl.exp2(b_s * scale2 - b_shift[:, None])
    b_decay = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    p_tile = _rows(p_v, sv_row, sv_col, o_n, BI, BD, VEC)
    b_v = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    b_acc = b_acc * b_decay[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_new, b_sum


@_jit
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
    SLICE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """Grid: (pairs * ceil(N / BO),), all tiles of one pair side by side so that they share keys."""
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_queries, BO)
    pair = pid // n_tiles
    o_m = pid % n_tiles * BO
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
    p_tile = _rows(p_q_head, sq_row, sq_col, o_m, BO, BD, VEC)
    b_q = _load(p_tile, n_queries - o_m, BO, D, BD, True, INTERPRET)  # [BO, BD]
    # The sign of the scale goes into q, so that the largest score stays the largest when scaled.
    b_q = tl.where(scale < 0, -b_q, b_q)

    b_max = tl.full([BO], float("-inf"), tl.float32)
    b_sum = tl.zeros([BO], tl.float32)
    b_acc = tl.zeros([BO, BD], tl.float32)
    full = length // BI * BI
    for o_n in tl.range(0, full, BI):
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, p_q_head, sq_row, sq_col, o_m, n_queries, p_k, sk_row,
            sk_col, p_v, sv_row, sv_col, o_n, length, scale, D, BD, BO, BI, VEC, PRECISION,
            SLICE, INTERPRET, False,
        )  # fmt: skip
    for o_n in tl.range(full, length, BI, num_stages=1):  # the last, partial block
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, p_q_head, sq_row, sq_col, o_m, n_queries, p_k, sk_row,
            sk_col, p_v, sv_row, sv_col, o_n, length, scale, D, BD, BO, BI, VEC, PRECISION,
            SLICE, INTERPRET, True,
        )  # fmt: skip

    p_out_head, so_row, so_col = _head((p_out,), out_strides, 0, b, h, 1)
    b_out = b_acc / b_sum[:, None]  # [BO, BD]
    _store(p_out_head, so_row, so_col, o_m, b_out, n_queries - o_m, BO, D, BD, VEC)
    # A score of +inf makes the sum NaN; the log-sum-exp is then +inf.
    b_lse = tl.where(b_max == float("inf"), b_max, (b_max + tl.log2(b_sum)) * _LN2)
    o_row = o_m + tl.arange(0, BO)
    p_row = p_lse + (b.to(tl.int64) * n_heads + h) * n_queries + o_row
    tl.store(p_row, b_lse, mask=o_row < n_queries)


@_jit
def shunted_attention_bwd_delta_kernel(
    p_grad,  # (B, H, N, D), gradient of out
    p_out,  # (B, H, N, D)
    p_lse,  # (B, H, N), contiguous
    p_stats,  # (2, B, H, N), contiguous: lse in base 2, delta
    grad_strides,
    out_strides,
    n_heads,
    n_queries,
    n_stats,  # B * H * N
    D: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    GRAD_VEC: tl.constexpr,
    INTERPRET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = rowsum(dO * out), and lse in base 2.  Grid: (B * H * ceil(N / ROWS),)."""
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
    m_row = o_row < n_queries
    o_stats = pair.to(tl.int64) * n_queries + o_row
    tl.store(p_stats + o_stats, tl.load(p_lse + o_stats, mask=m_row) * _LOG2E, mask=m_row)
    tl.store(p_stats + n_stats + o_stats, b_delta, mask=m_row)


@triton.jit
def _dkdv_step(
    b_dk, b_dv, b_k, p_k, sk_row, sk_col, b_v, p_v, sv_row, sv_col, o_n, length, p_q, sq_row,
    sq_col, p_grad, sg_row, sg_col, o_m, n_queries, p_lse2, p_delta, scale2,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, VEC: tl.constexpr, GRAD_VEC: tl.constexpr,
    PRECISION: tl.constexpr, SLICE: tl.constexpr, INTERPRET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One query block of dK and dV.  Scores are kept transposed: no operand needs a transpose."""
    o_row = o_m + tl.arange(0, BI)
    m_row = (o_row < n_queries)[None, :]
    p_tile = _rows(p_q, sq_row, sq_col, o_m, BI, BD, VEC)
    b_q = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    p_tile = _rows(p_grad, sg_row, sg_col, o_m, BI, BD, GRAD_VEC)
    b_do = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    if MASKED:
        b_lse2 = tl.load(p_lse2 + o_row, mask=o_row < n_queries, other=0.0)
    else:
        b_lse2 = tl.load(p_lse2 + o_row)
    b_st = _product(
        tl.zeros([BO, BI], tl.float32), b_k, p_k, sk_row, sk_col, o_n, length - o_n,
        b_q, p_q, sq_row, sq_col, o_m, n_queries - o_m, BO, BI, D, VEC, VEC, PRECISION, SLICE,
    )  # fmt: skip
    b_pt = tl.exp2(b_st * scale2 - b_lse2[None, :])  # [BO, BI]
    if MASKED:  # selected, not multiplied: an infinite key times a padded query is NaN
        b_pt = tl.where(m_row, b_pt, 0.0)
    if SLICE > 0:  # read where it is used, as _product does
        p_tile = _rows(p_grad, sg_row, sg_col, o_m, BI, BD, GRAD_VEC)
        b_do = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    if NEED_V:
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    if NEED_K:
        if MASKED:
            b_delta = tl.load(p_delta + o_row, mask=o_row < n_queries, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_row)
        # The product starts from -delta: delta need not stay in registers beside it.
        b_dpt = _product(
            tl.broadcast_to(-b_delta[None, :], [BO, BI]), b_v, p_v, sv_row, sv_col, o_n,
            length - o_n, b_do, p_grad, sg_row, sg_col, o_m, n_queries - o_m, BO, BI, D, VEC,
            GRAD_VEC, PRECISION, SLICE,
        )  # fmt: skip
        b_dst = b_pt * b_dpt
        if MASKED:
            b_dst = tl.where(m_row, b_dst, 0.0)
        if SLICE > 0:
            p_tile = _rows(p_q, sq_row, sq_col, o_m, BI, BD, VEC)
            b_q = _load(p_tile, n_queries - o_m, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _dq_step(
    b_dq, b_q, p_q, sq_row, sq_col, b_do, p_grad, sg_row, sg_col, o_m, n_queries, b_lse2, b_delta,
    p_k, sk_row, sk_col, p_v, sv_row, sv_col, o_n, length, scale2, D: tl.constexpr,
    BD: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, VEC: tl.constexpr,
    GRAD_VEC: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    INTERPRET: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of dQ."""
    p_tile = _rows(p_k, sk_row, sk_col, o_n, BI, BD, VEC)
    b_k = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    p_tile = _rows(p_v, sv_row, sv_col, o_n, BI, BD, VEC)
    b_v = _load(p_tile, length - o_n, BI, D, BD, MASKED, INTERPRET)  # [BI, BD]
    b_zero = tl.zeros([BO, BI], tl.float32)
    b_s = _product(
        b_zero, b_q, p_q, sq_row, sq_col, o_m, n_queries - o_m,
        b_k, p_k, sk_row, sk_col, o_n, length - o_n, BO, BI, D, VEC, VEC, PRECISION, SLICE,
    )  # fmt: skip
    b_p = tl.exp2(b_s * scale2 - b_lse2[:, None])
    b_dp = _product(
        b_zero, b_do, p_grad, sg_row, sg_col, o_m, n_queries - o_m,
        b_v, p_v, sv_row, sv_col, o_n, length - o_n, BO, BI, D, GRAD_VEC, VEC, PRECISION, SLICE,
    )  # fmt: skip
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASKED:
        b_ds = tl.where((tl.arange(0, BI) < length - o_n)[None, :], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@_jit
def shunted_attention_bwd_kernel(
    p_q,  # (B, H, N, D)
    p_grad,  # (B, H, N, D), gradient of out
    p_stats,  # (2, B, H, N), contiguous: lse in base 2, delta
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
    n_stats,  # B * H * N
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
    SLICE: tl.constexpr,
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
            p_lse2 = p_stats + (b.to(tl.int64) * n_heads + h) * n_queries
            p_delta = p_lse2 + n_stats
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
                    b_dk, b_dv, b_k, p_k, sk_row, sk_col, b_v, p_v, sv_row, sv_col, o_tile, length,
                    p_q_head, sq_row, sq_col, p_grad_head, sg_row, sg_col, o_m, n_queries, p_lse2,
                    p_delta, scale2, NEED_K, NEED_V, D, BD, BO, BI, VEC, GRAD_VEC, PRECISION,
                    SLICE, INTERPRET, False,
                )  # fmt: skip
            for o_m in tl.range(full, end, BI, num_stages=1):  # the last, partial block
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, p_k, sk_row, sk_col, b_v, p_v, sv_row, sv_col, o_tile, length,
                    p_q_head, sq_row, sq_col, p_grad_head, sg_row, sg_col, o_m, n_queries, p_lse2,
                    p_delta, scale2, NEED_K, NEED_V, D, BD, BO, BI, VEC, GRAD_VEC, PRECISION,
                    SLICE, INTERPRET, True,
                )  # fmt: skip
            b_dk *= scale
            if parts == 1:
                if NEED_K:  # noqa: SIM102
                    if _pick(need_keys, g, G) == 1:
                        p_dk, s_row, s_col = _head(p_dkeys, dkey_strides, g, b, h_group, G)
                        _store(p_dk, s_row, s_col, o_tile, b_dk, n_left, BO, D, BD, VEC)
                if NEED_V:  # noqa: SIM102
                    if _pick(need_values, g, G) == 1:
                        p_dv, s_row, s_col = _head(p_dvalues, dvalue_strides, g, b, h_group, G)
                        _store(p_dv, s_row, s_col, o_tile, b_dv, n_left, BO, D, BD, VEC)
            else:
                size = _pick(part_sizes, g, G).to(tl.int64)
                p_part = p_partial + _pick(o_partials, g, G).to(tl.int64) + 2 * part * size
                p_part += pair.to(tl.int64) * length * D
                row = tl.full([], D, tl.int64)
                PART_VEC: tl.constexpr = 4 if D % 4 == 0 else 1
                if NEED_K:
                    _store(p_part, row, 1, o_tile, b_dk, n_left, BO, D, BD, PART_VEC)
                if NEED_V:
                    _store(p_part + size, row, 1, o_tile, b_dv, n_left, BO, D, BD, PART_VEC)
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
            p_lse2 = p_stats + (b.to(tl.int64) * n_heads + h) * n_queries
            o_row = o_tile + tl.arange(0, BO)
            m_row = o_row < n_queries
            b_lse2 = tl.load(p_lse2 + o_row, mask=m_row, other=0.0)  # [BO]
            b_delta = tl.load(p_lse2 + n_stats + o_row, mask=m_row, other=0.0)  # [BO]
            b_dq = tl.zeros([BO, BD], tl.float32)
            full = length // BI * BI
            for o_n in tl.range(0, full, BI):
                b_dq = _dq_step(
                    b_dq, b_q, p_q_head, sq_row, sq_col, b_do, p_grad_head, sg_row, sg_col, o_tile,
                    n_queries, b_lse2, b_delta, p_k, sk_row, sk_col, p_v, sv_row, sv_col, o_n,
                    length, scale2, D, BD, BO, BI, VEC, GRAD_VEC, PRECISION, SLICE, INTERPRET,
                    False,
                )  # fmt: skip
            for o_n in tl.range(full, length, BI, num_stages=1):  # the last, partial block
                b_dq = _dq_step(
                    b_dq, b_q, p_q_head, sq_row, sq_col, b_do, p_grad_head, sg_row, sg_col, o_tile,
                    n_queries, b_lse2, b_delta, p_k, sk_row, sk_col, p_v, sv_row, sv_col, o_n,
                    length, scale2, D, BD, BO, BI, VEC, GRAD_VEC, PRECISION, SLICE, INTERPRET,
                    True,
                )  # fmt: skip
            p_dq_head, s_row, s_col = _head((p_dq,), dq_strides, 0, b, h, 1)
            _store(p_dq_head, s_row, s_col, o_tile, b_dq * scale, n_left, BO, D, BD, VEC)


@_jit
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
    o_first = (pid - _pick(first_programs, g, G)).to(tl.int64) * ROWS
    length = _pick(lengths, g, G)
    n_group = _pick(group_heads, g, G)
    size = _pick(part_sizes, g, G).to(tl.int64)
    is_value = tl.program_id(1)
    wanted = tl.where(is_value == 1, _pick(need_values, g, G), _pick(need_keys, g, G))
    if wanted == 1:
        o_row = o_first + tl.arange(0, ROWS)  # over b, h, n
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


# triton's own two cost a microsecond a call.
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


class _Groups(NamedTuple):
    """What a launch is told about its groups, most keys first.

    Tuples are padded to 2, 4 or 8 groups, so that few variants are compiled; no program number
    falls into the padding.
    """

    order: tuple[int, ...]  # group in the caller's order
    real: int  # groups that are not padding
    lengths: tuple[int, ...]
    heads: tuple[int, ...]
    first_heads: tuple[int, ...]
    first_pairs: tuple[int, ...]
    work: tuple["_Work", ...]


class _Work(NamedTuple):
    """Programs of one kind and group: ceil(rows / BO) * repeats of cost BO * columns."""

    rows: int
    repeats: int
    columns: int


class _Backward(NamedTuple):
    """What the backward launches are told beyond _Groups; S = 2 G segments, longest first."""

    need_keys: tuple[int, ...]
    need_values: tuple[int, ...]
    n_splits: tuple[int, ...]
    split_rows: tuple[int, ...]
    o_partials: tuple[int, ...]
    part_sizes: tuple[int, ...]
    workspace: int  # float32 elements
    first_reduce: tuple[int, ...]
    reduce_programs: int
    segment_kinds: tuple[int, ...]
    segment_groups: tuple[int, ...]
    segment_rows: tuple[int, ...]
    segment_repeats: tuple[int, ...]
    work: tuple[_Work, ...]


@functools.lru_cache(maxsize=4096)
def _launches(
    batch: int, queries: int, lengths: tuple[int, ...], heads: tuple[int, ...]
) -> tuple[_Groups, ...]:
    """The groups of each launch; one launch as long as there are at most MAX_GROUPS."""
    order = sorted(range(len(lengths)), key=lambda g: -lengths[g])
    launches = []
    for start in range(0, len(order), MAX_GROUPS):
        index = order[start : start + MAX_GROUPS]
        real = len(index)
        pairs = [batch * heads[g] for g in index]
        padding = max(2, _power_of_2(real)) - real
        index += [index[-1]] * padding
        pairs += [0] * padding
        launches.append(
            _Groups(
                order=tuple(index),
                real=real,
                lengths=tuple(lengths[g] for g in index),
                heads=tuple(heads[g] for g in index),
                first_heads=tuple(sum(heads[:g]) for g in index),
                first_pairs=tuple(sum(pairs[:i]) for i in range(len(index))),
                work=tuple(_Work(queries, pairs[i], lengths[index[i]]) for i in range(real)),
            )
        )
    return tuple(launches)


def _makespan(work: Iterable[_Work], tile: int, workers: int) -> float:
    """Time until `workers` are through, each taking the next program as soon as it is free."""
    ends = [0.0] * workers
    for rows, repeats, columns in work:
        rounds, rest = divmod(_cdiv(rows, tile) * repeats, workers)
        if rounds:
            ends = [end + rounds * tile * columns for end in ends]
        for _ in range(rest):
            heapq.heapreplace(ends, ends[0] + tile * columns)
    return max(ends)


def _segments(
    groups: _Groups,
    queries: int,
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    split_rows: Sequence[int],
) -> list[tuple[int, int, _Work]]:
    """(kind, group, work) of the backward launch, longest program first; kind 1 is dK and dV."""
    need_q, need_keys, need_values = needs
    # Products a block: S, dV and dP, dK; dK alone still needs S.
    products = 2 * any(need_values) + (2 if any(need_values) else 3) * any(need_keys)
    segments = []
    for g in range(groups.real):
        pairs = groups.work[g].repeats
        if need_keys[g] or need_values[g]:
            parts = _cdiv(queries, split_rows[g])
            work = _Work(groups.lengths[g], pairs * parts, products * split_rows[g])
            segments.append((1, g, work))
        if need_q:
            segments.append((0, g, _Work(queries, pairs, 3 * groups.lengths[g])))
    return sorted(segments, key=lambda segment: -segment[2].columns)


def _split_rows(
    groups: _Groups,
    queries: int,
    head_dim: int,
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    workers: int,
) -> list[int]:
    """How many queries a dK/dV program of each group walks over.

    A group is split into at most N / N_g parts, which keeps the workspace below 2 B H N D floats.
    """
    best: list[int] = []
    best_span = math.inf
    for limit in (1, 2, 4, 8, 16):
        rows = []
        for length in groups.lengths[: groups.real]:
            part = _cdiv(queries, max(1, min(limit, queries // length)))
            rows.append(min(queries, _cdiv(part, _SPLIT_ROWS) * _SPLIT_ROWS))
        work = [segment[2] for segment in _segments(groups, queries, needs, rows)]
        span = min(_makespan(work, tile, workers) for tile in (64, 128))
        if min(rows) < queries:
            # One more launch: 4 us, in which a multiprocessor does 6 TFLOP/s.
            span += 12e6 / head_dim
        if span < 0.95 * best_span:
            best, best_span = rows, span
    return best


@functools.lru_cache(maxsize=4096)
def _backward_plan(
    groups: _Groups,
    queries: int,
    head_dim: int,
    needs: tuple[bool, tuple[bool, ...], tuple[bool, ...]],
    workers: int,
) -> _Backward:
    _, need_keys, need_values = needs
    split_rows = _split_rows(groups, queries, head_dim, needs, workers)
    segments = _segments(groups, queries, needs, split_rows)
    n_splits, o_partials, part_sizes, first_reduce = [], [], [], []
    workspace = reduce_programs = 0
    for g in range(groups.real):
        n_splits.append(_cdiv(queries, split_rows[g]))
        part_sizes.append(groups.work[g].repeats * groups.lengths[g] * head_dim)
        o_partials.append(workspace)
        first_reduce.append(reduce_programs)
        if n_splits[g] > 1 and (need_keys[g] or need_values[g]):
            workspace += 2 * n_splits[g] * part_sizes[g]
            reduce_programs += _cdiv(part_sizes[g] // head_dim, _REDUCE_ROWS)

    size = len(groups.order)

    def padded(values: Iterable[int], length: int = size, filler: int = 0) -> tuple[int, ...]:
        values = list(values)
        return tuple(values + [filler] * (length - len(values)))

    return _Backward(
        need_keys=padded(map(int, need_keys)),
        need_values=padded(map(int, need_values)),
        n_splits=padded(n_splits),
        split_rows=padded(split_rows),
        o_partials=padded(o_partials),
        part_sizes=padded(part_sizes),
        workspace=workspace,
        first_reduce=padded(first_reduce, filler=reduce_programs),
        reduce_programs=reduce_programs,
        segment_kinds=padded((s[0] for s in segments), 2 * size),
        segment_groups=padded((s[1] for s in segments), 2 * size),
        segment_rows=padded((s[2].rows for s in segments), 2 * size),
        segment_repeats=padded((s[2].repeats for s in segments), 2 * size),
        work=tuple(s[2] for s in segments),
    )


def _config(outer: int, inner: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BO": outer, "BI": inner}, num_warps=warps, num_stages=stages)


# (kind, architecture, product, padded head_dim) -> (BO, BI, warps, stages) worth timing.  All
# compile without spills for their architecture: tests/test_shunted_attention_triton.py.
_CONFIGS: dict[tuple[str, str, str, int], list[tuple[int, int, int, int]]] = {
    ("forward", "ampere", "half", 64): [(128, 64, 4, 3), (64, 64, 4, 3)],
    ("forward", "ampere", "half", 128): [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)],
    ("forward", "ampere", "half", 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
    ("forward", "hopper", "half", 64): [(128, 128, 8, 3), (64, 64, 4, 3)],
    ("forward", "hopper", "half", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("forward", "hopper", "half", 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
    ("forward", "blackwell", "half", 64): [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("forward", "blackwell", "half", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    ("forward", "blackwell", "half", 256): [(128, 32, 8, 2), (64, 64, 8, 2)],
    ("backward", "ampere", "half", 64): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("backward", "ampere", "half", 128): [(64, 64, 8, 2), (64, 32, 4, 2)],
    ("backward", "ampere", "half", 256): [(64, 32, 8, 2), (32, 32, 8, 2)],
    ("backward", "hopper", "half", 64): [(128, 64, 8, 2), (64, 64, 4, 2)],
    ("backward", "hopper", "half", 128): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    ("backward", "hopper", "half", 256): [(32, 64, 8, 2), (32, 32, 8, 2)],
    ("backward", "blackwell", "half", 64): [(128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
    ("backward", "blackwell", "half", 128): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    ("backward", "blackwell", "half", 256): [(64, 32, 8, 2), (32, 32, 8, 2)],
    ("forward", "any", "tf32", 64): [(64, 64, 4, 2), (64, 32, 4, 2)],
    ("forward", "any", "tf32", 128): [(64, 32, 4, 2), (32, 32, 4, 2)],
    ("forward", "any", "tf32", 256): [(32, 32, 8, 2)],
    ("backward", "any", "tf32", 64): [(64, 32, 8, 2), (32, 32, 8, 2)],
    ("backward", "any", "tf32", 128): [(32, 32, 8, 2)],
    ("backward", "any", "tf32", 256): [(32, 16, 8, 2)],
    ("forward", "any", "ieee", 64): [(64, 32, 8, 2)],
    ("forward", "any", "ieee", 128): [(64, 32, 8, 1), (32, 32, 8, 2)],
    ("forward", "any", "ieee", 256): [(64, 32, 8, 2)],
    ("backward", "any", "ieee", 64): [(32, 16, 8, 2), (32, 16, 8, 1)],
    ("backward", "any", "ieee", 128): [(32, 16, 8, 1)],
    ("backward", "any", "ieee", 256): [(16, 16, 8, 1)],
}


def admitted_configs(
    kind: str, major: int, shared: int, dtype: torch.dtype, precision: str, head_dim: int
) -> list[triton.Config]:
    """The configurations worth timing for "forward" or "backward" on an architecture."""
    padded = max(64, _power_of_2(head_dim))
    architecture, product = "any", precision
    if dtype != torch.float32:
        architecture, product = {9: "hopper", 10: "blackwell"}.get(major, "ampere"), "half"
    configs = _CONFIGS[kind, architecture, product, padded]
    # Tiles that are held and tiles in flight: consumer chips have 99 kB where others have 227.
    row = max(16, _power_of_2(head_dim)) * dtype.itemsize
    held = 1 if kind == "forward" else 2
    fitting = [c for c in configs if row * (held * c[0] + 2 * c[1] * c[3]) < shared]
    return [_config(*c) for c in fitting or configs[-1:]]


class _Device(NamedTuple):
    major: int
    workers: int  # multiprocessors
    shared: int  # bytes of shared memory that a program may have


@functools.cache
def _device(index: int | None) -> _Device:
    if index is None:
        return _Device(9, 132, 232448)  # for the interpreter
    properties = torch.cuda.get_device_properties(index)
    return _Device(
        properties.major,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def _prune(configs, arguments, **meta):
    device = _device(torch.cuda.current_device())
    kind = "forward" if "p_out" in arguments else "backward"
    dtype = arguments["p_q"].dtype
    return admitted_configs(kind, device.major, device.shared, dtype, meta["PRECISION"], meta["D"])


def _tuner(kind: str, kernel, *needs: str):
    configs = [config for key, rows in _CONFIGS.items() if key[0] == kind for config in rows]
    return triton.autotune(
        [_config(*config) for config in dict.fromkeys(configs)],
        key=["n_bucket", "length_bucket", "G", "D", "VEC", "PRECISION", *needs],
        prune_configs_by={"early_config_prune": _prune},
        cache_results=True,
    )(kernel)


_KERNELS = {"forward": shunted_attention_fwd_kernel, "backward": shunted_attention_bwd_kernel}
_INTERPRET = bool(triton.knobs.runtime.interpret)
_TUNERS = {
    "forward": _tuner("forward", shunted_attention_fwd_kernel),
    "backward": _tuner(
        "backward", shunted_attention_bwd_kernel, "GRAD_VEC", "NEED_Q", "NEED_K", "NEED_V"
    ),
}
# Per shape class: configuration -> milliseconds a unit of _makespan.
_rates: dict[tuple, dict[triton.Config, float]] = {}
# Per exact shape: the configuration that is launched.
_chosen: dict[tuple, triton.Config] = {}
_tuning = threading.Lock()


def _choose(
    kind: str,
    device: _Device,
    work: tuple[_Work, ...],
    arguments: tuple,
    buckets: tuple[int, int],
    meta: dict[str, Any],
) -> triton.Config:
    """The configuration for an exact shape, timing all of them if its class is new."""
    if _INTERPRET:
        return _config(32, 32, 4, 1)
    dtype = arguments[0].dtype
    configs = admitted_configs(
        kind, device.major, device.shared, dtype, meta["PRECISION"], meta["D"]
    )
    if len(configs) == 1:
        return configs[0]

    def span(config: triton.Config) -> float:
        return _makespan(work, config.kwargs["BO"], device.workers)

    key = (kind, dtype, buckets, *meta.values())
    with _tuning:
        if key not in _rates:
            if torch.cuda.is_current_stream_capturing():
                return min(configs, key=span)
            tuner = _TUNERS[kind]
            tuner[lambda tiles: (_programs(work, tiles["BO"]),)](
                *arguments, *buckets, **meta, enable_fp_fusion=True
            )
            _rates[key] = {
                config: (time[0] if isinstance(time, Sequence) else time) / span(config)
                for config, time in tuner.configs_timings.items()
            }
    rates = _rates[key]
    return min(rates, key=lambda config: rates[config] * span(config))


def _programs(work: Iterable[_Work], tile: int) -> int:
    return sum(_cdiv(rows, tile) * repeats for rows, repeats, _ in work)


def _launch(
    kind: str,
    q: Tensor,
    work: tuple[_Work, ...],
    arguments: tuple,
    buckets: tuple[int, int],
    meta: dict[str, Any],
) -> None:
    """Launch one of the two tuned kernels in the configuration for its shape."""
    index = q.device.index
    key = (kind, index, q.dtype, work, *meta.values())
    config = _chosen.get(key)
    if config is None:
        config = _choose(kind, _device(index), work, arguments, buckets, meta)
        if _INTERPRET or not torch.cuda.is_current_stream_capturing():
            _chosen[key] = config
    _KERNELS[kind][(_programs(work, config.kwargs["BO"]),)](
        *arguments, *buckets, **meta, **config.all_kwargs(), enable_fp_fusion=True
    )


def _meta(groups: _Groups, q: Tensor, vec: int) -> dict[str, Any]:
    head_dim = q.shape[3]
    single = q.dtype == torch.float32
    # This one getter is right whichever of torch's three switches was set.
    tf32 = single and not _INTERPRET and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "G": len(groups.order),
        "D": head_dim,
        "BD": max(16, _power_of_2(head_dim)),
        "VEC": vec,
        "PRECISION": "tf32" if tf32 else "ieee",
        "SLICE": (16 if head_dim <= 16 else 32) if single and not tf32 else 0,
        "INTERPRET": _INTERPRET,
    }


def _buckets(groups: _Groups, queries: int) -> tuple[int, int]:
    return _power_of_2(queries), _power_of_2(groups.lengths[0])


def _vec(tensors: Iterable[Tensor]) -> int:
    """VEC: elements that every row of all tensors is aligned to, 0 if rows are not contiguous."""
    bits, itemsize = 16, 1
    for x in tensors:
        s_b, s_h, s_n, s_d = x.stride()
        if s_d != 1:
            return 0
        itemsize = x.element_size()
        bits |= x.data_ptr() | (s_b | s_h | s_n) * itemsize
    return (bits & -bits) // itemsize


def _pick_groups(tensors: Sequence[Tensor], groups: _Groups) -> tuple[tuple, tuple]:
    """The launch's tensors and their flat strides; a gradient that is not needed has none."""
    picked = tuple([tensors[g] for g in groups.order])
    strides: list[int] = []
    for x in picked:
        strides += x.stride() if x.dim() == 4 else (0, 0, 0, 0)
    return picked, tuple(strides)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def forward(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, N, D) in q's dtype and lse (B, H, N) float32."""
    batch, heads, queries, _ = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    vec = _vec((q, out, *keys, *values))
    lengths, group_heads = tuple([k.shape[2] for k in keys]), tuple([k.shape[1] for k in keys])
    with _on(q.device):
        for groups in _launches(batch, queries, lengths, group_heads):
            p_keys, key_strides = _pick_groups(keys, groups)
            p_values, value_strides = _pick_groups(values, groups)
            arguments = (
                *(q, out, lse, p_keys, p_values),
                *(q.stride(), out.stride(), key_strides, value_strides),
                *(groups.lengths, groups.heads, groups.first_heads, groups.first_pairs),
                *(heads, queries, scale),
            )
            meta = _meta(groups, q, vec)
            _launch("forward", q, groups.work, arguments, _buckets(groups, queries), meta)
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
    vec, grad_vec = _vec((q, *keys, *values, out, *written)), _vec((grad_out,))
    lengths, group_heads = tuple([k.shape[2] for k in keys]), tuple([k.shape[1] for k in keys])
    with _on(q.device):
        launches = _launches(batch, queries, lengths, group_heads)
        meta = _meta(launches[0], q, vec)
        shunted_attention_bwd_delta_kernel[(batch * heads * _cdiv(queries, _DELTA_ROWS),)](
            *(grad_out, out, lse, stats, grad_out.stride(), out.stride()),
            *(heads, queries, lse.numel()),
            D=head_dim,
            BD=meta["BD"],
            VEC=vec,
            GRAD_VEC=grad_vec,
            INTERPRET=_INTERPRET,
            ROWS=_DELTA_ROWS,
        )
        for groups in launches:
            real = groups.order[: groups.real]
            needs = (
                need_q,
                tuple([need_keys[g] for g in real]),
                tuple([need_values[g] for g in real]),
            )
            workers = _device(q.device.index).workers
            plan = _backward_plan(groups, queries, head_dim, needs, workers)
            if not plan.work:
                continue
            partial = lse.new_empty(plan.workspace) if plan.workspace else stats
            p_keys, key_strides = _pick_groups(keys, groups)
            p_values, value_strides = _pick_groups(values, groups)
            p_dkeys, dkey_strides = _pick_groups(dkeys, groups)
            p_dvalues, dvalue_strides = _pick_groups(dvalues, groups)
            arguments = (
                *(q, grad_out, stats, dq, partial, p_keys, p_values, p_dkeys, p_dvalues),
                *(q.stride(), grad_out.stride(), dq.stride() if need_q else q.stride()),
                *(key_strides, value_strides, dkey_strides, dvalue_strides),
                *(groups.lengths, groups.heads, groups.first_heads),
                *(plan.need_keys, plan.need_values, plan.n_splits, plan.split_rows),
                *(plan.o_partials, plan.part_sizes, plan.segment_kinds, plan.segment_groups),
                *(plan.segment_rows, plan.segment_repeats),
                *(heads, queries, lse.numel(), scale),
            )
            meta = _meta(groups, q, vec) | {
                "S": len(plan.segment_kinds),
                "GRAD_VEC": grad_vec,
                "NEED_Q": need_q,
                "NEED_K": any(needs[1]),
                "NEED_V": any(needs[2]),
            }
            _launch("backward", q, plan.work, arguments, _buckets(groups, queries), meta)
            if plan.reduce_programs:
                shunted_attention_bwd_reduce_kernel[(plan.reduce_programs, 2)](
                    *(partial, p_dkeys, p_dvalues, dkey_strides, dvalue_strides),
                    *(groups.lengths, groups.heads, plan.need_keys, plan.need_values),
                    *(plan.n_splits, plan.o_partials, plan.part_sizes, plan.first_reduce),
                    G=meta["G"],
                    D=head_dim,
                    BD=meta["BD"],
                    ROWS=_REDUCE_ROWS,
                )
    return dq, dkeys, dvalues
