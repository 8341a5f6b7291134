"""The kernels: all head groups in one launch, forward and backward.

What is computed is in ../reference.py.  Scores never leave the chip:

forward   A program owns one tile of BO query rows of one head and walks over that head's keys in
          blocks of BI with an online softmax in base 2 (running maximum, running sum, float32).
backward  delta = rowsum(dO * out) first.  Then one launch whose programs are of two kinds: those
          that own a tile of BO keys and walk over the queries (dK, dV; four products a block), and
          those that own a tile of BO queries and walk over the keys (dQ; three products a block).
          Recomputing P in both costs 7 products where 5 would do, and needs no atomics: every sum
          has a fixed order, so repeats are equal to the bit.  Together the two kinds fill the
          machine: at N=3920 with two long and two short heads on 132 multiprocessors each kind
          alone keeps about half of it busy.
          A group whose query loop is split writes partial sums to a float32 workspace, and a last
          small launch adds them in order.

Names: p_ pointer, s_ stride, b_ block, o_ offset, m_ mask.  VEC is how many elements (16 bytes at
most) every row is aligned to, 0 if the last dimension is not contiguous: it gives wide and
asynchronous copies without a compilation for each stride.
"""

import inspect
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton_tuning import number

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


class Strided(NamedTuple):
    """A tensor (B, H, N, D) and its strides; or G tensors, G of each stride, these opaque."""

    p: Any
    b: Any
    h: Any
    row: Any
    col: Any


class Head(NamedTuple):
    """The rows of one head, inside a kernel."""

    p: Any
    row: Any  # stride
    col: Any  # stride
    n: Any  # rows


class Form(NamedTuple):
    """How rows are read and multiplied, all constants."""

    D: Any  # elements of a row
    BD: Any  # D, padded to a power of 2
    VEC: Any
    PRECISION: Any
    SLICE: Any  # columns that _product reads at a time, 0 for whole rows
    INTERPRET: Any


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
def _pick_number(values, index, G: tl.constexpr):
    """The same for opaque numbers."""
    return number(_pick(values, index, G))


@triton.jit
def _head(tensors, index, b, h, n, G: tl.constexpr):
    """Head (b, h) of tensor `index` of G, with n rows."""
    o_b = b.to(tl.int64) * _pick_number(tensors.b, index, G).to(tl.int64)
    o_h = h.to(tl.int64) * _pick_number(tensors.h, index, G).to(tl.int64)
    p_head = _pick(tensors.p, index, G) + o_b + o_h
    s_row = _pick_number(tensors.row, index, G).to(tl.int64)
    return Head(p_head, s_row, _pick_number(tensors.col, index, G).to(tl.int64), n)


@triton.jit
def _head_of(tensor, b, h, n):
    """Head (b, h) of a Strided tensor whose strides are plain, with n rows."""
    o_b = b.to(tl.int64) * tensor.b.to(tl.int64)
    o_h = h.to(tl.int64) * tensor.h.to(tl.int64)
    p_head = tensor.p + o_b + o_h
    return Head(p_head, tensor.row.to(tl.int64), tensor.col.to(tl.int64), n)


