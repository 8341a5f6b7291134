"""The public functions: argument checks and autocast, then the torch op."""

import torch
from torch import Tensor

from .. import transforms
from ..backends import check_name
from . import op, reference

State = tuple[Tensor, Tensor]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def conv_lstm(
    x: Tensor,
    state: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_peephole: Tensor | None = None,
    *,
    dilation: int = 1,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Convolutional LSTM over a sequence of feature maps (Shi et al. 2015).

    With ``*`` a 'same' zero-padded convolution and gates in the order i, f, g, o::

        i, f, g, o = weight_ih * x_t + weight_hh * h_{t-1} + bias
        i, f += peephole_i, peephole_f times c_{t-1}      (weight_peephole only)
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        o += peephole_o times c_t                         (weight_peephole only)
        h_t = sigmoid(o) tanh(c_t)

    Any strides.  Differentiable once in every tensor; forward-mode AD and ``torch.func`` run the
    definition.  A sequence fed in chunks, with the state carried over, gives the same result as fed
    whole.  x and h are never concatenated; without gradients the gates are never in memory.

    Args:
        x: (B, T, C, H, W) float32, float16, bfloat16 or float64; T from 0, C from 1.
        state: (h, c), each (B, M, H, W), or None for zeros.  h is in x's dtype; c in x's dtype or,
            for a 16-bit x, in float32.
        weight_ih: (4M, C, k, k), k odd; x's dtype and device, as all tensors below.
        weight_hh: (4M, M, k, k).
        bias: (4M,).
        weight_peephole: (3, M), one weight a channel, or (3, M, H, W), one a pixel too; rows i,
            f, o.
        dilation: of both convolutions.
        recompute: keep only h and c for the backward, which computes the gates again.  A CPU
            does so anyway for few channels, where it is no slower.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the fastest that can run
            (``python -m vsod_ops.doctor`` says which).

    Returns:
        out (B, T, M, H, W), all h_t, in x's dtype; and the state (h_T, c_T), each (B, M, H, W).
        h_T is a view of out.  c_T is float32 for a 16-bit x, since rounding it between chunks
        would make them differ from the whole; under autocast it therefore stays float32.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        From 3 to 8 channels, four steps, then two more from the state that they left:

        >>> weight_ih, weight_hh = torch.randn(32, 3, 3, 3), torch.randn(32, 8, 3, 3)
        >>> x = torch.randn(1, 6, 3, 16, 16)
        >>> out, state = conv_lstm(x[:, :4], None, weight_ih, weight_hh)
        >>> out.shape, state[1].shape
        (torch.Size([1, 4, 8, 16, 16]), torch.Size([1, 8, 16, 16]))
        >>> rest, state = conv_lstm(x[:, 4:], state, weight_ih, weight_hh)
        >>> rest.shape
        torch.Size([1, 2, 8, 16, 16])
    """
    _check_tensor("x", x, 5, "(B, T, C, H, W)")
    return _conv_lstm(
        x, state, weight_ih, weight_hh, bias, weight_peephole, dilation, recompute, backend
    )


def conv_lstm_cell(
    x: Tensor,
    state: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    weight_peephole: Tensor | None = None,
    *,
    dilation: int = 1,
    recompute: bool = False,
    backend: str | None = None,
) -> State:
    """One step of :func:`conv_lstm`: x is (B, C, H, W), the result is the new state (h, c).

    Example:
        >>> weight_ih, weight_hh = torch.randn(32, 3, 3, 3), torch.randn(32, 8, 3, 3)
        >>> h, c = conv_lstm_cell(torch.randn(1, 3, 16, 16), None, weight_ih, weight_hh)
        >>> h, c = conv_lstm_cell(torch.randn(1, 3, 16, 16), (h, c), weight_ih, weight_hh)
        >>> h.shape
        torch.Size([1, 8, 16, 16])
    """
    _check_tensor("x", x, 4, "(B, C, H, W)")
    _, state = _conv_lstm(
        *(x.unsqueeze(1), state, weight_ih, weight_hh, bias, weight_peephole),
        *(dilation, recompute, backend),
    )
    return state


def _conv_lstm(x, state, weight_ih, weight_hh, bias, weight_peephole, dilation, recompute, backend):
    dtype = transforms.autocast_dtype(x.device.type)
    autocast = dtype is not None and x.dtype != torch.float64
    _check(x, state, weight_ih, weight_hh, bias, weight_peephole, autocast)
    if not isinstance(dilation, int) or isinstance(dilation, bool):
        raise TypeError(f"dilation must be an int, got {type(dilation).__name__}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if dilation >= 2**63:
        raise ValueError(f"dilation must be below 2**63, got {dilation}")
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {type(recompute).__name__}")
    check_name(backend)

    h, c = (None, None) if state is None else state
    tensors = [x, h, weight_ih, weight_hh, bias, weight_peephole]
    if autocast:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    x, h, weight_ih, weight_hh, bias, weight_peephole = tensors
    state_dtype = op.state_dtype(x.dtype)
    if c is not None:
        c = c.to(state_dtype)
    batch, steps, _, height, width = x.shape
    if steps == 0:
        shape = (batch, weight_hh.shape[1], height, width)
        # Copies: who writes into the state that comes back does not mean the one that went in.
        h = x.new_zeros(shape) if h is None else h.clone()
        c = x.new_zeros(shape, dtype=state_dtype) if c is None else c.clone()
        return x.new_empty((batch, 0, *shape[1:])), (h, c)

    if transforms.applies("conv_lstm", (*tensors, c), backend):
        out, c_last, _, _ = reference.forward(
            *(x, h, c, weight_ih, weight_hh, bias, weight_peephole),
            *(op.within(dilation, x), op.SAVE_NOTHING),
        )
        return out, (out[:, -1], c_last)
    save = op.SAVE_NOTHING
    # An exported program keeps nothing, or its T could not be 2: a tensor of T - 1 steps would have
    # a dimension of 1, which torch.export takes for a constant.
    needs_grad = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if needs_grad and any(t is not None and t.requires_grad for t in (*tensors, c)):
        save = op.what_to_save(x, weight_hh.shape[1], recompute, backend)
    arguments = (x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save)
    if backend is not None:
        out, c_last, _, _ = op.conv_lstm(*arguments, backend)
    elif transforms.is_eager():
        out, c_last, _, _ = op.eager(*arguments)
    else:
        out, c_last, _, _ = op.unnamed(*arguments)
    return out, (out[:, -1], c_last)


def _check(x, state, weight_ih, weight_hh, bias, weight_peephole, autocast) -> None:
    batch, _, channels, height, width = x.shape
    _check_tensor("weight_ih", weight_ih, 4, "(4M, C, k, k)")
    _check_tensor("weight_hh", weight_hh, 4, "(4M, M, k, k)")
    gates, hidden, kernel, _ = weight_hh.shape
    if hidden == 0 or gates != 4 * hidden:
        raise ValueError(
            f"weight_hh must be (4M, M, k, k) with M >= 1, got shape {tuple(weight_hh.shape)}"
        )
    if kernel % 2 == 0:
        raise ValueError(f"weight_hh has an even kernel, {kernel}; 'same' padding needs an odd one")
    if channels == 0:
        raise ValueError("x has no channels")
    _check_shape("weight_hh", weight_hh, (gates, hidden, kernel, kernel), "(4M, M, k, k)")
    _check_shape("weight_ih", weight_ih, (gates, channels, kernel, kernel), "(4M, C, k, k)")
    tensors = {"weight_ih": weight_ih, "weight_hh": weight_hh}
    if bias is not None:
        _check_tensor("bias", bias, 1, "(4M,)")
        _check_shape("bias", bias, (gates,), "(4M,)")
        tensors["bias"] = bias
    if weight_peephole is not None:
        shape: tuple[int, ...]
        if isinstance(weight_peephole, Tensor) and weight_peephole.dim() == 4:
            form, shape = "(3, M, H, W)", (3, hidden, height, width)
        else:
            form, shape = "(3, M)", (3, hidden)
        _check_tensor("weight_peephole", weight_peephole, len(shape), "(3, M) or (3, M, H, W)")
        _check_shape("weight_peephole", weight_peephole, shape, form)
        tensors["weight_peephole"] = weight_peephole
    if state is not None:
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError("state must be None or a pair (h, c) of tensors")
        for name, t in zip(("state[0]", "state[1]"), state, strict=True):
            _check_tensor(name, t, 4, "(B, M, H, W)")
            _check_shape(name, t, (batch, hidden, height, width), "(B, M, H, W)")
            tensors[name] = t
    for name, t in tensors.items():
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
        wide_cell = name == "state[1]" and t.dtype == op.state_dtype(x.dtype)
        casts = autocast and t.dtype != torch.float64  # which autocast leaves alone
        if t.dtype != x.dtype and not casts and not wide_cell:
            raise TypeError(f"{name} is {t.dtype} but x is {x.dtype}")


def _check_tensor(name: str, x: Tensor, dims: int, form: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() != dims:
        raise ValueError(f"{name} must be {form}, got shape {tuple(x.shape)}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], form: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {form} = {shape}, got shape {tuple(x.shape)}")
