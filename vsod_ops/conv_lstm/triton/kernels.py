"""The kernels: implicit matrix products over the taps of the convolutions.

What is computed is in ../reference.py.  P counts pixels, of all frames of a launch one after the
other; both factors of every product hold their channels side by side, so that a shift by a tap
moves whole rows and every copy into shared memory is 16 bytes wide and asynchronous, whatever the
shift.  For that, x is rearranged once for all steps (unless it lies so already), h of a step is
written a second time by the kernel that computes it, and gate gradients exist in no other order.
Channels are padded with zeros to multiples of 16.

forward   One launch a step.  A program owns BP pixels and all four gates of BM hidden channels: it
          walks over the taps of x, then over those of h, into one accumulator [BP, 4 * BM].  In
          the packed weights the gates alternate every 8 channels, which is how the accumulators
          of tensor cores lie in registers: taking the four gates apart moves nothing.  Peepholes,
          sigmoid, tanh, c and h follow at once, so sums of gates are never in memory.  A zero
          state skips the taps of h.
backward  One launch a step, last step first: the product of the next step's gate gradients with
          the transposed weights is dh; the gate gradients of this step are its epilogue.
          `recompute` runs the forward kernel before it, for one step's gates.  Then, over all
          steps at once: dx (the same product), the weight gradients of both convolutions in one
          launch, and the sums for bias and peepholes.  The last two split the pixels among
          programs; partial sums are added in a fixed order, so repeats are equal to the bit.

Names: p_ pointer, b_ block, o_ offset, m_ mask.  A pointer may be None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...triton_tuning import number

# Channels of a tile that go through the pointwise work at once; all of them would spill.
_PART = tl.constexpr(16)

_LOG2E = tl.constexpr(1.4426950216293335)  # the float32 next to log2(e) ..
_LOG2E_REST = tl.constexpr(1.9259629911e-08)  # .. and what it leaves
_LN2 = tl.constexpr(0.6931471805599453)


class Sizes(NamedTuple):
    """What a launch is about; kernels are compiled for what divides these."""

    hidden: Any  # M
    height: Any
    width: Any
    area: Any  # H * W
    dilation: Any
    CP: Any  # channels of x, padded
    MP: Any  # channels of h, padded


class At(NamedTuple):
    """Which step of a tensor that holds several: how many there are, and which one; opaque."""

    steps: Any
    step: Any


class Steps(NamedTuple):
    """Frames and steps of a launch, opaque."""

    frames: Any  # B
    now: At  # of x, out, gradients
    h: At
    c: At
    c_new: At
    gates: At


class Strided(NamedTuple):
    """A tensor (B, T, C, H, W), or None, and its strides."""

    p: Any
    b: Any
    t: Any
    c: Any
    y: Any
    x: Any


class Pixels(NamedTuple):
    """Pixels of a tile, [BP] each, inside a kernel."""

    frame: Any
    p: Any  # position in the frame
    y: Any
    x: Any
    m: Any  # whether there is one


class Planes(NamedTuple):
    """One step of a contiguous tensor (B, steps, channels, H, W), or of None."""

    p: Any
    at: At


class Rows(NamedTuple):
    """Rows of channels, one a pixel, or None: the pixels' own rows, and channels in each."""

    p: Any
    o_row: Any
    depth: Any


class Weights(NamedTuple):
    """Rows of packed weights: the offsets of a tile, and how far rows lie apart."""

    p: Any
    o_row: Any
    stride: Any


class Products(NamedTuple):
    """How taps are multiplied, all constants."""

    K: Any
    BK: Any
    PRECISION: Any
    INTERPRET: Any


class Peepholes(NamedTuple):
    """Weights (3, M) or, FULL, (3, M, H, W), or None."""

    p: Any
    FULL: Any


@triton.jit
def _exp(b_x):
    """e^x to 2 ulp: ex2.approx of the rounded product would be off by |x| ulp."""
    b_y = b_x * _LOG2E
    b_rest = tl.fma(b_x, _LOG2E, -b_y) + b_x * _LOG2E_REST
    return tl.exp2(b_y) * (1.0 + b_rest * _LN2)


