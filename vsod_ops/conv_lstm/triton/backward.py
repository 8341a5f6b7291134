"""The backward kernels.

One launch a step, last step first: the product of the next step's gate gradients with the
transposed weights is dh; the gate gradients of this step are its epilogue.  `recompute` runs the
forward kernel before it, for one step's gates.  Then, over all steps at once: dx (the same
product), the weight gradients of both convolutions in one launch, and the sums for bias and
peepholes.  The last two split the pixels among programs; partial sums are added in a fixed order,
so repeats are equal to the bit.
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
    _first_planes,
    _load,
    _peephole,
    _pixels,
    _planes,
    _row,
    _split,
    _tanh,
    _taps,
)


@triton.jit
def _bwd_tail(
    b_dh,
    px,
    o_m,
    size,
    dsums,
    grad,
    gates,
    c,
    c_new,
    p_dc,
    p_dc_new,
    peepholes,
):
    """Gate gradients from what h_t receives through the next step, b_dh [BP, BM]."""
    hidden = size.hidden
    area = size.area
    MP = size.MP
    m_m = (o_m < hidden)[None, :]
    m_tile = px.m[:, None] & m_m
    b_dh = tl.where(m_tile, b_dh, 0.0)  # so that all that is written for padding is 0
    if grad.p is not None:
        o_grad = px.frame.to(tl.int64) * grad.b + tl.cast(dsums.at.step, tl.int64) * grad.t
        o_grad += px.y.to(tl.int64) * grad.y + px.x.to(tl.int64) * grad.x
        o_grad = o_grad[:, None] + (o_m.to(tl.int64) * grad.c)[None, :]
        b_dh += tl.load(grad.p + o_grad, mask=m_tile, other=0.0).to(tl.float32)
    p_gate = gates.p + _planes(px, gates.at, o_m, 4 * hidden, area)
    s_gate = tl.cast(hidden, tl.int64) * area
    b_i = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_f = tl.load(p_gate + s_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + 2 * s_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_o = tl.load(p_gate + 3 * s_gate, mask=m_tile, other=0.0).to(tl.float32)
    o_c = _planes(px, c_new.at, o_m, hidden, area)
    b_tanh = _tanh(tl.load(c_new.p + o_c, mask=m_tile, other=0.0))
    b_do = b_dh * b_tanh * b_o * (1.0 - b_o)
    b_dc = b_dh * b_o * (1.0 - b_tanh * b_tanh)
    o_c = _first_planes(px, o_m, hidden, area)
    if p_dc is not None:
        b_dc += tl.load(p_dc + o_c, mask=m_tile, other=0.0)
    if peepholes.p is not None:
        b_dc += _peephole(peepholes, 2, px, o_m, m_tile, size) * b_do
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_df = b_dc * b_f * (1.0 - b_f)
    if c.p is not None:
        p_before = c.p + _planes(px, c.at, o_m, hidden, area)
        b_df *= tl.load(p_before, mask=m_tile, other=0.0)
    else:
        b_df *= 0.0
    b_dc *= b_f
    if peepholes.p is not None:
        b_dc += _peephole(peepholes, 0, px, o_m, m_tile, size) * b_di
        b_dc += _peephole(peepholes, 1, px, o_m, m_tile, size) * b_df
    tl.store(p_dc_new + o_c, b_dc, mask=m_tile)

    o_row = _row(px, dsums.at, size).to(tl.int64) * (4 * MP)
    p_row = dsums.p + o_row[:, None] + o_m[None, :]
    m_row = px.m[:, None] & (o_m < MP)[None, :]
    tl.store(p_row, b_di, mask=m_row)
    tl.store(p_row + MP, b_df, mask=m_row)
    tl.store(p_row + 2 * MP, b_dg, mask=m_row)
    tl.store(p_row + 3 * MP, b_do, mask=m_row)


_STEPS = [f"{name}_{number}" for name in ("now", "c", "c_new", "gates") for number in At._fields]


@triton.jit(do_not_specialize=["n_frames", *_STEPS])
def conv_lstm_bwd_kernel(
    p_dsums,  # (B, steps, H, W, 4, MP), gradients of the sums: read at step + 1, written at step
    p_weight,  # (M, K * K, 4, MP), or None at the last step
    grad,  # Strided (B, steps, M, H, W), gradient of out, or None
    p_gates,  # (B, gate steps, 4, M, H, W)
    p_c,  # (B, c steps, M, H, W), c_{t-1}; None for zeros
    p_c_new,  # (B, c_new steps, M, H, W), c_t
    p_dc,  # (B, M, H, W), what c_t receives through the next step, or None
    p_dc_new,  # (B, M, H, W), the same for c_{t-1}
    p_peephole,  # (3, M), (3, M, H, W) or None
    size,  # Sizes
    n_frames,  # B
    now_steps,
    now_step,
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
    MP = size.MP
    now = At(now_steps, now_step)
    px = _pixels(tl.program_id(0) * BP, n_frames, size, BP)
    b_dh = tl.zeros([BP, BM], tl.float32)
    if p_weight is not None:
        o_n = (tl.program_id(1) * BM + tl.arange(0, BM)) % size.hidden
        o_row = _row(px, now, size) + size.area
        b_dh = _taps(
            b_dh,
            Rows(p_dsums, o_row, 4 * MP),
            Rows(None, o_row, 0),
            Weights(p_weight, o_n, K * K * 4 * MP),
            px,
            size,
            -size.dilation,
            PRODUCTS,
        )
    PARTS: tl.constexpr = BM // _PART
    b_parts = _split(b_dh, BP, _PART, PARTS)
    for part in tl.static_range(PARTS):
        o_m = tl.program_id(1) * BM + part * _PART + tl.arange(0, _PART)
        _bwd_tail(
            b_parts[part],
            px,
            o_m,
            size,
            Planes(p_dsums, now),
            grad,
            Planes(p_gates, At(gates_steps, gates_step)),
            Planes(p_c, At(c_steps, c_step)),
            Planes(p_c_new, At(c_new_steps, c_new_step)),
            p_dc,
            p_dc_new,
            Peepholes(p_peephole, FULL),
        )


@triton.jit(do_not_specialize=["n_frames", "steps"])
def conv_lstm_bwd_input_kernel(
    p_dsums,  # (n_frames, steps, H, W, 4, MP), of which step 0 is read
    p_weight,  # (n_channels, K * K, 4, MP)
    p_grad,  # (n_frames, n_channels, H, W), gradient of x or h
    n_frames,
    n_channels,
    size,  # Sizes
    steps,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (ceil(n_frames * H * W / BP), ceil(n_channels / BM))."""
    PRODUCTS: tl.constexpr = Products(K, BK, PRECISION, INTERPRET)
    px = _pixels(tl.program_id(0) * BP, n_frames, size, BP)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_row = px.frame * steps * size.area + px.p
    b_grad = _taps(
        tl.zeros([BP, BM], tl.float32),
        Rows(p_dsums, o_row, 4 * size.MP),
        Rows(None, o_row, 0),
        Weights(p_weight, o_m % n_channels, K * K * 4 * size.MP),
        px,
        size,
        -size.dilation,
        PRODUCTS,
    )
    o_grad = _first_planes(px, o_m, n_channels, size.area)
    tl.store(p_grad + o_grad, b_grad, mask=px.m[:, None] & (o_m < n_channels)[None, :])


