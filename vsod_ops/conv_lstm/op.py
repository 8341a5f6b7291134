"""The torch op: choice of backend, fake kernel, autograd.  Its schemas are in schemas.inc.

The op itself is a small Python kernel that picks a backend at run time, so that the choice is
never baked into a traced graph; for a call on a CPU that names none it is the compiled module's
(``conv_lstm.unnamed``).

The contract between forward and backward, which every backend keeps.  N is x's dtype, S the dtype
of the cell state (float32 for 16-bit N, else N).  All results are contiguous.

    forward(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save)
      x (B, T, C, H, W) N, T >= 1, any strides; h (B, M, H, W) N or None; c (B, M, H, W) S or None
      (zeros); weights, bias, peepholes N.  All but x contiguous.
      -> out    (B, T, M, H, W) N    h_1 .. h_T; the recurrence reads h as rounded here
         c_last (B, M, H, W) S       c_T
         cells  (B, T-1, M, H, W) S  c_1 .. c_{T-1};  (0,) with SAVE_NOTHING
         gates  (B, T, 4M, H, W) N   after sigmoid and tanh; (0,) unless SAVE_GATES.  A backend is
                                     free in how it orders this memory: only its own backward
                                     reads it.
    backward(grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
             out, c_last, cells, gates, dilation, needs)
      grad_out N, any strides, or None; grad_c S, contiguous, or None (zeros); gates (0,) where
      they are to be computed again; needs: seven bools, one a gradient.
      -> dx, dh, dc, dweight_ih, dweight_hh, dbias, dweight_peephole, each shaped like and in the
         dtype of its tensor, (0,) where not needed.  dweight_* sum over B, T, H and W in S and
         are rounded once.
"""

import torch
from torch import Tensor

from .. import backends, schemas, transforms
from ..backends import FLOATS, FLOATS_AND_DOUBLE, Backend
from . import reference

CUDA_CHANNELS = 32  # most input and hidden channels of the "cuda" backend

backends.register(
    "conv_lstm",
    Backend("cpu", FLOATS_AND_DOUBLE, "C++: AVX-512, AVX2 or portable"),
    Backend(
        *("cuda", FLOATS, "CUDA C++"),
        limits={"input channels": CUDA_CHANNELS, "hidden channels": CUDA_CHANNELS},
    ),
    Backend("triton", FLOATS, "Triton"),
    Backend("reference", FLOATS_AND_DOUBLE, "plain PyTorch"),
)


def choose(
    backend: str | None, device_type: str, dtype: torch.dtype, channels: int, hidden: int
) -> str:
    """The backend that runs a ConvLSTM from `channels` to `hidden` channels."""
    sizes = {"input channels": channels, "hidden channels": hidden}
    return backends.choose("conv_lstm", backend, device_type, dtype, sizes)


SAVE_NOTHING, SAVE_CELLS, SAVE_GATES = 0, 1, 2  # what forward keeps for the backward

_lib = schemas.library("conv_lstm")
conv_lstm = torch.ops.vsod_ops.conv_lstm.default
unnamed = torch.ops.vsod_ops.conv_lstm.unnamed
_backward_op = torch.ops.vsod_ops.conv_lstm_backward.default
_backward_unnamed = torch.ops.vsod_ops.conv_lstm_backward.unnamed


# Up to this many planes C + M, computing the gates again costs a CPU no more than writing them to
# fresh memory and reading them back (docs/conv_lstm.md).
_CPU_RECOMPUTES_UP_TO = 24


def what_to_save(x: Tensor, hidden: int, recompute: bool, backend: str | None) -> int:
    """What a forward that needs a backward keeps."""
    on_cpu = x.device.type == "cpu" and backend in (None, "cpu")
    if recompute or (on_cpu and x.shape[2] + hidden <= _CPU_RECOMPUTES_UP_TO):
        return SAVE_CELLS
    return SAVE_GATES


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state beside tensors of `dtype`."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def within(dilation: int, x: Tensor) -> int:
    """A dilation of the same taps: beyond the image they are all outside, however far."""
    return min(dilation, max(x.shape[-2:]))


def _forward(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save, backend=None):
    chosen = choose(backend, x.device.type, x.dtype, x.shape[2], weight_hh.shape[1])
    inputs = (x, *_contiguous(h, c, weight_ih, weight_hh, bias, weight_peephole))
    if x.shape[0] * x.shape[1] * x.shape[3] * x.shape[4] == 0:
        return _fake_forward(*inputs, dilation, save)
    dilation = within(dilation, x)
    if chosen == "cpu":
        return torch.ops.vsod_ops.conv_lstm_cpu(*inputs, dilation, save)
    if chosen == "cuda":
        return torch.ops.vsod_ops.conv_lstm_cuda(*inputs, dilation, save)
    if chosen == "triton":
        from .triton import launch

        return launch.forward(*inputs, dilation, save)
    return reference.forward(*inputs, dilation, save)