@triton.jit
def _rows(head, o_first, ROWS: tl.constexpr, COLS: tl.constexpr, FORM: tl.constexpr):
    """Pointers to the first COLS columns of the rows from o_first on."""
    o_row = tl.arange(0, ROWS).to(tl.int64)
    o_col = tl.arange(0, COLS)
    if FORM.VEC == 0:
        p_tile = head.p + (o_first + o_row)[:, None] * head.row
        p_tile = p_tile + o_col.to(tl.int64)[None, :] * head.col
    else:
        p_first = head.p + o_first * head.row
        # Added up in this order it costs the fewest registers.
        p_tile = (p_first + o_col)[None, :] + o_row[:, None] * head.row  # [ROWS, COLS]
        bytes: tl.constexpr = FORM.VEC * (head.p.dtype.element_ty.primitive_bitwidth // 8)
        p_tile = tl.multiple_of(p_tile, [1, bytes])
    return p_tile


@triton.jit
def _columns_from(head, o_first):
    """The head without its columns before o_first."""
    return Head(head.p + o_first * head.col, head.row, head.col, head.n)


@triton.jit
def _load(head, o_first, ROWS: tl.constexpr, MASKED: tl.constexpr, FORM: tl.constexpr):
    """The rows from o_first on, [ROWS, BD]; beyond the last (when MASKED) and from D on 0."""
    n_left = head.n - o_first
    p_tile = _rows(head, o_first, ROWS, FORM.BD, FORM)
    m_col = tl.arange(0, FORM.BD)[None, :] < FORM.D
    m_row = tl.arange(0, ROWS)[:, None] < n_left
    if MASKED and FORM.D < FORM.BD:
        b_tile = tl.load(p_tile, mask=m_row & m_col, other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row, other=0.0)
    elif FORM.D < FORM.BD:
        b_tile = tl.load(p_tile, mask=m_col, other=0.0)
    else:
        b_tile = tl.load(p_tile)
    if FORM.INTERPRET:  # the interpreter multiplies bfloat16 as if it were integers
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def _load_slice(head, o_first, o_slice, ROWS: tl.constexpr, FORM: tl.constexpr):
    """Columns o_slice .. o_slice + SLICE of the rows from o_first on, [ROWS, SLICE]."""
    p_tile = _rows(_columns_from(head, o_slice), o_first, ROWS, FORM.SLICE, FORM)
    m_row = tl.arange(0, ROWS)[:, None] < head.n - o_first
    m_col = tl.arange(0, FORM.SLICE)[None, :] < FORM.D - o_slice
    return tl.load(p_tile, mask=m_row & m_col, other=0.0)


@triton.jit
def _product(
    b_acc,
    b_x,
    x,
    o_x,
    b_y,
    y,
    o_y,
    X_ROWS: tl.constexpr,
    Y_ROWS: tl.constexpr,
    X_FORM: tl.constexpr,
    Y_FORM: tl.constexpr,
):
    """b_acc + b_x @ b_y^T, where b_x holds the rows of x from o_x on and b_y those of y from o_y.

    Without tensor cores a product wants whole rows of both factors in registers, which spills.  So
    exact float32 products (SLICE > 0) leave b_x and b_y alone and read slices of columns instead.
    """
    if X_FORM.SLICE > 0:
        for o_slice in tl.range(0, X_FORM.D, X_FORM.SLICE):
            b_x_slice = _load_slice(x, o_x, o_slice, X_ROWS, X_FORM)
            b_y_slice = _load_slice(y, o_y, o_slice, Y_ROWS, Y_FORM)
            b_acc = tl.dot(b_x_slice, b_y_slice.T, b_acc, input_precision=X_FORM.PRECISION)
    else:
        b_acc = tl.dot(b_x, b_y.T, b_acc, input_precision=X_FORM.PRECISION)
    return b_acc


@triton.jit
def _store(head, o_first, b_tile, ROWS: tl.constexpr, FORM: tl.constexpr):
    """Write b_tile to the rows from o_first on, as far as there are rows and columns."""
    b_tile = b_tile.to(head.p.dtype.element_ty)
    m_row = tl.arange(0, ROWS)[:, None] < head.n - o_first
    if FORM.BD >= 128:
        # In halves: whole rows would share addresses with the loads before the loop, which keeps
        # them in registers across it.
        HALF: tl.constexpr = FORM.BD // 2
        b_half = tl.permute(tl.reshape(b_tile, [ROWS, 2, HALF]), [0, 2, 1])
        b_low, b_high = tl.split(b_half)  # [ROWS, HALF] each
        o_col = tl.arange(0, HALF)[None, :]
        p_tile = _rows(head, o_first, ROWS, HALF, FORM)
        tl.store(p_tile, b_low, mask=m_row & (o_col < FORM.D))
        p_tile = _rows(_columns_from(head, HALF), o_first, ROWS, HALF, FORM)
        tl.store(p_tile, b_high, mask=m_row & (o_col + HALF < FORM.D))
    else:
        p_tile = _rows(head, o_first, ROWS, FORM.BD, FORM)
        tl.store(p_tile, b_tile, mask=m_row & (tl.arange(0, FORM.BD)[None, :] < FORM.D))


@triton.jit
def _fwd_step(
    b_acc,
    b_max,
    b_sum,
    b_q,
    q,
    o_m,
    k,
    v,
    o_n,
    scale,
    BO: tl.constexpr,
    BI: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
):
    """One key block of the online softmax."""
    b_k = _load(k, o_n, BI, MASKED, FORM)  # [BI, BD]
    b_s = _product(tl.zeros([BO, BI], tl.float32), b_q, q, o_m, b_k, k, o_n, BO, BI, FORM, FORM)
    if FORM.SLICE > 0:
        b_s = tl.where(scale < 0, -b_s, b_s)
    scale2 = tl.abs(scale) * _LOG2E
    if MASKED:
        # After the scale: 0 * -inf would turn a padded key into NaN.
        b_s = tl.where((tl.arange(0, BI) < k.n - o_n)[None, :], b_s * scale2, float("-inf"))
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
    b_v = _load(v, o_n, BI, MASKED, FORM)  # [BI, BD]
    b_acc = b_acc * b_decay[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=FORM.PRECISION)
    return b_acc, b_new, b_sum


@_jit
def shunted_attention_fwd_kernel(
    p_q,  # (B, H, N, D)
    s_q_b,
    s_q_h,
    s_q_row,
    s_q_col,
    p_out,  # (B, H, N, D)
    s_out_b,
    s_out_h,
    s_out_row,
    s_out_col,
    p_lse,  # (B, H, N), contiguous
    keys,  # Strided, G of (B, H_g, N_g, D), most keys first
    values,  # Strided, G of (B, H_g, N_g, D)
    groups,  # plan.Groups of G opaque numbers each
    n_heads,
    n_queries,
    scale,
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
    FORM: tl.constexpr = Form(D, BD, VEC, PRECISION, SLICE, INTERPRET)
    q = Strided(p_q, s_q_b, s_q_h, s_q_row, s_q_col)
    out = Strided(p_out, s_out_b, s_out_h, s_out_row, s_out_col)
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_queries, BO)
    pair = pid // n_tiles
    o_m = pid % n_tiles * BO
    g = 0
    for i in tl.static_range(1, G):
        g = tl.where(pair >= number(groups.first_pairs[i]), i, g)
    pair -= _pick_number(groups.first_pairs, g, G)
    length = _pick_number(groups.lengths, g, G)
    n_group = _pick_number(groups.heads, g, G)
    b = pair // n_group
    h_group = pair % n_group
    h = _pick_number(groups.first_heads, g, G) + h_group
    k = _head(keys, g, b, h_group, length, G)
    v = _head(values, g, b, h_group, length, G)

    q_head = _head_of(q, b, h, n_queries)
    b_q = _load(q_head, o_m, BO, True, FORM)  # [BO, BD]
    # The sign of the scale goes into q, so that the largest score stays the largest when scaled.
    b_q = tl.where(scale < 0, -b_q, b_q)

    b_max = tl.full([BO], float("-inf"), tl.float32)
    b_sum = tl.zeros([BO], tl.float32)
    b_acc = tl.zeros([BO, BD], tl.float32)
    full = length // BI * BI
    for o_n in tl.range(0, full, BI):
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, q_head, o_m, k, v, o_n, scale, BO, BI, False, FORM
        )
    for o_n in tl.range(full, length, BI, num_stages=1):  # the last, partial block
        b_acc, b_max, b_sum = _fwd_step(
            b_acc, b_max, b_sum, b_q, q_head, o_m, k, v, o_n, scale, BO, BI, True, FORM
        )

    b_out = b_acc / b_sum[:, None]  # [BO, BD]
    _store(_head_of(out, b, h, n_queries), o_m, b_out, BO, FORM)
    # A score of +inf makes the sum NaN; the log-sum-exp is then +inf.
    b_lse = tl.where(b_max == float("inf"), b_max, (b_max + tl.log2(b_sum)) * _LN2)
    o_row = o_m + tl.arange(0, BO)
    p_row = p_lse + (b.to(tl.int64) * n_heads + h) * n_queries + o_row
    tl.store(p_row, b_lse, mask=o_row < n_queries)