@triton.jit
def _sigmoid(b_x):
    # e^128 is inf; infinite b_x would be NaN inside _exp.  Compared so that NaN stays NaN.
    b_x = tl.where(b_x > 128.0, 128.0, b_x)
    b_x = tl.where(b_x < -128.0, -128.0, b_x)
    return 1.0 / (1.0 + _exp(-b_x))


@triton.jit
def _tanh(b_x):
    b_abs = tl.abs(b_x)
    b_abs = tl.where(b_abs > 20.0, 20.0, b_abs)
    b_far = 1.0 - 2.0 / (1.0 + _exp(2.0 * b_abs))
    # Near 0 that cancels.  Minimax polynomial, 0.9 ulp up to 0.6.
    b_z = b_x * b_x
    b_p = -0.005895157811 * b_z + 0.0207959693
    b_p = b_p * b_z - 0.05378383026
    b_p = b_p * b_z + 0.1333192438
    b_p = b_p * b_z - 0.33333299
    b_near = b_x + b_x * (b_z * b_p)
    return tl.where(b_abs < 0.6, b_near, tl.where(b_x < 0.0, -b_far, b_far))


@triton.jit
def _load(p_tile, m_tile, INTERPRET: tl.constexpr):
    """A factor of a product, 0 outside of the mask."""
    b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    if INTERPRET:  # the interpreter multiplies bfloat16 as if it were integers
        b_tile = b_tile.to(tl.float32)
    return b_tile


@triton.jit
def _pixels(o_first, n_frames, size, BP: tl.constexpr):
    """BP pixels from o_first on, counted over all frames."""
    o_pixel = o_first + tl.arange(0, BP)
    o_frame = o_pixel // size.area
    o_p = o_pixel - o_frame * size.area
    o_y = o_p // size.width
    return Pixels(o_frame, o_p, o_y, o_p - o_y * size.width, o_pixel < n_frames * size.area)


@triton.jit
def _row(px, at, size):
    """Which row of (frame, steps, H * W) belongs to each pixel."""
    return (px.frame * number(at.steps) + number(at.step)) * size.area + px.p


@triton.jit
def _planes(px, at, o_m, n_channels, area):
    """Offsets [BP, BM] into (frame, steps, n_channels, H, W), contiguous."""
    o_frame = px.frame.to(tl.int64) * number(at.steps) + number(at.step)
    o_row = o_frame * n_channels * area + px.p
    return o_row[:, None] + (o_m.to(tl.int64) * area)[None, :]


@triton.jit
def _first_planes(px, o_m, n_channels, area):
    """Offsets [BP, BM] into (frame, n_channels, H, W), contiguous."""
    o_row = px.frame.to(tl.int64) * n_channels * area + px.p
    return o_row[:, None] + (o_m.to(tl.int64) * area)[None, :]


