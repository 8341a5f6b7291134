"""The torch op: choice of backend, fake kernel, autograd.  Its schemas are in schemas.inc.

The op itself is a small Python kernel that picks a backend at run time, so that the choice is
never baked into a traced graph; for a call on a CPU that names none it is the compiled module's
(``shunted_attention.unnamed``).  Compiled backends are ops of their own, with the same arguments.

lse is in the compute dtype (float64 for float64).  A gradient that is not needed comes back as a
tensor of shape (0,).  A Scalar stays a symbol where torch.compile traces a changing scale; a float
would be compiled in, but torch's stable ABI has no Scalar.  No scale is D ** -0.5, or every
head_dim would be compiled anew.
"""

import torch

from .. import backends, schemas, transforms
from ..backends import FLOATS, FLOATS_AND_DOUBLE, Backend
from . import reference

backends.register(
    "shunted_attention",
    Backend("cpu", FLOATS_AND_DOUBLE, "C++: AVX-512, AVX2 or portable"),
    Backend("triton", FLOATS, "Triton"),
    Backend("reference", FLOATS_AND_DOUBLE, "plain PyTorch, scores in memory"),
)

_lib = schemas.library("shunted_attention")
shunted_attention = torch.ops.vsod_ops.shunted_attention.default
unnamed = torch.ops.vsod_ops.shunted_attention.unnamed
layer = torch.ops.vsod_ops.shunted_attention_layer_cpu.default  # ShuntedAttention, no gradients
_backward_op = torch.ops.vsod_ops.shunted_attention_backward.default
_backward_unnamed = torch.ops.vsod_ops.shunted_attention_backward.unnamed


def choose(backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend that runs the op on such tensors."""
    return backends.choose("shunted_attention", backend, device_type, dtype)


def factor(q: torch.Tensor, scale: float | None) -> float:
    """Of the scores."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _forward(q, keys, values, scale, backend=None):
    chosen = choose(backend, q.device.type, q.dtype)
    if q.numel() == 0:
        return _fake_forward(q, keys, values, scale)
    scale = float(factor(q, scale))
    if chosen == "cpu":
        return torch.ops.vsod_ops.shunted_attention_cpu(q, keys, values, scale)
    if chosen == "triton":
        from .triton import launch

        return launch.forward(q, keys, values, scale)
    return reference.forward(q, keys, values, scale)


def _backward(
    grad_out, q, keys, values, out, lse, scale, need_q, need_keys, need_values, backend=None
):
    chosen = choose(backend, q.device.type, q.dtype)
    lse = lse.contiguous()  # a hook on saved tensors, or vmap, may give it other strides
    tensors = (grad_out, q, keys, values, out, lse, float(factor(q, scale)))
    needs = (need_q, need_keys, need_values)
    if q.numel() == 0:
        dq, dkeys, dvalues = _fake_backward(*tensors, *needs)
        return dq.zero_(), [g.zero_() for g in dkeys], [g.zero_() for g in dvalues]
    if chosen == "cpu":
        return torch.ops.vsod_ops.shunted_attention_backward_cpu(*tensors, *needs)
    if chosen == "triton":
        from .triton import launch

        return launch.backward(*tensors, *needs)
    dq, dkeys, dvalues = reference.backward(*tensors)
    return (
        dq if need_q else q.new_empty(0),
        [g if need else q.new_empty(0) for g, need in zip(dkeys, need_keys, strict=True)],
        [g if need else q.new_empty(0) for g, need in zip(dvalues, need_values, strict=True)],
    )


def _fake_forward(q, keys, values, scale, backend=None):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def _fake_backward(
    grad_out, q, keys, values, out, lse, scale, need_q, need_keys, need_values, backend=None
):
    def grad(x, need):
        return torch.empty_like(x) if need else x.new_empty(0)

    return (
        grad(q, need_q),
        [grad(k, need) for k, need in zip(keys, need_keys, strict=True)],
        [grad(v, need) for v, need in zip(values, need_values, strict=True)],
    )


def _setup_context(ctx, inputs, output):
    q, keys, values, ctx.scale, *ctx.backend = inputs  # a name, or nothing
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.groups = len(keys)
    ctx.save_for_backward(q, *keys, *values, out, lse)


def _gradients(backward, ctx, grad_out, need_q, need_keys, need_values, *backend):
    """What the needs ask for; None for the rest."""
    q, *key_values, out, lse = ctx.saved_tensors
    keys, values = key_values[: ctx.groups], key_values[ctx.groups :]
    dq, dkeys, dvalues = backward(
        *(grad_out, q, keys, values, out, lse, ctx.scale),
        *(need_q, need_keys, need_values, *backend),
    )

    def wanted(grads, needs):
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    return dq if need_q else None, wanted(dkeys, need_keys), wanted(dvalues, need_values)


def _autograd(ctx, grad_out, _grad_lse):
    backward = _backward_op if ctx.backend else _backward_unnamed
    need_q, need_keys, need_values = ctx.needs_input_grad[:3]
    grads = _gradients(
        backward, ctx, grad_out, need_q, list(need_keys), list(need_values), *ctx.backend
    )
    return *grads, *(None for _ in ("scale", *ctx.backend))


class _Attention(torch.autograd.Function):
    """The same without the dispatcher's ways through Python, which cost more than small calls."""

    @staticmethod
    def forward(ctx, scale, groups, q, *key_values):
        keys, values = key_values[:groups], key_values[groups:]
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = unnamed(q, keys, values, scale)
        ctx.scale, ctx.groups = scale, groups
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, *key_values, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):
        if grad_out is None:
            return (None,) * (3 + 2 * ctx.groups)
        need_q, *needs = transforms.asked_for(ctx)
        needs = needs[: ctx.groups], needs[ctx.groups :]
        with transforms.below_autograd():
            dq, dkeys, dvalues = _gradients(_backward_unnamed, ctx, grad_out, need_q, *needs)
        return None, None, dq, *dkeys, *dvalues