@_jit
def shunted_attention_bwd_delta_kernel(
    p_grad,  # (B, H, N, D), gradient of out
    s_grad_b,
    s_grad_h,
    s_grad_row,
    s_grad_col,
    p_out,  # (B, H, N, D)
    s_out_b,
    s_out_h,
    s_out_row,
    s_out_col,
    p_lse,  # (B, H, N), contiguous
    p_stats,  # (2, B, H, N), contiguous: lse in base 2, delta
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
    FORM: tl.constexpr = Form(D, BD, VEC, "ieee", 0, INTERPRET)
    GRAD_FORM: tl.constexpr = Form(D, BD, GRAD_VEC, "ieee", 0, INTERPRET)
    grad = Strided(p_grad, s_grad_b, s_grad_h, s_grad_row, s_grad_col)
    out = Strided(p_out, s_out_b, s_out_h, s_out_row, s_out_col)
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(n_queries, ROWS)
    pair = pid // n_tiles
    o_m = pid % n_tiles * ROWS
    b = pair // n_heads
    h = pair % n_heads
    grad_head = _head_of(grad, b, h, n_queries)
    b_grad = _load(grad_head, o_m, ROWS, True, GRAD_FORM)  # [ROWS, BD]
    out_head = _head_of(out, b, h, n_queries)
    b_out = _load(out_head, o_m, ROWS, True, FORM)  # [ROWS, BD]
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)  # [ROWS]
    o_row = o_m + tl.arange(0, ROWS)
    m_row = o_row < n_queries
    o_stats = pair.to(tl.int64) * n_queries + o_row
    tl.store(p_stats + o_stats, tl.load(p_lse + o_stats, mask=m_row) * _LOG2E, mask=m_row)
    tl.store(p_stats + n_stats + o_stats, b_delta, mask=m_row)