@triton.jit
def _taps(b_acc, x, h, weight, px, size, dilation, PRODUCTS: tl.constexpr):
    """b_acc + the convolutions of the Rows x and h, if given, in one loop.

    Rows of weights are (K * K, x.depth), then (K * K, h.depth).  A negative dilation gives the
    transposed convolution.
    """
    K: tl.constexpr = PRODUCTS.K
    BK: tl.constexpr = PRODUCTS.BK
    x_blocks = K * K * tl.cdiv(x.depth, BK)
    n_blocks = x_blocks
    if h.p is not None:
        n_blocks += K * K * tl.cdiv(h.depth, BK)
    o_weight = weight.o_row * weight.stride
    for i in tl.range(0, n_blocks):
        p_rows, o_row, depth, o_tap, block = x.p, x.o_row, x.depth, 0, i
        if h.p is not None:
            is_h = i >= x_blocks
            p_rows = tl.where(is_h, h.p, x.p)
            o_row = tl.where(is_h, h.o_row, x.o_row)
            depth = tl.where(is_h, h.depth, x.depth)
            o_tap = tl.where(is_h, K * K * x.depth, 0)
            block = tl.where(is_h, i - x_blocks, i)
        chunks = tl.cdiv(depth, BK)
        tap = block // chunks
        dy = (tap // K - K // 2) * dilation
        dx = (tap % K - K // 2) * dilation
        o_k = block % chunks * BK + tl.arange(0, BK)
        m_row = px.m & (px.y + dy >= 0) & (px.y + dy < size.height)
        m_row = m_row & (px.x + dx >= 0) & (px.x + dx < size.width)
        m_k = (o_k < depth)[None, :]
        o_shifted = (o_row + dy * size.width + dx).to(tl.int64)
        p_a = p_rows + o_shifted[:, None] * depth + o_k[None, :]
        b_a = _load(p_a, m_row[:, None] & m_k, PRODUCTS.INTERPRET)  # [BP, BK]
        p_b = weight.p + (o_tap + tap * depth) + (o_weight[:, None] + o_k[None, :])
        b_b = _load(p_b, m_k, PRODUCTS.INTERPRET)  # [BN, BK]
        b_acc = tl.dot(b_a, b_b.T, b_acc, input_precision=PRODUCTS.PRECISION)
    return b_acc


@triton.jit
def _peephole(peepholes, row, px, o_m, m_tile, size):
    """Peephole weights of row i, f or o, [BP, BM] or [1, BM]."""
    o_channel = (row * size.hidden + o_m)[None, :]
    if peepholes.FULL:
        p_tile = peepholes.p + o_channel.to(tl.int64) * size.area + px.p[:, None]
        b_weight = tl.load(p_tile, mask=m_tile, other=0.0)
    else:
        b_weight = tl.load(peepholes.p + o_channel, mask=o_m[None, :] < size.hidden, other=0.0)
    return b_weight.to(tl.float32)


@triton.jit
def _split(b_tile, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """A tile's 1, 2 or 4 parts, PART columns each; nothing moves."""
    if PARTS == 1:
        b_parts = (b_tile,)
    else:
        HALF: tl.constexpr = PART * PARTS // 2
        b_low, b_high = tl.split(tl.permute(tl.reshape(b_tile, [ROWS, 2, HALF]), [0, 2, 1]))
        if PARTS == 2:
            b_parts = (b_low, b_high)  # type: ignore[assignment]
        else:
            b_0, b_1 = tl.split(tl.permute(tl.reshape(b_low, [ROWS, 2, PART]), [0, 2, 1]))
            b_2, b_3 = tl.split(tl.permute(tl.reshape(b_high, [ROWS, 2, PART]), [0, 2, 1]))
            b_parts = (b_0, b_1, b_2, b_3)  # type: ignore[assignment]
    return b_parts


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


@triton.jit(do_not_specialize=["at"])
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
    at,  # Steps
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
    px = _pixels(tl.program_id(0) * BP, number(at.frames), size, BP)
    # Rows beyond the last are computed again, not masked: fewer registers.
    o_n = (tl.program_id(1) * (4 * BM) + tl.arange(0, 4 * BM)) % (4 * MP)
    b_acc = _taps(
        tl.zeros([BP, 4 * BM], tl.float32),
        Rows(p_x, _row(px, at.now, size), CP),
        Rows(p_h, _row(px, at.h, size), MP),
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
            Planes(p_c, at.c),
            p_bias,
            Peepholes(p_peephole, FULL),
            Planes(p_out, at.now),
            p_h_new,
            Planes(p_c_new, at.c_new),
            Planes(p_gates, at.gates),
            BP,
            _PART,
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
        o_grad = px.frame.to(tl.int64) * grad.b + number(dsums.at.step).to(tl.int64) * grad.t
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


@triton.jit(do_not_specialize=["at"])
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
    at,  # Steps
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
    px = _pixels(tl.program_id(0) * BP, number(at.frames), size, BP)
    b_dh = tl.zeros([BP, BM], tl.float32)
    if p_weight is not None:
        o_n = (tl.program_id(1) * BM + tl.arange(0, BM)) % size.hidden
        o_row = _row(px, at.now, size) + size.area
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
            Planes(p_dsums, at.now),
            grad,
            Planes(p_gates, at.gates),
            Planes(p_c, at.c),
            Planes(p_c_new, at.c_new),
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
