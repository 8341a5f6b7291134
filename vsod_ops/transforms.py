"""Where the kernels have no rule: forward-mode AD and the transforms of torch.func.

There the ops run their definition in plain PyTorch, which every transform sees through: right for
`jvp`, `jacfwd`, `grad`, `jacrev`, `hessian` and `vmap`, and as slow and large as eager code.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def applies(op: str, tensors: Iterable[Tensor | None], backend: str | None) -> bool:
    """Whether a call is under a transform, so that the definition has to run.

    Raises:
        NotImplementedError: a backend other than "reference" was named.
    """
    there = torch._C._functorch.peek_interpreter_stack() is not None
    if not there and not has_tangent(tensors):
        return False
    if backend not in (None, "reference"):
        raise NotImplementedError(
            f"{op}: backend {backend!r} has no rule for forward-mode AD and torch.func; with "
            "backend=None the definition runs there"
        )
    return True


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD goes through one of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


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