@triton.jit
def _dkdv_step(
    b_dk,
    b_dv,
    b_k,
    k,
    b_v,
    v,
    o_n,
    q,
    grad,
    o_m,
    p_lse2,
    p_delta,
    scale2,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
    GRAD_FORM: tl.constexpr,
):
    """One query block of dK and dV.  Scores are kept transposed: no operand needs a transpose."""
    o_row = o_m + tl.arange(0, BI)
    m_row = (o_row < q.n)[None, :]
    b_q = _load(q, o_m, BI, MASKED, FORM)  # [BI, BD]
    b_do = _load(grad, o_m, BI, MASKED, GRAD_FORM)  # [BI, BD]
    if MASKED:
        b_lse2 = tl.load(p_lse2 + o_row, mask=o_row < q.n, other=0.0)
    else:
        b_lse2 = tl.load(p_lse2 + o_row)
    b_st = _product(tl.zeros([BO, BI], tl.float32), b_k, k, o_n, b_q, q, o_m, BO, BI, FORM, FORM)
    b_pt = tl.exp2(b_st * scale2 - b_lse2[None, :])  # [BO, BI]
    if MASKED:  # selected, not multiplied: an infinite key times a padded query is NaN
        b_pt = tl.where(m_row, b_pt, 0.0)
    if FORM.SLICE > 0:  # read where it is used, as _product does
        b_do = _load(grad, o_m, BI, MASKED, GRAD_FORM)  # [BI, BD]
    if NEED_V:
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=FORM.PRECISION)
    if NEED_K:
        if MASKED:
            b_delta = tl.load(p_delta + o_row, mask=o_row < q.n, other=0.0)
        else:
            b_delta = tl.load(p_delta + o_row)
        # The product starts from -delta: delta need not stay in registers beside it.
        b_dpt = tl.broadcast_to(-b_delta[None, :], [BO, BI])
        b_dpt = _product(b_dpt, b_v, v, o_n, b_do, grad, o_m, BO, BI, FORM, GRAD_FORM)
        b_dst = b_pt * b_dpt
        if MASKED:
            b_dst = tl.where(m_row, b_dst, 0.0)
        if FORM.SLICE > 0:
            b_q = _load(q, o_m, BI, MASKED, FORM)  # [BI, BD]
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=FORM.PRECISION)
    return b_dk, b_dv