def eager(q, keys, values, scale):
    """(out, lse) of a call that names no backend, on the CPU, that is_eager()."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *keys, *values)):
        return _Attention.apply(scale, len(keys), q, *keys, *values)
    with torch._C._AutoDispatchBelowAutograd():
        return unnamed(q, keys, values, scale)


def _double_backward(ctx, *grads):
    raise NotImplementedError(
        "shunted_attention is differentiable once; there is no double backward"
    )


# ---- vmap: what it maps over becomes part of the batch


def _folded(size: int, x, dim):
    """(size * B, ...) from x (B, ...) with a mapped dimension `dim`, or None where all share x."""
    if isinstance(x, (list, tuple)):
        return [_folded(size, one, d) for one, d in zip(x, dim, strict=True)]
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _unfolded(size: int, x):
    """(size, B, ...) from (size * B, ...)."""
    if isinstance(x, (list, tuple)):
        return [_unfolded(size, one) for one in x]
    return x.unflatten(0, (size, x.shape[0] // size)) if x.dim() > 1 else x.expand(size, 0)


def _over_batch(op, tensor_count):
    """The vmap rule of an op whose first arguments are tensors."""

    def rule(info, in_dims, *arguments):
        tensors, rest = arguments[:tensor_count], arguments[tensor_count:]
        size = info.batch_size
        folded = [_folded(size, x, dim) for x, dim in zip(tensors, in_dims, strict=False)]
        results = tuple(_unfolded(size, x) for x in op(*folded, *rest))
        return results, tuple([0] * len(x) if isinstance(x, list) else 0 for x in results)

    return rule


for _op, _kernel, _fake, _tensors, _gradient in (
    ("shunted_attention", _forward, _fake_forward, 3, (_autograd, _setup_context)),
    ("shunted_attention_backward", _backward, _fake_backward, 6, (_double_backward,)),
):
    for _name in (_op, f"{_op}.unnamed"):
        _vmap = _over_batch(schemas.op(_name), _tensors)
        schemas.register(_lib, _name, _kernel, _fake, _vmap)
        transforms.register_autograd(_lib, _name, *_gradient)
    transforms.register_autograd(_lib, f"{_op}_cpu")
transforms.register_autograd(_lib, "shunted_attention_layer_cpu")
