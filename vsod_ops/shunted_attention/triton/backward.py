"""The backward kernels: all head groups in one launch.

delta = rowsum(dO * out) first.  Then one launch whose programs are of two kinds: those that own a
tile of BO keys and walk over the queries (dK, dV; four products a block), and those that own a tile
of BO queries and walk over the keys (dQ; three products a block).  Recomputing P in both costs 7
products where 5 would do, and needs no atomics: every sum has a fixed order, so repeats are equal
to the bit.  Together the two kinds fill the machine: at N=3920 with two long and two short heads on
132 multiprocessors each kind alone keeps about half of it busy.

A group whose query loop is split writes partial sums to a float32 workspace, and a last small
launch adds them in order.
"""

import triton
import triton.language as tl

from ...triton_tuning import number
from .tiles import (
    _LOG2E,
    Form,
    Head,
    Strided,
    _head,
    _head_of,
    _jit,
    _load,
    _pick_length,
    _pick_number,
    _product,
    _store,
)


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
    length = _pick_length(groups.lengths, g, G)
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
    length = _pick_length(groups.lengths, g, G)
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