@triton.jit
def _dq_step(
    b_dq,
    b_q,
    q,
    b_do,
    grad,
    o_m,
    b_lse2,
    b_delta,
    k,
    v,
    o_n,
    scale2,
    BO: tl.constexpr,
    BI: tl.constexpr,
    MASKED: tl.constexpr,
    FORM: tl.constexpr,
    GRAD_FORM: tl.constexpr,
):
    """One key block of dQ."""
    b_k = _load(k, o_n, BI, MASKED, FORM)  # [BI, BD]
    b_v = _load(v, o_n, BI, MASKED, FORM)  # [BI, BD]
    b_zero = tl.zeros([BO, BI], tl.float32)
    b_s = _product(b_zero, b_q, q, o_m, b_k, k, o_n, BO, BI, FORM, FORM)
    b_p = tl.exp2(b_s * scale2 - b_lse2[:, None])
    b_dp = _product(b_zero, b_do, grad, o_m, b_v, v, o_n, BO, BI, GRAD_FORM, FORM)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASKED:
        b_ds = tl.where((tl.arange(0, BI) < k.n - o_n)[None, :], b_ds, 0.0)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=FORM.PRECISION)


@_jit
def shunted_attention_bwd_kernel(
    p_q,  # (B, H, N, D)
    s_q_b,
    s_q_h,
    s_q_row,
    s_q_col,
    p_grad,  # (B, H, N, D), gradient of out
    s_grad_b,
    s_grad_h,
    s_grad_row,
    s_grad_col,
    p_stats,  # (2, B, H, N), contiguous: lse in base 2, delta
    p_dq,  # (B, H, N, D)
    s_dq_b,
    s_dq_h,
    s_dq_row,
    s_dq_col,
    p_partial,  # float32 workspace of the groups whose query loop is split
    keys,  # Strided, G of (B, H_g, N_g, D)
    values,
    dkeys,
    dvalues,
    groups,  # plan.Groups of G opaque numbers each
    splits,  # plan.Splits of G opaque numbers each
    segments,  # plan.Segments of S opaque numbers each, most work a program first
    n_heads,
    n_queries,
    n_stats,  # B * H * N
    scale,
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
    FORM: tl.constexpr = Form(D, BD, VEC, PRECISION, SLICE, INTERPRET)
    GRAD_FORM: tl.constexpr = Form(D, BD, GRAD_VEC, PRECISION, SLICE, INTERPRET)
    q = Strided(p_q, s_q_b, s_q_h, s_q_row, s_q_col)
    grad = Strided(p_grad, s_grad_b, s_grad_h, s_grad_row, s_grad_col)
    dq = Strided(p_dq, s_dq_b, s_dq_h, s_dq_row, s_dq_col)
    pid = tl.program_id(0)
    first = 0
    s = 0
    for i in tl.static_range(1, S):
        tiles = tl.cdiv(number(segments.rows[i - 1]), BO)
        end = first + tiles * number(segments.repeats[i - 1])
        past = (pid >= end) & (s == i - 1)
        s = tl.where(past, i, s)
        first = tl.where(past, end, first)
    pid -= first
    g = _pick_number(segments.groups, s, S)
    n_tiles = tl.cdiv(_pick_number(segments.rows, s, S), BO)
    o_tile = pid % n_tiles * BO
    pair = pid // n_tiles
    length = _pick_number(groups.lengths, g, G)
    n_group = _pick_number(groups.heads, g, G)
    scale2 = scale * _LOG2E
    # The softmax of a single key is constant: dQ and dK are zero, not the noise of dP - delta.
    scale_or_0 = tl.where(length == 1, 0.0, scale)
    if _pick_number(segments.kinds, s, S) == 1:
        if NEED_K or NEED_V:
            parts = _pick_number(splits.parts, g, G)
            part = pair % parts
            pair = pair // parts
            b = pair // n_group
            h_group = pair % n_group
            h = _pick_number(groups.first_heads, g, G) + h_group
            k = _head(keys, g, b, h_group, length, G)
            v = _head(values, g, b, h_group, length, G)
            q_head = _head_of(q, b, h, n_queries)
            grad_head = _head_of(grad, b, h, n_queries)
            p_lse2 = p_stats + (b.to(tl.int64) * n_heads + h) * n_queries
            p_delta = p_lse2 + n_stats
            b_k = _load(k, o_tile, BO, True, FORM)  # [BO, BD]
            b_v = _load(v, o_tile, BO, True, FORM)  # [BO, BD]
            b_dk = tl.zeros([BO, BD], tl.float32)
            b_dv = tl.zeros([BO, BD], tl.float32)
            rows = _pick_number(splits.rows, g, G)
            start = part * rows
            end = tl.minimum(start + rows, n_queries)
            full = start + (end - start) // BI * BI
            for o_m in tl.range(start, full, BI):
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, k, b_v, v, o_tile, q_head, grad_head, o_m, p_lse2, p_delta,
                    scale2, NEED_K, NEED_V, BO, BI, False, FORM, GRAD_FORM,
                )  # fmt: skip
            for o_m in tl.range(full, end, BI, num_stages=1):  # the last, partial block
                b_dk, b_dv = _dkdv_step(
                    b_dk, b_dv, b_k, k, b_v, v, o_tile, q_head, grad_head, o_m, p_lse2, p_delta,
                    scale2, NEED_K, NEED_V, BO, BI, True, FORM, GRAD_FORM,
                )  # fmt: skip
            b_dk *= scale_or_0
            if parts == 1:
                if NEED_K:  # noqa: SIM102
                    if _pick_number(splits.need_keys, g, G) == 1:
                        dk = _head(dkeys, g, b, h_group, length, G)
                        _store(dk, o_tile, b_dk, BO, FORM)
                if NEED_V:  # noqa: SIM102
                    if _pick_number(splits.need_values, g, G) == 1:
                        dv = _head(dvalues, g, b, h_group, length, G)
                        _store(dv, o_tile, b_dv, BO, FORM)
            else:
                size = _pick_number(splits.sizes, g, G).to(tl.int64)
                p_part = (
                    p_partial + _pick_number(splits.offsets, g, G).to(tl.int64) + 2 * part * size
                )
                p_part += pair.to(tl.int64) * length * D
                row = tl.full([], D, tl.int64)
                PART_VEC: tl.constexpr = 4 if D % 4 == 0 else 1
                PART_FORM: tl.constexpr = Form(D, BD, PART_VEC, PRECISION, SLICE, INTERPRET)
                if NEED_K:
                    _store(Head(p_part, row, 1, length), o_tile, b_dk, BO, PART_FORM)
                if NEED_V:
                    _store(Head(p_part + size, row, 1, length), o_tile, b_dv, BO, PART_FORM)
    else:
        if NEED_Q:
            b = pair // n_group
            h_group = pair % n_group
            h = _pick_number(groups.first_heads, g, G) + h_group
            k = _head(keys, g, b, h_group, length, G)
            v = _head(values, g, b, h_group, length, G)
            q_head = _head_of(q, b, h, n_queries)
            grad_head = _head_of(grad, b, h, n_queries)
            b_q = _load(q_head, o_tile, BO, True, FORM)  # [BO, BD]
            b_do = _load(grad_head, o_tile, BO, True, GRAD_FORM)  # [BO, BD]
            p_lse2 = p_stats + (b.to(tl.int64) * n_heads + h) * n_queries
            o_row = o_tile + tl.arange(0, BO)
            m_row = o_row < n_queries
            b_lse2 = tl.load(p_lse2 + o_row, mask=m_row, other=0.0)  # [BO]
            b_delta = tl.load(p_lse2 + n_stats + o_row, mask=m_row, other=0.0)  # [BO]
            b_dq = tl.zeros([BO, BD], tl.float32)
            full = length // BI * BI
            for o_n in tl.range(0, full, BI):
                b_dq = _dq_step(
                    b_dq, b_q, q_head, b_do, grad_head, o_tile, b_lse2, b_delta, k, v, o_n,
                    scale2, BO, BI, False, FORM, GRAD_FORM,
                )  # fmt: skip
            for o_n in tl.range(full, length, BI, num_stages=1):  # the last, partial block
                b_dq = _dq_step(
                    b_dq, b_q, q_head, b_do, grad_head, o_tile, b_lse2, b_delta, k, v, o_n,
                    scale2, BO, BI, True, FORM, GRAD_FORM,
                )  # fmt: skip
            dq_head = _head_of(dq, b, h, n_queries)
            _store(dq_head, o_tile, b_dq * scale_or_0, BO, FORM)


