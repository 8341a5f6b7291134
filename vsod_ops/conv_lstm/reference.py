"""ConvLSTM in plain PyTorch: the definition that every kernel is tested against.

Arguments and results are those of the contract in op.py.  Everything is computed in the dtype of
the cell state (float32 for 16-bit input), weight gradients in float64; h is rounded to x's dtype
between steps, as `out` is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def _wide(x, like: Tensor):
    """x (or None) in the dtype of the cell state beside `like`."""
    return None if x is None else x.to(torch.float32 if like.dtype.itemsize == 2 else like.dtype)


def _peepholes(weight_peephole: Tensor | None, like: Tensor) -> list[Tensor | float]:
    """Peephole weights i, f, o that broadcast over (B, M, H, W)."""
    if weight_peephole is None:
        return [0.0, 0.0, 0.0]
    wide = _wide(weight_peephole, like)
    return list(wide if wide.dim() == 4 else wide[:, :, None, None])


def _zeros(x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape, dtype=_wide(like[:0], like).dtype) if x is None else _wide(x, like)


def _activated(x_t, h, c, weight_ih, weight_hh, bias, peepholes, dilation):
    """Gates i, f, g, o after sigmoid and tanh, and the new cell state."""
    p_i, p_f, p_o = peepholes
    padding = dilation * (weight_ih.shape[-1] // 2)
    sums = F.conv2d(x_t, weight_ih, bias, padding=padding, dilation=dilation)
    sums = sums + F.conv2d(h, weight_hh, padding=padding, dilation=dilation)
    i, f, g, o = sums.chunk(4, 1)
    i, f, g = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid(), g.tanh()
    new_c = f * c + i * g
    return i, f, g, (o + p_o * new_c).sigmoid(), new_c


def forward(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save):
    """Return out, c_last, cells, gates."""
    batch, steps, _, height, width = x.shape
    shape = (batch, weight_hh.shape[1], height, width)
    h, c = _zeros(h, shape, x), _zeros(c, shape, x)
    w_ih, w_hh, b = (_wide(t, x) for t in (weight_ih, weight_hh, bias))
    peepholes = _peepholes(weight_peephole, x)
    out, cells, gates = [], [], []
    for t in range(steps):
        *ifgo, c = _activated(_wide(x[:, t], x), h, c, w_ih, w_hh, b, peepholes, dilation)
        out.append((ifgo[3] * c.tanh()).to(x.dtype))
        h = _wide(out[-1], x)
        cells.append(c)
        if save == 2:
            gates.append(torch.cat(ifgo, 1).to(x.dtype))
    kept = c.new_empty((batch, 0, *shape[1:]) if save else 0)
    if save and steps > 1:
        kept = torch.stack(cells[:-1], 1).contiguous()
    return (
        torch.stack(out, 1).contiguous(),
        c.clone(memory_format=torch.contiguous_format),
        kept,
        torch.stack(gates, 1).contiguous() if save == 2 else x.new_empty(0),
    )


def backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs,
):  # fmt: skip
    """Return dx, dh, dc, dweight_ih, dweight_hh, dbias, dweight_peephole."""
    batch, steps, channels, height, width = x.shape
    hidden = weight_hh.shape[1]
    shape = (batch, hidden, height, width)
    h_0, c_0 = _zeros(h, shape, x), _zeros(c, shape, x)
    w_ih, w_hh, b = (_wide(t, x) for t in (weight_ih, weight_hh, bias))
    peepholes = p_i, p_f, p_o = _peepholes(weight_peephole, x)
    padding = dilation * (weight_ih.shape[-1] // 2)
    options = {"padding": padding, "dilation": dilation}
    h_before = torch.cat([h_0[:, None], _wide(out[:, :-1], x)], 1)  # (B, T, M, H, W)

    dh, dc = torch.zeros_like(h_0), _zeros(grad_c, shape, x)
    dgates, dpeephole = [], 0.0
    for t in reversed(range(steps)):
        c_t = c_last if t == steps - 1 else cells[:, t]
        c_before = c_0 if t == 0 else cells[:, t - 1]
        if gates.dim() == 1:
            i, f, g, o, _ = _activated(
                _wide(x[:, t], x), h_before[:, t], c_before, w_ih, w_hh, b, peepholes, dilation
            )
        else:
            i, f, g, o = _wide(gates[:, t], x).chunk(4, 1)
        if grad_out is not None:
            dh = dh + _wide(grad_out[:, t], x)
        tanh_c = c_t.tanh()
        do = dh * tanh_c * o * (1 - o)
        dc = dc + dh * o * (1 - tanh_c.square()) + p_o * do
        di, df, dg = dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g.square())
        if needs[6]:
            dpeephole = dpeephole + torch.stack([di * c_before, df * c_before, do * c_t])
        dc = dc * f + p_i * di + p_f * df
        dgates.append(torch.cat([di, df, dg, do], 1))
        dh = conv2d_input(shape, w_hh, dgates[-1], **options)
    dgates = torch.stack(dgates[::-1], 1).flatten(0, 1)  # (B T, 4M, H, W)

    def result(index, like, compute):
        if not needs[index]:
            return (x if like is None else like).new_empty(0)
        return compute().to(like.dtype).contiguous()

    frames = (batch * steps, channels, height, width)
    # Weight gradients sum over every pixel of every step: in float64, so that rounding stays small.
    return (
        result(0, x, lambda: conv2d_input(frames, w_ih, dgates, **options).view(x.shape)),
        result(1, h, lambda: dh),
        result(2, c, lambda: dc.clone()),
        result(3, weight_ih, lambda: conv2d_weight(
            x.reshape(frames).double(), weight_ih.shape, dgates.double(), **options)),
        result(4, weight_hh, lambda: conv2d_weight(
            h_before.flatten(0, 1).double(), weight_hh.shape, dgates.double(), **options)),
        result(5, bias, lambda: dgates.sum((0, 2, 3))),
        result(6, weight_peephole, lambda: dpeephole.sum(
            1 if weight_peephole.dim() == 4 else (1, 3, 4))),
    )  # fmt: skip