def _backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs, backend=None,
):  # fmt: skip
    chosen = choose(backend, x.device.type, x.dtype, x.shape[2], weight_hh.shape[1])
    inputs = (x, *_contiguous(h, c, weight_ih, weight_hh, bias, weight_peephole))
    kept = _contiguous(out, c_last, cells, gates)
    grads = (grad_out, *_contiguous(grad_c))
    if x.shape[0] * x.shape[1] * x.shape[3] * x.shape[4] == 0:
        empty = _fake_backward(*grads, *inputs, *kept, dilation, needs)
        return tuple(t.zero_() for t in empty)
    dilation = within(dilation, x)
    if chosen == "cuda":
        return torch.ops.vsod_ops.conv_lstm_backward_cuda(*grads, *inputs, *kept, dilation, needs)
    if chosen == "cpu":
        wide = torch.ops.vsod_ops.conv_lstm_backward_cpu(*grads, *inputs, *kept, dilation, needs)
        return tuple(
            g.to(t.dtype) if need else x.new_empty(0)
            for g, t, need in zip(wide, inputs, needs, strict=True)
        )
    if chosen == "triton":
        from .triton import launch

        return launch.backward(*grads, *inputs, *kept, dilation, needs)
    return reference.backward(*grads, *inputs, *kept, dilation, needs)


def _fake_forward(
    x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation, save, backend=None
):
    batch, steps, _, height, width = x.shape
    hidden = weight_hh.shape[1]
    dtype = state_dtype(x.dtype)
    return (
        x.new_empty((batch, steps, hidden, height, width)),
        x.new_empty((batch, hidden, height, width), dtype=dtype),
        x.new_empty(
            (batch, steps - 1, hidden, height, width) if save >= SAVE_CELLS else (0,), dtype=dtype
        ),
        x.new_empty((batch, steps, 4 * hidden, height, width) if save == SAVE_GATES else (0,)),
    )


def _fake_backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs, backend=None,
):  # fmt: skip
    tensors = (x, h, c, weight_ih, weight_hh, bias, weight_peephole)
    return tuple(
        t.new_empty(t.shape) if need else (x if t is None else t).new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    tensors, (ctx.dilation, _, *ctx.backend) = inputs[:7], inputs[7:]  # a name, or nothing
    out, c_last, cells, gates = output
    ctx.mark_non_differentiable(cells, gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, c_last, cells, gates)


def _autograd(ctx, grad_out, grad_c, _grad_cells, _grad_gates):
    *tensors, out, c_last, cells, gates = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    forward, backward = (conv_lstm, _backward_op) if ctx.backend else (unnamed, _backward_unnamed)
    if cells.dim() == 1:  # the op was called with SAVE_NOTHING
        cells = forward(*tensors, ctx.dilation, SAVE_CELLS, *ctx.backend)[2]
    grads = backward(
        grad_out, grad_c, *tensors, out, c_last, cells, gates, ctx.dilation, needs, *ctx.backend
    )
    wanted = (g if need else None for g, need in zip(grads, needs, strict=True))
    return *wanted, *(None for _ in ("dilation", "save", *ctx.backend))


class _ConvLSTM(torch.autograd.Function):
    """The same without the dispatcher's ways through Python, which cost more than small calls."""

    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = unnamed(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        with transforms.below_autograd():
            return _autograd(ctx, *grads)


def eager(*arguments):
    """`unnamed` for a call that is_eager()."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:7]):
        return _ConvLSTM.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return unnamed(*arguments)


def _double_backward(ctx, *grads):
    raise NotImplementedError("conv_lstm is differentiable once; there is no double backward")


for _op, _kernel, _fake, _gradient in (
    ("conv_lstm", _forward, _fake_forward, (_autograd, _setup_context)),
    ("conv_lstm_backward", _backward, _fake_backward, (_double_backward,)),
):
    for _name in (_op, f"{_op}.unnamed"):
        schemas.register(_lib, _name, _kernel, _fake)
        transforms.register_autograd(_lib, _name, *_gradient)
    for _backend in ("cpu", "cuda", "cuda_on_host"):
        transforms.register_autograd(_lib, f"{_op}_{_backend}")