@_jit
def shunted_attention_bwd_reduce_kernel(
    p_partial,  # float32 workspace, (split, dK | dV, b, h, n, D) a group
    dkeys,  # Strided, G of (B, H_g, N_g, D)
    dvalues,
    groups,  # plan.Groups of G opaque numbers each
    splits,  # plan.Splits of G opaque numbers each
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the parts of dK (program_id(1) == 0) and dV in order.  Grid: (tiles of (b, h, n), 2)."""
    pid = tl.program_id(0)
    g = 0
    for i in tl.static_range(1, G):
        g = tl.where(pid >= number(splits.first_reduce[i]), i, g)
    o_first = (pid - _pick_number(splits.first_reduce, g, G)).to(tl.int64) * ROWS
    length = _pick_number(groups.lengths, g, G)
    n_group = _pick_number(groups.heads, g, G)
    size = _pick_number(splits.sizes, g, G).to(tl.int64)
    is_value = tl.program_id(1)
    need_key, need_value = (
        _pick_number(splits.need_keys, g, G),
        _pick_number(splits.need_values, g, G),
    )
    wanted = tl.where(is_value == 1, need_value, need_key)
    if wanted == 1:
        o_row = o_first + tl.arange(0, ROWS)  # over b, h, n
        o_col = tl.arange(0, BD)
        m_tile = (o_row * D < size)[:, None] & (o_col < D)[None, :]
        p_tile = p_partial + _pick_number(splits.offsets, g, G).to(tl.int64) + is_value * size
        p_tile = p_tile + o_row[:, None] * D + o_col[None, :]  # [ROWS, BD]
        b_sum = tl.zeros([ROWS, BD], tl.float32)
        for _ in range(_pick_number(splits.parts, g, G)):
            b_sum += tl.load(p_tile, mask=m_tile, other=0.0)
            p_tile += 2 * size
        b = o_row // (length * n_group)
        h = o_row // length % n_group
        n = o_row % length
        for kind in tl.static_range(2):
            if kind == is_value:
                if kind == 0:  # noqa: SIM108
                    head = _head(dkeys, g, b, h, n, G)
                else:
                    head = _head(dvalues, g, b, h, n, G)
                p_grad = (head.p + n * head.row)[:, None] + o_col[None, :] * head.col
                tl.store(p_grad, b_sum.to(p_grad.dtype.element_ty), mask=m_tile)
