"""The forward kernel, and the one that rearranges what it reads.

One launch a step.  A program owns BP pixels and all four gates of BM hidden channels: it walks over
the taps of x, then over those of h, into one accumulator [BP, 4 * BM].  In the packed weights the
gates alternate every 8 channels, which is how the accumulators of tensor cores lie in registers:
taking the four gates apart moves nothing.  Peepholes, sigmoid, tanh, c and h follow at once, so
sums of gates are never in memory.  A zero state skips the taps of h.
"""

import triton
import triton.language as tl

from .tiles import (
    _PART,
    At,
    Peepholes,
    Planes,
    Products,
    Rows,
    Weights,
    _peephole,
    _pixels,
    _planes,
    _row,
    _sigmoid,
    _split,
    _tanh,
    _taps,
)


@triton.jit
def _fwd_tail(
    b_acc,
    px,
    o_m,
    size,
    c,
    p_bias,
    peepholes,
    out,
    p_h_new,
    c_new,
    gates,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """Everything after the sums b_acc [BP, BM / 8 * 4 * 8] of the channels o_m [BM]."""
    hidden = size.hidden
    area = size.area
    b_gates = tl.permute(tl.reshape(b_acc, [BP, BM // 8, 4, 8]), [0, 1, 3, 2])
    b_even, b_odd = tl.split(tl.reshape(b_gates, [BP, BM, 2, 2]))
    b_i, b_g = tl.split(b_even)  # [BP, BM] each
    b_f, b_o = tl.split(b_odd)
    m_m = (o_m < hidden)[None, :]
    m_tile = px.m[:, None] & m_m
    if p_bias is not None:
        b_i += tl.load(p_bias + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_f += tl.load(p_bias + hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_g += tl.load(p_bias + 2 * hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_o += tl.load(p_bias + 3 * hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
    if c.p is not None:
        o_c = _planes(px, c.at, o_m, hidden, area)
        b_c = tl.load(c.p + o_c, mask=m_tile, other=0.0)
        if peepholes.p is not None:
            b_i += _peephole(peepholes, 0, px, o_m, m_tile, size) * b_c
            b_f += _peephole(peepholes, 1, px, o_m, m_tile, size) * b_c
    else:
        b_c = tl.zeros([BP, BM], tl.float32)
    b_i, b_f, b_g = _sigmoid(b_i), _sigmoid(b_f), _tanh(b_g)
    b_c = b_f * b_c + b_i * b_g
    if peepholes.p is not None:
        b_o += _peephole(peepholes, 2, px, o_m, m_tile, size) * b_c
    b_o = _sigmoid(b_o)

    if gates.p is not None:
        o_gate = _planes(px, gates.at, o_m, 4 * hidden, area)
        tl.store(gates.p + o_gate, b_i, mask=m_tile)
        o_gate = _planes(px, gates.at, o_m + hidden, 4 * hidden, area)
        tl.store(gates.p + o_gate, b_f, mask=m_tile)
        o_gate = _planes(px, gates.at, o_m + 2 * hidden, 4 * hidden, area)
        tl.store(gates.p + o_gate, b_g, mask=m_tile)
        o_gate = _planes(px, gates.at, o_m + 3 * hidden, 4 * hidden, area)
        tl.store(gates.p + o_gate, b_o, mask=m_tile)
    if out.p is not None:
        o_c = _planes(px, c_new.at, o_m, hidden, area)
        tl.store(c_new.p + o_c, b_c, mask=m_tile)
        b_h = b_o * _tanh(b_c)
        o_out = _planes(px, out.at, o_m, hidden, area)
        tl.store(out.p + o_out, b_h, mask=m_tile)
        if p_h_new is not None:
            o_h = ((px.frame * area + px.p).to(tl.int64) * size.MP)[:, None] + o_m[None, :]
            b_h = tl.where(m_m, b_h, 0.0)
            tl.store(p_h_new + o_h, b_h, mask=px.m[:, None] & (o_m < size.MP)[None, :])


_STEPS = [
    f"{name}_{number}" for name in ("now", "h", "c", "c_new", "gates") for number in At._fields
]


@triton.jit(do_not_specialize=["n_frames", *_STEPS])
def conv_lstm_fwd_kernel(
    p_x,  # (B, steps, H, W, CP)
    p_h,  # (B, h steps, H, W, MP), h_{t-1}; None for zeros
    p_c,  # (B, c steps, M, H, W), c_{t-1}; None for zeros
    p_weight,  # (MP / 8, 4, 8, K * K * CP + K * K * MP)
    p_bias,  # (4, M) or None
    p_peephole,  # (3, M), (3, M, H, W) or None
    p_out,  # (B, steps, M, H, W), h_t; None to compute the gates only
    p_h_new,  # (B, H, W, MP), h_t for the next step, or None
    p_c_new,  # (B, c_new steps, M, H, W), c_t
    p_gates,  # (B, gate steps, 4, M, H, W) or None
    size,  # Sizes
    n_frames,  # B
    now_steps,
    now_step,
    h_steps,
    h_step,
    c_steps,
    c_step,
    c_new_steps,
    c_new_step,
    gates_steps,
    gates_step,
    FULL: tl.constexpr,  # peepholes are (3, M, H, W)
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One step.  Grid: (ceil(B * H * W / BP), ceil(M / BM))."""
    PRODUCTS: tl.constexpr = Products(K, BK, PRECISION, INTERPRET)
    CP, MP = size.CP, size.MP
    now = At(now_steps, now_step)
    px = _pixels(tl.program_id(0) * BP, n_frames, size, BP)
    # Rows beyond the last are computed again, not masked: fewer registers.
    o_n = (tl.program_id(1) * (4 * BM) + tl.arange(0, 4 * BM)) % (4 * MP)
    b_acc = _taps(
        tl.zeros([BP, 4 * BM], tl.float32),
        Rows(p_x, _row(px, now, size), CP),
        Rows(p_h, _row(px, At(h_steps, h_step), size), MP),
        Weights(p_weight, o_n, K * K * (CP + MP)),
        px,
        size,
        size.dilation,
        PRODUCTS,
    )
    PARTS: tl.constexpr = BM // _PART
    b_parts = _split(b_acc, BP, 4 * _PART, PARTS)
    for part in tl.static_range(PARTS):
        o_m = tl.program_id(1) * BM + part * _PART + tl.arange(0, _PART)
        _fwd_tail(
            b_parts[part],
            px,
            o_m,
            size,
            Planes(p_c, At(c_steps, c_step)),
            p_bias,
            Peepholes(p_peephole, FULL),
            Planes(p_out, now),
            p_h_new,
            Planes(p_c_new, At(c_new_steps, c_new_step)),
            Planes(p_gates, At(gates_steps, gates_step)),
            BP,
            _PART,
        )


@triton.jit(do_not_specialize=["steps", "s_row_b", "s_row_t"])
def conv_lstm_pack_kernel(
    planes,  # Strided (B, steps, n_channels, H, W)
    p_rows,  # (B, steps, H, W, depth), frames s_row_b and s_row_t rows apart
    n_channels,
    depth,
    width,
    area,  # H * W
    steps,
    s_row_b,
    s_row_t,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Channels side by side, padded with zeros.  Grid: (B * steps * ceil(H * W / BP), channels)."""
    tiles = tl.cdiv(area, BP)
    frame = (tl.program_id(0) // tiles).to(tl.int64)
    b = frame // steps
    t = frame % steps
    o_p = tl.program_id(0) % tiles * BP + tl.arange(0, BP)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_p = (o_p < area)[:, None]
    o_pixel = (o_p // width).to(tl.int64) * planes.y + (o_p % width).to(tl.int64) * planes.x
    o_plane = (b * planes.b + t * planes.t + o_pixel)[:, None] + (o_c.to(tl.int64) * planes.c)[
        None, :
    ]
    b_tile = tl.load(planes.p + o_plane, mask=m_p & (o_c < n_channels)[None, :], other=0.0)
    o_row = (b * s_row_b + t * s_row_t + o_p) * depth
    tl.store(p_rows + o_row[:, None] + o_c[None, :], b_tile, mask=m_p & (o_c < depth)[None, :])
