"""What the kernels of both directions share: implicit matrix products over the taps.

What is computed is in ../reference.py.  P counts pixels, of all frames of a launch one after the
other; both factors of every product hold their channels side by side, so that a shift by a tap
moves whole rows and every copy into shared memory is 16 bytes wide and asynchronous, whatever the
shift.  For that, x is rearranged once for all steps (unless it lies so already), h of a step is
written a second time by the kernel that computes it, and gate gradients exist in no other order.
Channels are padded with zeros to multiples of 16.

Names: p_ pointer, b_ block, o_ offset, m_ mask.  A pointer may be None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

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
    """Which step of a tensor that holds several: how many there are, and which one.

    Kernels take both numbers as arguments of their own, which they are not compiled for; hidden in
    a tuple they would stay in registers across the products, and spill.
    """

    steps: Any
    step: Any


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
    return (px.frame * at.steps + at.step) * size.area + px.p


@triton.jit
def _planes(px, at, o_m, n_channels, area):
    """Offsets [BP, BM] into (frame, steps, n_channels, H, W), contiguous."""
    o_frame = px.frame.to(tl.int64) * at.steps + at.step
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
