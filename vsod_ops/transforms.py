"""Where the kernels have no rule: forward-mode AD and the transforms of torch.func.

There the ops run their definition in plain PyTorch, which every transform sees through: right for
`jvp`, `jacfwd`, `grad`, `jacrev`, `hessian` and `vmap`, and as slow and large as eager code.  Only
`vmap` of attention runs the kernels, on a larger batch.
"""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import schemas


def applies(op: str, tensors: Iterable[Tensor | None], backend: str | None) -> bool:
    """Whether a call is under a transform, so that the definition has to run.

    Raises:
        NotImplementedError: a backend other than "reference" was named.
    """
    # Not peek_interpreter_stack: torch.compile takes what that returns for an object, even None.
    if not torch._C._are_functorch_transforms_active() and not has_tangent(tensors):
        return False
    if backend not in (None, "reference"):
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no rule for forward-mode AD and torch.func; with "
            "backend=None the definition runs there"
        )
    return True


def only_vmap() -> bool:
    """Whether torch.func.vmap alone is active, perhaps several times."""
    # torch.compile cannot look at the stack; it has transforms run the definition.
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return all(one.key() == torch._C._functorch.TransformType.Vmap for one in stack)


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD goes through one of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def register_autograd(
    lib: torch.library.Library,
    name: str,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """torch.library.register_autograd, for an op that says that it has no forward-mode AD.

    PyTorch by itself drops the tangent of a dual tensor without a word.  An op without `backward`
    raises where a gradient goes through it.
    """
    kernel = make_autograd_impl(schemas.op(name), Info(backward, setup_context))

    def checked(keyset, *arguments):
        if has_tangent(x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)):
            raise NotImplementedError(
                f"vsod_ops::{name} has no rule for forward-mode AD; the public functions have one"
            )
        return kernel(keyset, *arguments)

    lib.impl(name, checked, "Autograd", with_keyset=True)


def is_eager() -> bool:
    """Whether nothing looks at a call but autograd: no compiler, tracer, transform or autocast."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
    )


def is_watched() -> bool:
    """Whether a dispatch mode sees every op: a counter of FLOPs, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


def asked_for(ctx) -> list[bool]:
    """For each tensor that went into a torch.autograd.Function, whether its gradient is needed.

    More than what requires it: torch.autograd.grad for one input asks for no other.  A leaf's
    counts as needed: in torch.autograd.grad torch answers for it with an error, which takes as long
    as a small call.
    """
    return [
        node is not None and (hasattr(node, "variable") or torch._C._will_engine_execute_node(node))
        for node, _ in ctx.next_functions
    ]


def below_autograd() -> contextlib.AbstractContextManager:
    """Inside, ops of a torch.autograd.Function go past autograd, unless somebody looks there."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def is_differentiated(x: Tensor) -> bool:
    """Whether torch.func takes a gradient through x."""
    # torch.compile cannot look into this call, and raises for a transform by itself.
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_gradtrackingtensor(x)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on such a device, None where it is off or there is none."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
