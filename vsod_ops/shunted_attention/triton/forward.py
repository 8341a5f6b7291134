"""The forward kernel: all head groups in one launch.

What is computed is in ../reference.py.  Scores never leave the chip: a program owns one tile of BO
query rows of one head and walks over that head's keys in blocks of BI with an online softmax in
base 2 (running maximum, running sum, float32).
"""

import triton
import triton.language as tl

from ...triton_tuning import number
from .tiles import (
    _LN2,
    _LOG2E,
    Form,
    Strided,
    _head,
    _head_of,
    _jit,
    _load,
    _pick_number,
    _product,
    _store,
)


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
