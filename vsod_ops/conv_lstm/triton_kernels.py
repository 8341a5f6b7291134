"""ConvLSTM on GPUs: implicit matrix products over the taps of the convolutions.

What is computed is in reference.py.  P counts pixels, of all frames of a launch one after the
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

Tile sizes are timed once per shape class, batch and steps left out; the timing of a wave of
programs then says which tile suits another batch.  docs/conv_lstm.md has the figures.

Names: p_ pointer, b_ block, o_ offset, m_ mask; CP, MP channels of x and h, padded.  A tensor that
holds several steps comes with (its number of steps, which one).  A pointer may be None.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Channels lie in rows whose length is a multiple of this: whole 16-byte vectors of every dtype,
# and the smallest depth of a product.
_PAD = 16
# Tiles of the two memory-bound kernels: (pixels, channels).
_PACK_TILE = (64, 32)
_SUMS_TILE = (32, 16)

# Channels of a tile that go through the pointwise work at once; all of them would spill.
_PART = tl.constexpr(16)

_LOG2E = tl.constexpr(1.4426950216293335)  # the float32 next to log2(e) ..
_LOG2E_REST = tl.constexpr(1.9259629911e-08)  # .. and what it leaves
_LN2 = tl.constexpr(0.6931471805599453)


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
def _pixels(o_first, n_frames, area, width, BP: tl.constexpr):
    """Frame, position in the frame, row, column and mask of BP pixels, [BP] each."""
    o_pixel = o_first + tl.arange(0, BP)
    o_frame = o_pixel // area
    o_p = o_pixel - o_frame * area
    o_y = o_p // width
    return o_frame, o_p, o_y, o_p - o_y * width, o_pixel < n_frames * area


@triton.jit
def _planes(o_frame, steps, step, o_p, o_m, n_channels, area):
    """Offsets [BP, BM] into (frame, steps, n_channels, H, W), contiguous."""
    o_row = ((o_frame.to(tl.int64) * steps + step) * n_channels) * area + o_p
    return o_row[:, None] + (o_m.to(tl.int64) * area)[None, :]


@triton.jit
def _taps(
    b_acc, p_x, o_x_row, x_depth, p_h, o_h_row, h_depth, p_weight, s_weight, o_n, o_y, o_x,
    m_p, height, width, dilation, K: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """b_acc + the convolutions of x (rows of x_depth channels) and h, if given, in one loop.

    Rows of weights, s_weight apart, are (K * K, x_depth), then (K * K, h_depth).  A negative
    dilation gives the transposed convolution.
    """
    x_blocks = K * K * tl.cdiv(x_depth, BK)
    n_blocks = x_blocks
    if p_h is not None:
        n_blocks += K * K * tl.cdiv(h_depth, BK)
    o_weight = o_n * s_weight
    for i in tl.range(0, n_blocks):
        p_rows, o_row, depth, o_tap, block = p_x, o_x_row, x_depth, 0, i
        if p_h is not None:
            is_h = i >= x_blocks
            p_rows = tl.where(is_h, p_h, p_x)
            o_row = tl.where(is_h, o_h_row, o_x_row)
            depth = tl.where(is_h, h_depth, x_depth)
            o_tap = tl.where(is_h, K * K * x_depth, 0)
            block = tl.where(is_h, i - x_blocks, i)
        chunks = tl.cdiv(depth, BK)
        tap = block // chunks
        dy = (tap // K - K // 2) * dilation
        dx = (tap % K - K // 2) * dilation
        o_k = block % chunks * BK + tl.arange(0, BK)
        m_row = m_p & (o_y + dy >= 0) & (o_y + dy < height) & (o_x + dx >= 0) & (o_x + dx < width)
        m_k = (o_k < depth)[None, :]
        p_a = p_rows + (o_row + dy * width + dx).to(tl.int64)[:, None] * depth + o_k[None, :]
        b_a = _load(p_a, m_row[:, None] & m_k, INTERPRET)  # [BP, BK]
        p_b = p_weight + (o_tap + tap * depth) + (o_weight[:, None] + o_k[None, :])
        b_b = _load(p_b, m_k, INTERPRET)  # [BN, BK]
        b_acc = tl.dot(b_a, b_b.T, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def _peephole(p_peephole, row, o_p, o_m, m_tile, hidden, area, FULL: tl.constexpr):
    """Peephole weights of row i, f or o, [BP, BM] or [1, BM]."""
    o_channel = (row * hidden + o_m)[None, :]
    if FULL:
        p_tile = p_peephole + o_channel.to(tl.int64) * area + o_p[:, None]
        b_weight = tl.load(p_tile, mask=m_tile, other=0.0)
    else:
        b_weight = tl.load(p_peephole + o_channel, mask=o_m[None, :] < hidden, other=0.0)
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
    b_acc, o_frame, o_p, m_p, o_m, p_c, p_bias, p_peephole, p_out, p_h_new, p_c_new, p_gates,
    hidden, area, MP, steps, step, c_steps, c_step, c_new_steps, c_new_step, gate_steps,
    gate_step, FULL: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Everything after the sums b_acc [BP, BM / 8 * 4 * 8] of the channels o_m [BM]."""
    b_gates = tl.permute(tl.reshape(b_acc, [BP, BM // 8, 4, 8]), [0, 1, 3, 2])
    b_even, b_odd = tl.split(tl.reshape(b_gates, [BP, BM, 2, 2]))
    b_i, b_g = tl.split(b_even)  # [BP, BM] each
    b_f, b_o = tl.split(b_odd)
    m_m = (o_m < hidden)[None, :]
    m_tile = m_p[:, None] & m_m
    if p_bias is not None:
        b_i += tl.load(p_bias + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_f += tl.load(p_bias + hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_g += tl.load(p_bias + 2 * hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
        b_o += tl.load(p_bias + 3 * hidden + o_m[None, :], mask=m_m, other=0.0).to(tl.float32)
    if p_c is not None:
        o_c = _planes(o_frame, c_steps, c_step, o_p, o_m, hidden, area)
        b_c = tl.load(p_c + o_c, mask=m_tile, other=0.0)
        if p_peephole is not None:
            b_i += _peephole(p_peephole, 0, o_p, o_m, m_tile, hidden, area, FULL) * b_c
            b_f += _peephole(p_peephole, 1, o_p, o_m, m_tile, hidden, area, FULL) * b_c
    else:
        b_c = tl.zeros([BP, BM], tl.float32)
    b_i, b_f, b_g = _sigmoid(b_i), _sigmoid(b_f), _tanh(b_g)
    b_c = b_f * b_c + b_i * b_g
    if p_peephole is not None:
        b_o += _peephole(p_peephole, 2, o_p, o_m, m_tile, hidden, area, FULL) * b_c
    b_o = _sigmoid(b_o)

    if p_gates is not None:
        o_gate = _planes(o_frame, gate_steps, gate_step, o_p, o_m, 4 * hidden, area)
        tl.store(p_gates + o_gate, b_i, mask=m_tile)
        o_gate = _planes(o_frame, gate_steps, gate_step, o_p, o_m + hidden, 4 * hidden, area)
        tl.store(p_gates + o_gate, b_f, mask=m_tile)
        o_gate = _planes(o_frame, gate_steps, gate_step, o_p, o_m + 2 * hidden, 4 * hidden, area)
        tl.store(p_gates + o_gate, b_g, mask=m_tile)
        o_gate = _planes(o_frame, gate_steps, gate_step, o_p, o_m + 3 * hidden, 4 * hidden, area)
        tl.store(p_gates + o_gate, b_o, mask=m_tile)
    if p_out is not None:
        o_c = _planes(o_frame, c_new_steps, c_new_step, o_p, o_m, hidden, area)
        tl.store(p_c_new + o_c, b_c, mask=m_tile)
        b_h = b_o * _tanh(b_c)
        o_out = _planes(o_frame, steps, step, o_p, o_m, hidden, area)
        tl.store(p_out + o_out, b_h, mask=m_tile)
        if p_h_new is not None:
            o_h = ((o_frame * area + o_p).to(tl.int64) * MP)[:, None] + o_m[None, :]
            b_h = tl.where(m_m, b_h, 0.0)
            tl.store(p_h_new + o_h, b_h, mask=m_p[:, None] & (o_m < MP)[None, :])


_STEPS = ["steps", "step", "c_steps", "c_step", "c_new_steps", "c_new_step"]
_STEPS += ["gate_steps", "gate_step"]


@triton.jit(do_not_specialize=["n_frames", "h_steps", "h_step", *_STEPS])
def conv_lstm_fwd_kernel(
    p_x,  # (B, steps, H, W, CP)
    p_h,  # (B, h_steps, H, W, MP), h_{t-1}; None for zeros
    p_c,  # (B, c_steps, M, H, W), c_{t-1}; None for zeros
    p_weight,  # (MP / 8, 4, 8, K * K * CP + K * K * MP)
    p_bias,  # (4, M) or None
    p_peephole,  # (3, M), (3, M, H, W) or None
    p_out,  # (B, steps, M, H, W), h_t; None to compute the gates only
    p_h_new,  # (B, H, W, MP), h_t for the next step, or None
    p_c_new,  # (B, c_new_steps, M, H, W), c_t
    p_gates,  # (B, gate_steps, 4, M, H, W) or None
    n_frames,  # B
    hidden,  # M
    height,
    width,
    area,  # H * W
    dilation,
    CP,
    MP,
    steps,
    step,
    h_steps,
    h_step,
    c_steps,
    c_step,
    c_new_steps,
    c_new_step,
    gate_steps,
    gate_step,
    FULL: tl.constexpr,  # peepholes are (3, M, H, W)
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One step.  Grid: (ceil(B * H * W / BP), ceil(M / BM))."""
    o_frame, o_p, o_y, o_x, m_p = _pixels(tl.program_id(0) * BP, n_frames, area, width, BP)
    # Rows beyond the last are computed again, not masked: fewer registers.
    o_n = (tl.program_id(1) * (4 * BM) + tl.arange(0, 4 * BM)) % (4 * MP)
    b_acc = _taps(
        tl.zeros([BP, 4 * BM], tl.float32), p_x, (o_frame * steps + step) * area + o_p, CP,
        p_h, (o_frame * h_steps + h_step) * area + o_p, MP, p_weight, K * K * (CP + MP),
        o_n, o_y, o_x, m_p, height, width, dilation, K, BK, PRECISION, INTERPRET,
    )  # fmt: skip
    PARTS: tl.constexpr = BM // _PART
    b_parts = _split(b_acc, BP, 4 * _PART, PARTS)
    for part in tl.static_range(PARTS):
        o_m = tl.program_id(1) * BM + part * _PART + tl.arange(0, _PART)
        _fwd_tail(
            b_parts[part], o_frame, o_p, m_p, o_m, p_c, p_bias, p_peephole, p_out, p_h_new,
            p_c_new, p_gates, hidden, area, MP, steps, step, c_steps, c_step, c_new_steps,
            c_new_step, gate_steps, gate_step, FULL, BP, _PART,
        )  # fmt: skip


@triton.jit
def _bwd_tail(
    b_dh, o_frame, o_p, o_y, o_x, m_p, o_m, p_dsums, p_grad, p_gates, p_c, p_c_new, p_dc,
    p_dc_new, p_peephole, hidden, area, MP, steps, step, c_steps, c_step, c_new_steps,
    c_new_step, gate_steps, gate_step, s_grad_b, s_grad_t, s_grad_m, s_grad_y, s_grad_x,
    FULL: tl.constexpr,
):  # fmt: skip
    """Gate gradients from what h_t receives through the next step, b_dh [BP, BM]."""
    m_m = (o_m < hidden)[None, :]
    m_tile = m_p[:, None] & m_m
    b_dh = tl.where(m_tile, b_dh, 0.0)  # so that all that is written for padding is 0
    if p_grad is not None:
        o_grad = o_frame.to(tl.int64) * s_grad_b + tl.cast(step, tl.int64) * s_grad_t
        o_grad += o_y.to(tl.int64) * s_grad_y + o_x.to(tl.int64) * s_grad_x
        o_grad = o_grad[:, None] + (o_m.to(tl.int64) * s_grad_m)[None, :]
        b_dh += tl.load(p_grad + o_grad, mask=m_tile, other=0.0).to(tl.float32)
    p_gate = p_gates + _planes(o_frame, gate_steps, gate_step, o_p, o_m, 4 * hidden, area)
    s_gate = tl.cast(hidden, tl.int64) * area
    b_i = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_f = tl.load(p_gate + s_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_g = tl.load(p_gate + 2 * s_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_o = tl.load(p_gate + 3 * s_gate, mask=m_tile, other=0.0).to(tl.float32)
    o_c = _planes(o_frame, c_new_steps, c_new_step, o_p, o_m, hidden, area)
    b_tanh = _tanh(tl.load(p_c_new + o_c, mask=m_tile, other=0.0))
    b_do = b_dh * b_tanh * b_o * (1.0 - b_o)
    b_dc = b_dh * b_o * (1.0 - b_tanh * b_tanh)
    o_c = _planes(o_frame, 1, 0, o_p, o_m, hidden, area)
    if p_dc is not None:
        b_dc += tl.load(p_dc + o_c, mask=m_tile, other=0.0)
    if p_peephole is not None:
        b_dc += _peephole(p_peephole, 2, o_p, o_m, m_tile, hidden, area, FULL) * b_do
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_df = b_dc * b_f * (1.0 - b_f)
    if p_c is not None:
        p_before = p_c + _planes(o_frame, c_steps, c_step, o_p, o_m, hidden, area)
        b_df *= tl.load(p_before, mask=m_tile, other=0.0)
    else:
        b_df *= 0.0
    b_dc *= b_f
    if p_peephole is not None:
        b_dc += _peephole(p_peephole, 0, o_p, o_m, m_tile, hidden, area, FULL) * b_di
        b_dc += _peephole(p_peephole, 1, o_p, o_m, m_tile, hidden, area, FULL) * b_df
    tl.store(p_dc_new + o_c, b_dc, mask=m_tile)

    o_row = ((o_frame * steps + step) * area + o_p).to(tl.int64) * (4 * MP)
    p_row = p_dsums + o_row[:, None] + o_m[None, :]
    m_row = m_p[:, None] & (o_m < MP)[None, :]
    tl.store(p_row, b_di, mask=m_row)
    tl.store(p_row + MP, b_df, mask=m_row)
    tl.store(p_row + 2 * MP, b_dg, mask=m_row)
    tl.store(p_row + 3 * MP, b_do, mask=m_row)


@triton.jit(do_not_specialize=["n_frames", *_STEPS])
def conv_lstm_bwd_kernel(
    p_dsums,  # (B, steps, H, W, 4, MP), gradients of the sums: read at step + 1, written at step
    p_weight,  # (M, K * K, 4, MP), or None at the last step
    p_grad,  # (B, steps, M, H, W), gradient of out, or None
    p_gates,  # (B, gate_steps, 4, M, H, W)
    p_c,  # (B, c_steps, M, H, W), c_{t-1}; None for zeros
    p_c_new,  # (B, c_new_steps, M, H, W), c_t
    p_dc,  # (B, M, H, W), what c_t receives through the next step, or None
    p_dc_new,  # (B, M, H, W), the same for c_{t-1}
    p_peephole,  # (3, M), (3, M, H, W) or None
    n_frames,  # B
    hidden,  # M
    height,
    width,
    area,  # H * W
    dilation,
    MP,
    steps,
    step,
    c_steps,
    c_step,
    c_new_steps,
    c_new_step,
    gate_steps,
    gate_step,
    s_grad_b,
    s_grad_t,
    s_grad_m,
    s_grad_y,
    s_grad_x,
    FULL: tl.constexpr,  # peepholes are (3, M, H, W)
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One step.  Grid: (ceil(B * H * W / BP), ceil(M / BM))."""
    o_frame, o_p, o_y, o_x, m_p = _pixels(tl.program_id(0) * BP, n_frames, area, width, BP)
    b_dh = tl.zeros([BP, BM], tl.float32)
    if p_weight is not None:
        o_n = (tl.program_id(1) * BM + tl.arange(0, BM)) % hidden
        o_row = (o_frame * steps + step + 1) * area + o_p
        b_dh = _taps(
            b_dh, p_dsums, o_row, 4 * MP, None, o_row, 0, p_weight, K * K * 4 * MP, o_n,
            o_y, o_x, m_p, height, width, -dilation, K, BK, PRECISION, INTERPRET,
        )  # fmt: skip
    PARTS: tl.constexpr = BM // _PART
    b_parts = _split(b_dh, BP, _PART, PARTS)
    for part in tl.static_range(PARTS):
        o_m = tl.program_id(1) * BM + part * _PART + tl.arange(0, _PART)
        _bwd_tail(
            b_parts[part], o_frame, o_p, o_y, o_x, m_p, o_m, p_dsums, p_grad, p_gates, p_c,
            p_c_new, p_dc, p_dc_new, p_peephole, hidden, area, MP, steps, step, c_steps, c_step,
            c_new_steps, c_new_step, gate_steps, gate_step, s_grad_b, s_grad_t, s_grad_m,
            s_grad_y, s_grad_x, FULL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_frames", "steps"])
def conv_lstm_bwd_input_kernel(
    p_dsums,  # (n_frames, steps, H, W, 4, MP), of which step 0 is read
    p_weight,  # (n_channels, K * K, 4, MP)
    p_grad,  # (n_frames, n_channels, H, W), gradient of x or h
    n_frames,
    n_channels,
    height,
    width,
    area,  # H * W
    dilation,
    MP,
    steps,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (ceil(n_frames * H * W / BP), ceil(n_channels / BM))."""
    o_frame, o_p, o_y, o_x, m_p = _pixels(tl.program_id(0) * BP, n_frames, area, width, BP)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_row = o_frame * steps * area + o_p
    b_grad = _taps(
        tl.zeros([BP, BM], tl.float32), p_dsums, o_row, 4 * MP, None, o_row, 0, p_weight,
        K * K * 4 * MP, o_m % n_channels, o_y, o_x, m_p, height, width, -dilation, K, BK,
        PRECISION, INTERPRET,
    )  # fmt: skip
    o_grad = _planes(o_frame, 1, 0, o_p, o_m, n_channels, area)
    tl.store(p_grad + o_grad, b_grad, mask=m_p[:, None] & (o_m < n_channels)[None, :])


@triton.jit(do_not_specialize=["n_pixels"])
def conv_lstm_bwd_weight_kernel(
    p_dsums,  # (P, 4 * MP)
    p_x,  # (P, CP)
    p_h,  # (P, MP), h_{t-1}
    p_partial,  # (splits, 4 * MP, width_ih + width_hh) float32
    n_pixels,  # P = B * T * H * W
    height,
    width,
    area,  # H * W
    dilation,
    CP,
    MP,
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
    n_rows = 4 * MP
    row_tiles = tl.cdiv(n_rows, BM)
    o_m = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // row_tiles
    ih_tiles = tl.cdiv(width_ih, BN)
    is_h = tile >= ih_tiles
    p_rows = tl.where(is_h, p_h, p_x)
    depth = tl.where(is_h, MP, CP)
    n_columns = tl.where(is_h, width_hh, width_ih)
    o_n = tl.where(is_h, tile - ih_tiles, tile) * BN + tl.arange(0, BN)
    tap = o_n // depth
    dy = (tap // K - K // 2) * dilation
    dx = (tap % K - K // 2) * dilation
    o_column = (dy * width + dx).to(tl.int64) * depth + o_n % depth

    blocks = tl.cdiv(tl.cdiv(n_pixels, BP), tl.num_programs(1))
    o_first = tl.program_id(1) * blocks * BP
    b_acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(0, blocks):
        o_pixel = o_first + i * BP + tl.arange(0, BP)
        m_p = (o_pixel < n_pixels)[:, None]
        o_p = o_pixel % area
        o_y = (o_p // width)[:, None] + dy[None, :]
        o_x = (o_p % width)[:, None] + dx[None, :]
        m_n = m_p & (o_y >= 0) & (o_y < height) & (o_x >= 0) & (o_x < width)
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
    hidden,  # M
    area,  # H * W
    MP,
    steps,
    PEEPHOLE: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """Grid: (ceil(H * W / BP), ceil(MP / BM), splits).  Split s sums over the s-th frames."""
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
    p_planes,  # (B, steps, n_channels, H, W), any strides
    p_rows,  # (B, steps, H, W, depth), frames s_row_b and s_row_t rows apart
    n_channels,
    depth,
    width,
    area,  # H * W
    steps,
    s_b,
    s_t,
    s_c,
    s_y,
    s_x,
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
    o_pixel = (o_p // width).to(tl.int64) * s_y + (o_p % width).to(tl.int64) * s_x
    o_plane = (b * s_b + t * s_t + o_pixel)[:, None] + (o_c.to(tl.int64) * s_c)[None, :]
    b_tile = tl.load(p_planes + o_plane, mask=m_p & (o_c < n_channels)[None, :], other=0.0)
    o_row = (b * s_row_b + t * s_row_t + o_p) * depth
    tl.store(p_rows + o_row[:, None] + o_c[None, :], b_tile, mask=m_p & (o_c < depth)[None, :])


class _Tile(NamedTuple):
    pixels: int
    channels: int  # of every gate in the forward kernel; gate rows in the weight kernel
    depth: int  # of a block of the product; columns in the weight kernel
    warps: int
    stages: int


# (kernel, architecture, product) -> tiles worth timing.  None spills on its architecture:
# tests/test_conv_lstm_triton.py.
_TILES: dict[tuple[str, str, str], list[_Tile]] = {
    ("forward", "hopper", "half"): [
        _Tile(128, 64, 64, 8, 3),
        _Tile(128, 32, 64, 4, 3),
        _Tile(64, 32, 64, 4, 4),
        _Tile(64, 16, 64, 4, 4),
    ],
    ("forward", "ampere", "half"): [_Tile(128, 32, 32, 8, 3), _Tile(64, 32, 32, 4, 4)],
    ("forward", "any", "tf32"): [_Tile(128, 32, 32, 8, 3), _Tile(64, 16, 32, 4, 3)],
    ("forward", "any", "ieee"): [_Tile(64, 32, 16, 8, 2), _Tile(32, 16, 16, 4, 2)],
    ("backward", "hopper", "half"): [
        _Tile(128, 64, 64, 8, 4),
        _Tile(64, 64, 64, 4, 4),
        _Tile(64, 32, 64, 4, 4),
    ],
    ("backward", "ampere", "half"): [_Tile(128, 64, 32, 8, 3), _Tile(64, 64, 32, 4, 4)],
    ("backward", "any", "tf32"): [_Tile(128, 64, 32, 8, 3), _Tile(64, 32, 32, 4, 3)],
    ("backward", "any", "ieee"): [_Tile(64, 64, 16, 8, 2), _Tile(32, 32, 16, 4, 2)],
    ("weight", "hopper", "half"): [
        _Tile(64, 256, 128, 8, 3),
        _Tile(64, 128, 128, 8, 3),
        _Tile(64, 64, 64, 4, 4),
    ],
    ("weight", "ampere", "half"): [_Tile(32, 128, 128, 8, 3), _Tile(64, 64, 64, 4, 3)],
    ("weight", "any", "tf32"): [_Tile(32, 128, 64, 8, 3), _Tile(32, 64, 64, 4, 3)],
    ("weight", "any", "ieee"): [_Tile(16, 64, 64, 8, 2), _Tile(16, 64, 32, 4, 2)],
}


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


_INTERPRET = bool(triton.knobs.runtime.interpret)
_INTERPRETER_TILES = {
    "forward": _Tile(64, 16, 32, 4, 1),
    "backward": _Tile(64, 16, 64, 4, 1),
    "weight": _Tile(64, 64, 64, 4, 1),
}
# For the step of the backward that has no product.
_POINTWISE_TILE = _Tile(64, 32, 16, 4, 1)
# Per shape class: tile -> milliseconds a unit of its span.
_rates: dict[tuple, dict[_Tile, float]] = {}
_tuning = threading.Lock()


def admitted_tiles(
    kind: str, device: _Device, dtype: torch.dtype, precision: str, aligned: bool
) -> list[_Tile]:
    """The tiles worth timing for "forward", "backward" or "weight" on a device.

    aligned: frames are whole multiples of 16 pixels.
    """
    architecture, product = "any", precision
    if dtype != torch.float32:
        architecture, product = "hopper" if device.major in (9, 10) else "ampere", "half"
    tiles = _TILES[kind, architecture, product]

    def fits(tile: _Tile) -> bool:
        gates = 4 if kind == "forward" else 1
        if kind == "weight":
            block = tile.pixels * (tile.channels + tile.depth)
        else:
            block = tile.depth * (tile.pixels + tile.channels * gates)
        # Consumer chips have 99 kB of shared memory where others have 163 or 227.
        if tile.stages * block * dtype.itemsize >= device.shared:
            return False
        # Without wide accesses the forward kernel needs more registers for addresses.
        accumulators = gates * tile.pixels * tile.channels // (32 * tile.warps)
        return kind != "forward" or aligned or accumulators <= 64

    return [tile for tile in tiles if fits(tile)] or tiles[-1:]


def _choose(
    kind: str,
    x: Tensor,
    key: tuple,
    precision: str,
    aligned: bool,
    span: Callable[[_Tile], int],
    launch: Callable[[_Tile], object],
) -> _Tile:
    """The tile for a launch, timing all of them if its shape class is new.

    span gives how long a launch takes, up to a factor for the shape class and tile.  A launch may
    be repeated: no kernel overwrites what it reads.
    """
    if _INTERPRET:
        return _INTERPRETER_TILES[kind]
    tiles = admitted_tiles(kind, _device(x.device.index), x.dtype, precision, aligned)
    if len(tiles) == 1:
        return tiles[0]
    key = (kind, x.device.index, x.dtype, precision, aligned, *key)
    with _tuning:
        if key not in _rates:
            if torch.cuda.is_current_stream_capturing():
                return tiles[0]
            _rates[key] = {
                t: triton.testing.do_bench(lambda t=t: launch(t), warmup=5, rep=20) / span(t)
                for t in tiles
            }
    rates = _rates[key]
    return min(rates, key=lambda t: rates[t] * span(t))


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _padded(channels: int) -> int:
    return triton.cdiv(channels, _PAD) * _PAD


def _options(tile: _Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _pack(planes: Tensor, rows: Tensor) -> None:
    """planes (B, T, C, H, W), any strides, into rows (B, T, H * W, CP)."""
    batch, steps, channels, height, width = planes.shape
    depth = rows.shape[3]
    pixel_tile, channel_tile = _PACK_TILE
    tiles = triton.cdiv(height * width, pixel_tile)
    conv_lstm_pack_kernel[(batch * steps * tiles, triton.cdiv(depth, channel_tile))](
        *(planes, rows, channels, depth, width, height * width, steps, *planes.stride()),
        *(rows.stride(0) // depth, rows.stride(1) // depth),
        BP=pixel_tile,
        BC=channel_tile,
    )


def _as_rows(x: Tensor) -> Tensor:
    """x (B, T, C, H, W) as (B, T, H * W, CP): itself, if it lies so, or a copy."""
    batch, steps, channels, height, width = x.shape
    flat = x.permute(0, 1, 3, 4, 2)
    if channels % _PAD == 0 and flat.is_contiguous() and x.data_ptr() % 16 == 0:
        return flat.view(batch, steps, height * width, channels)
    rows = x.new_empty((batch, steps, height * width, _padded(channels)))
    _pack(x, rows)
    return rows


def _gates_apart(weight: Tensor, hidden: int, depth: int) -> Tensor:
    """(4M, C, k, k) as (4, MP, depth, k * k), padded with zeros."""
    weight = weight.view(4, hidden, weight.shape[1], -1)
    padding = (0, 0, 0, depth - weight.shape[2], 0, _padded(hidden) - hidden)
    return F.pad(weight, padding) if any(padding) else weight


def _forward_weights(weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
    """(MP / 8, 4, 8, K * K * CP + K * K * MP): the gates alternate every 8 channels."""
    hidden, taps = weight_hh.shape[1], weight_hh.shape[2] ** 2
    cp, mp = _padded(weight_ih.shape[1]), _padded(hidden)
    packed = weight_ih.new_empty((mp // 8, 4, 8, taps * (cp + mp)))
    parts = packed.split([taps * cp, taps * mp], 3)
    for part, weight, depth in zip(parts, (weight_ih, weight_hh), (cp, mp), strict=True):
        weight = _gates_apart(weight, hidden, depth).unflatten(1, (mp // 8, 8))
        part.unflatten(3, (taps, depth)).copy_(weight.permute(1, 0, 2, 4, 3))
    return packed


def _backward_weights(weight: Tensor, hidden: int) -> Tensor:
    """(C, K * K, 4, MP), for the transposed convolution."""
    return _gates_apart(weight, hidden, weight.shape[1]).permute(2, 3, 0, 1).contiguous()


class _Call:
    """What the launches of one forward or backward share."""

    def __init__(self, x: Tensor, weight_hh: Tensor, weight_peephole: Tensor | None, dilation: int):
        self.x = x
        self.batch, self.steps, self.channels, self.height, self.width = x.shape
        self.hidden, self.kernel = weight_hh.shape[1:3]
        self.area = self.height * self.width
        self.cp, self.mp = _padded(self.channels), _padded(self.hidden)
        self.pixels = self.batch * self.steps * self.area
        if self.pixels >= 2**31 - 2**10:  # pixels are counted in 32 bits, elements in 64
            raise ValueError(
                f"x has {self.pixels} pixels but backend 'triton' takes fewer than 2^31: feed the "
                "sequence in chunks and carry the state"
            )
        # From here on all taps but the middle one are outside, and larger numbers could wrap.
        self.dilation = min(dilation, max(self.height, self.width))
        # This one getter is right whichever of torch's three switches was set.
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.precision = "tf32" if tf32 and not _INTERPRET else "ieee"
        self.meta = {"K": self.kernel, "PRECISION": self.precision, "INTERPRET": _INTERPRET}
        self.full = weight_peephole is not None and weight_peephole.dim() == 4
        self.workers = _device(x.device.index).workers
        self.tiles: dict[tuple, _Tile] = {}

    def launch(self, kind, kernel, frames, channels, arguments, tile=None, **meta) -> None:
        """Launch a kernel whose programs are tiles of pixels by tiles of channels."""

        def grid(tile: _Tile) -> tuple[int, int]:
            pixels = frames * self.area
            return triton.cdiv(pixels, tile.pixels), triton.cdiv(channels, tile.channels)

        def launch(tile: _Tile) -> None:
            kernel[grid(tile)](
                *arguments,
                **(self.meta | meta),
                BP=tile.pixels,
                BM=tile.channels,
                BK=tile.depth,
                **_options(tile),
            )

        def span(tile: _Tile) -> int:
            return triton.cdiv(math.prod(grid(tile)), self.workers)

        if tile is None:
            tile = self.tiles.get((kernel, frames, channels))
            if tile is None:
                key = (kernel, channels, self.cp, self.mp, self.kernel, self.area.bit_length())
                tile = self.choose(kind, key, span, launch)
                self.tiles[kernel, frames, channels] = tile
        launch(tile)

    def choose(self, kind, key, span, launch) -> _Tile:
        return _choose(kind, self.x, key, self.precision, self.area % 16 == 0, span, launch)

    def step(self, step, x, h, c, weight, bias, weight_peephole, out, h_new, c_new, gates) -> None:
        """One step forward.  h, c, c_new and gates are (tensor or None, its steps, which)."""
        arguments = (
            *(x, h[0], c[0], weight, bias, weight_peephole, out, h_new, c_new[0], gates[0]),
            *(self.batch, self.hidden, self.height, self.width, self.area, self.dilation),
            *(self.cp, self.mp, self.steps, step, *h[1:], *c[1:], *c_new[1:], *gates[1:]),
        )
        self.launch(
            "forward", conv_lstm_fwd_kernel, self.batch, self.hidden, arguments, FULL=self.full
        )

    def weights(self, dsums: Tensor, x: Tensor | None, h: Tensor | None) -> list[Tensor]:
        """Gradients of weight_ih and weight_hh, float32; (0,) where x or h is None."""
        taps = self.kernel**2
        widths = [0 if x is None else taps * self.cp, 0 if h is None else taps * self.mp]
        rows = 4 * self.mp

        def grid(tile: _Tile) -> tuple[int, int]:
            columns = sum(triton.cdiv(width, tile.depth) for width in widths)
            tiles = columns * triton.cdiv(rows, tile.channels)
            most = triton.cdiv(self.pixels, 2 * tile.pixels)
            return tiles, min(triton.cdiv(2 * self.workers, tiles), most)

        def launch(tile: _Tile) -> Tensor:
            partial = dsums.new_empty((grid(tile)[1], rows, sum(widths)), dtype=torch.float32)
            conv_lstm_bwd_weight_kernel[grid(tile)](
                *(dsums, dsums if x is None else x, dsums if h is None else h, partial),
                *(self.pixels, self.height, self.width, self.area, self.dilation),
                *(self.cp, self.mp, *widths),
                **self.meta,
                BM=tile.channels,
                BN=tile.depth,
                BP=tile.pixels,
                **_options(tile),
            )
            return partial

        def span(tile: _Tile) -> int:
            tiles, splits = grid(tile)
            blocks = triton.cdiv(self.pixels, tile.pixels * splits)
            return triton.cdiv(tiles * splits, self.workers) * blocks

        key = (self.cp, self.mp, self.kernel, *map(bool, widths))
        tile = self.choose("weight", key, span, launch)
        total = launch(tile).sum(0).view(4, self.mp, -1)[:, : self.hidden].split(widths, 2)
        return [
            part.unflatten(2, (taps, -1))[..., :depth].transpose(2, 3) if width else part
            for part, width, depth in zip(total, widths, (self.channels, self.hidden), strict=True)
        ]

    def sums(self, dsums, c, cells, c_last, peephole: bool) -> tuple[Tensor, Tensor]:
        """Gradients of bias (4, M) and peepholes, float32."""
        frames = self.batch * self.steps
        pixel_tile, channel_tile = _SUMS_TILE
        tiles = triton.cdiv(self.area, pixel_tile), triton.cdiv(self.mp, channel_tile)
        splits = min(triton.cdiv(2 * self.workers, math.prod(tiles)), frames)
        partial = c_last.new_empty((splits, tiles[0], 7, self.mp))
        full = None
        if self.full and peephole:
            full = c_last.new_empty((splits, 3, self.hidden, self.height, self.width))
        grid = (*tiles, splits)
        conv_lstm_bwd_sums_kernel[grid](
            *(dsums, c, cells, c_last, partial, full, frames, self.hidden, self.area, self.mp),
            self.steps,
            PEEPHOLE=peephole,
            BP=pixel_tile,
            BM=channel_tile,
        )
        total = partial[:, :, : 7 if peephole else 4].sum((0, 1))[:, : self.hidden]
        return total[:4], total[4:] if full is None else full.sum(0)


def forward(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save):
    """Return out, c_last, cells, gates."""
    call = _Call(x, weight_hh, weight_peephole, dilation)
    batch, steps, hidden, mp = call.batch, call.steps, call.hidden, call.mp
    plane = (hidden, call.height, call.width)
    state = torch.float32
    out = x.new_empty((batch, steps, *plane))
    c_last = x.new_empty((batch, *plane), dtype=state)
    cells = x.new_empty((batch, steps - 1, *plane) if save else (0,), dtype=state)
    gates = x.new_empty((batch, steps, 4 * hidden, *plane[1:]) if save == 2 else (0,))
    with _on(x.device):
        x_rows = _as_rows(x)
        h_rows = None if h is None else _as_rows(h.unsqueeze(1))
        weight = _forward_weights(weight_ih, weight_hh)
        spare = None if save or steps == 1 else torch.empty_like(c_last)
        spare_rows = [x.new_empty((batch, 1, call.area, mp)) for _ in range(min(steps - 1, 2))]
        before = (c, 1, 0)
        for t in range(steps):
            if t == steps - 1:
                after = (c_last, 1, 0)
            elif save:
                after = (cells, steps - 1, t)
            else:  # c_last and spare in turn, so that the last step writes c_last
                after = ((spare, c_last)[(steps - t) % 2], 1, 0)
            new_rows = spare_rows[t % 2] if t < steps - 1 else None
            call.step(
                *(t, x_rows, (h_rows, 1, 0), before, weight, bias, weight_peephole),
                *(out, new_rows, after, (gates if save == 2 else None, steps, t)),
            )
            h_rows, before = new_rows, after
    return out, c_last, cells, gates


def backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs,
):  # fmt: skip
    """Return dx, dh, dc, dweight_ih, dweight_hh, dbias, dweight_peephole."""
    tensors = (x, h, c, weight_ih, weight_hh, bias, weight_peephole)
    grads = [
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    ]
    if not any(needs):
        return tuple(grads)
    call = _Call(x, weight_hh, weight_peephole, dilation)
    batch, steps, hidden, area, mp = call.batch, call.steps, call.hidden, call.area, call.mp
    recompute = gates.dim() == 1
    with _on(x.device):
        x_rows = _as_rows(x) if recompute or needs[3] else None
        h_rows = None
        if recompute or needs[4]:  # h_0 .. h_{T-1}
            h_rows = x.new_empty((batch, steps, area, mp))
            if steps > 1:
                _pack(out[:, :-1], h_rows[:, 1:])
            if h is None:
                h_rows[:, 0].zero_()
            else:
                _pack(h.unsqueeze(1), h_rows[:, :1])
        weight = _forward_weights(weight_ih, weight_hh) if recompute else None
        weight_back = _backward_weights(weight_hh, hidden) if steps > 1 or needs[1] else None
        if recompute:
            gates = x.new_empty((batch, 1, 4 * hidden, call.height, call.width))
        dsums = x.new_empty((batch, steps, area, 4 * mp))
        dc = grads[2] if needs[2] else torch.empty_like(c_last)
        spare = torch.empty_like(c_last) if steps > 1 else None
        dc_after = grad_c
        strides = (0,) * 5 if grad_out is None else grad_out.stride()
        for t in reversed(range(steps)):
            before = (cells, steps - 1, t - 1) if t else (c, 1, 0)
            after = (c_last, 1, 0) if t == steps - 1 else (cells, steps - 1, t)
            gates_t = (gates, 1, 0) if recompute else (gates, steps, t)
            if recompute:
                h_t = (h_rows, steps, t) if t or h is not None else (None, 1, 0)
                call.step(
                    *(t, x_rows, h_t, before, weight, bias, weight_peephole),
                    *(None, None, after, gates_t),
                )
            dc_before = (dc, spare)[t % 2]
            last = t == steps - 1
            call.launch(
                "backward",
                conv_lstm_bwd_kernel,
                batch,
                hidden,
                (
                    *(dsums, None if last else weight_back, grad_out, gates, before[0], after[0]),
                    *(dc_after, dc_before, weight_peephole, batch, hidden, call.height),
                    *(call.width, area, call.dilation, mp, steps, t, *before[1:], *after[1:]),
                    *(*gates_t[1:], *strides),
                ),
                tile=_POINTWISE_TILE if last else None,
                FULL=call.full,
            )
            dc_after = dc_before
        sizes = (call.height, call.width, area, call.dilation, mp)
        if needs[0]:
            call.launch(
                *("backward", conv_lstm_bwd_input_kernel, batch * steps, call.channels),
                (
                    *(dsums, _backward_weights(weight_ih, hidden), grads[0], batch * steps),
                    *(call.channels, *sizes, 1),
                ),
            )
        if needs[1]:
            call.launch(
                *("backward", conv_lstm_bwd_input_kernel, batch, hidden),
                (dsums, weight_back, grads[1], batch, hidden, *sizes, steps),
            )
        if needs[3] or needs[4]:
            sums = call.weights(dsums, x_rows if needs[3] else None, h_rows if needs[4] else None)
            for index, total in zip((3, 4), sums, strict=True):
                if needs[index]:
                    grads[index].view_as(total).copy_(total)
        if needs[5] or needs[6]:
            dbias, dpeephole = call.sums(dsums, c, cells, c_last, needs[6])
            if needs[5]:
                grads[5].view(4, hidden).copy_(dbias)
            if needs[6]:
                grads[6].copy_(dpeephole)
    return tuple(grads)