@triton.jit(do_not_specialize=["n_pixels"])
def conv_lstm_bwd_weight_kernel(
    p_dsums,  # (P, 4 * MP)
    p_x,  # (P, CP)
    p_h,  # (P, MP), h_{t-1}
    p_partial,  # (splits, 4 * MP, width_ih + width_hh) float32
    n_pixels,  # P = B * T * H * W
    size,  # Sizes
    width_ih,  # K * K * CP, 0 where the gradient of weight_ih is not needed
    width_hh,  # K * K * MP, or 0
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """Grid: (column tiles * row tiles, splits); the columns are all (tap, channel) of x, then of h.

    Split s sums over the s-th range of pixels.
    """
    n_rows = 4 * size.MP
    row_tiles = tl.cdiv(n_rows, BM)
    o_m = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // row_tiles
    ih_tiles = tl.cdiv(width_ih, BN)
    is_h = tile >= ih_tiles
    p_rows = tl.where(is_h, p_h, p_x)
    depth = tl.where(is_h, size.MP, size.CP)
    n_columns = tl.where(is_h, width_hh, width_ih)
    o_n = tl.where(is_h, tile - ih_tiles, tile) * BN + tl.arange(0, BN)
    tap = o_n // depth
    dy = (tap // K - K // 2) * size.dilation
    dx = (tap % K - K // 2) * size.dilation
    o_column = (dy * size.width + dx).to(tl.int64) * depth + o_n % depth

    blocks = tl.cdiv(tl.cdiv(n_pixels, BP), tl.num_programs(1))
    o_first = tl.program_id(1) * blocks * BP
    b_acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(0, blocks):
        o_pixel = o_first + i * BP + tl.arange(0, BP)
        m_p = (o_pixel < n_pixels)[:, None]
        o_p = o_pixel % size.area
        o_y = (o_p // size.width)[:, None] + dy[None, :]
        o_x = (o_p % size.width)[:, None] + dx[None, :]
        m_n = m_p & (o_y >= 0) & (o_y < size.height) & (o_x >= 0) & (o_x < size.width)
        p_d = p_dsums + o_pixel.to(tl.int64)[None, :] * n_rows + o_m[:, None]
        m_d = (o_m < n_rows)[:, None] & (o_pixel < n_pixels)[None, :]
        b_d = _load(p_d, m_d, INTERPRET)  # [BM, BP]
        p_r = p_rows + o_pixel.to(tl.int64)[:, None] * depth + o_column[None, :]
        b_r = _load(p_r, m_n & (o_n < n_columns)[None, :], INTERPRET)  # [BP, BN]
        b_acc = tl.dot(b_d, b_r, b_acc, input_precision=PRECISION)

    o_row = (tl.program_id(1) * n_rows + o_m).to(tl.int64) * (width_ih + width_hh)
    p_tile = p_partial + o_row[:, None] + (tl.where(is_h, width_ih, 0) + o_n)[None, :]
    tl.store(p_tile, b_acc, mask=(o_m < n_rows)[:, None] & (o_n < n_columns)[None, :])


@triton.jit(do_not_specialize=["n_frames", "steps"])
def conv_lstm_bwd_sums_kernel(
    p_dsums,  # (B, steps, H, W, 4, MP)
    p_c,  # (B, M, H, W), c_0; None for zeros
    p_cells,  # (B, steps - 1, M, H, W), c_1 ..
    p_c_last,  # (B, M, H, W)
    p_sums,  # (splits, ceil(H * W / BP), 7, MP) float32: gradients of bias (4) and peepholes (3)
    p_full,  # (splits, 3, M, H, W) float32, gradients of peepholes a pixel, or None
    n_frames,  # B * steps
    size,  # Sizes
    steps,
    PEEPHOLE: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid: (ceil(H * W / BP), ceil(MP / BM), splits).  Split s sums over the s-th frames."""
    hidden, area, MP = size.hidden, size.area, size.MP
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_p = (o_p < area)[:, None]
    m_c = m_p & (o_m < hidden)[None, :]
    m_row = m_p & (o_m < MP)[None, :]
    o_c = o_p[:, None] + (o_m.to(tl.int64) * area)[None, :]
    b_i = tl.zeros([BP, BM], tl.float32)
    b_f, b_g, b_o, b_pi, b_pf, b_po = b_i, b_i, b_i, b_i, b_i, b_i
    frames = tl.cdiv(n_frames, tl.num_programs(2))
    first = tl.program_id(2) * frames
    for i in tl.range(first, tl.minimum(first + frames, n_frames)):
        frame = tl.cast(i, tl.int64)
        o_row = (frame * area + o_p) * (4 * MP)
        p_row = p_dsums + o_row[:, None] + o_m[None, :]
        b_di = tl.load(p_row, mask=m_row, other=0.0).to(tl.float32)  # [BP, BM]
        b_df = tl.load(p_row + MP, mask=m_row, other=0.0).to(tl.float32)
        b_do = tl.load(p_row + 3 * MP, mask=m_row, other=0.0).to(tl.float32)
        b_i += b_di
        b_f += b_df
        b_g += tl.load(p_row + 2 * MP, mask=m_row, other=0.0).to(tl.float32)
        b_o += b_do
        if PEEPHOLE:
            b = frame // steps
            t = frame % steps
            s_cells = b * (steps - 1) + t
            p_new = tl.where(t == steps - 1, p_c_last, p_cells)
            o_new = tl.where(t == steps - 1, b, s_cells) * hidden * area
            b_po += b_do * tl.load(p_new + o_new + o_c, mask=m_c, other=0.0)
            if p_c is not None:
                p_before = tl.where(t == 0, p_c, p_cells)
                n_before = hidden
            else:
                p_before = p_cells
                n_before = tl.where(t == 0, 0, hidden)
            m_before = m_p & (o_m < n_before)[None, :]
            o_before = tl.where(t == 0, b, s_cells - 1) * hidden * area
            b_c = tl.load(p_before + o_before + o_c, mask=m_before, other=0.0)
            b_pi += b_di * b_c
            b_pf += b_df * b_c
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    p_sum = p_sums + tile.to(tl.int64) * (7 * MP) + o_m
    m_m = o_m < MP
    tl.store(p_sum, tl.sum(b_i, 0), mask=m_m)
    tl.store(p_sum + MP, tl.sum(b_f, 0), mask=m_m)
    tl.store(p_sum + 2 * MP, tl.sum(b_g, 0), mask=m_m)
    tl.store(p_sum + 3 * MP, tl.sum(b_o, 0), mask=m_m)
    if p_full is not None:
        s_plane = tl.cast(hidden, tl.int64) * area
        p_plane = p_full + tl.program_id(2) * 3 * s_plane + o_c
        tl.store(p_plane, b_pi, mask=m_c)
        tl.store(p_plane + s_plane, b_pf, mask=m_c)
        tl.store(p_plane + 2 * s_plane, b_po, mask=m_c)
    elif PEEPHOLE:
        tl.store(p_sum + 4 * MP, tl.sum(b_pi, 0), mask=m_m)
        tl.store(p_sum + 5 * MP, tl.sum(b_pf, 0), mask=m_m)
        tl.store(p_sum + 6 * MP, tl.sum(b_po, 0), mask=m_m)
