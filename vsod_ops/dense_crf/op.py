"""The torch op: checks of values, choice of backend, fake kernel; its schemas are in schemas.inc.

The op itself is a small Python kernel that looks at the values and picks a backend at run time,
so that neither is baked into a traced graph; for a call on a CPU that names none it is the compiled
module's (``dense_crf.unnamed``), which says the same of them.  Compiled backends are ops of their
own:

    dense_crf_cpu           prob float32 and image uint8 or float32, both contiguous; hash_capacity:
                            first size of the hash table, 0 for a guess from the size of the image
    dense_crf_cuda          the same tensors on a GPU
    dense_crf_cuda_on_host  its kernels in loops on the CPU, for tests; images_at_once: 0 for as
                            many as on a GPU; reverse: every loop from its end to its start
    dense_crf_fits          whether kernels can filter an image of this size with these deviations;
                            srgb None: positions alone
"""

import warnings

import torch
from torch import Tensor

from .. import backends, schemas, transforms
from ..backends import FLOATS_AND_DOUBLE, Backend
from . import reference

# Everything is computed in float32; the reference computes float64 prob in float64.
backends.register(
    "dense_crf",
    Backend("cpu", FLOATS_AND_DOUBLE, "C++: AVX-512, AVX2 or portable", backward=False),
    Backend("cuda", FLOATS_AND_DOUBLE, "CUDA C++", backward=False),
    Backend(
        *("reference", FLOATS_AND_DOUBLE, "plain PyTorch, all pairs of pixels"),
        backward=False,
        unnamed_limits={"pixels": reference.MAX_PIXELS},
    ),
)

_lib = schemas.library("dense_crf")
dense_crf = torch.ops.vsod_ops.dense_crf.default
unnamed = torch.ops.vsod_ops.dense_crf.unnamed


def _forward(prob: Tensor, image: Tensor, iterations: int, *arguments) -> Tensor:
    numbers, (backend,) = arguments[:5], arguments[5:] or (None,)
    pixels = prob.shape[-2] * prob.shape[-1] if iterations else 0  # none are looked at without
    chosen = backends.choose("dense_crf", backend, prob.device.type, prob.dtype, {"pixels": pixels})
    if prob.numel() == 0:
        return _fake(prob, image, iterations, *arguments)
    prob, image = _check_values(prob, image)
    _warn_of_scale(image)
    if iterations == 0:
        return prob.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if chosen == "reference":
        return reference.forward(prob, image, iterations, *numbers).float()
    prob = prob.to(torch.float32).contiguous()
    image = (image if image.dtype == torch.uint8 else image.to(torch.float32)).contiguous()
    if chosen == "cuda":
        return torch.ops.vsod_ops.dense_crf_cuda(prob, image, iterations, *numbers)
    return torch.ops.vsod_ops.dense_crf_cpu(prob, image, iterations, *numbers, 0)


def explain(
    prob: Tensor,
    image: Tensor,
    iterations: int,
    gaussian_sxy: float,
    gaussian_weight: float,
    bilateral_sxy: float,
    bilateral_srgb: float,
    bilateral_weight: float,
) -> None:
    """Raise ValueError if it is the values of a call that a compiled backend did not take."""
    if prob.numel() == 0:
        return
    _check_values(prob, image)
    if iterations == 0:
        return
    # Vertices of the lattice are 64-bit keys: widths far below a pixel need more.
    fits, size = torch.ops.vsod_ops.dense_crf_fits, image.shape[-2:]
    if gaussian_weight > 0 and not fits(*size, gaussian_sxy, None):
        reason = f"gaussian_sxy = {gaussian_sxy:g}"
    elif bilateral_weight > 0 and not fits(*size, bilateral_sxy, bilateral_srgb):
        reason = f"bilateral_sxy = {bilateral_sxy:g} with bilateral_srgb = {bilateral_srgb:g}"
    else:
        return
    raise ValueError(f"dense_crf: {reason} is too small for an image of this size")


# Resampling reaches values outside by rounding: this share of the range is clamped.
_ROUNDING = 1e-3


def _clamped(name: str, x: Tensor, top: int) -> Tensor:
    """x in 0..top, where it misses that by rounding at most."""
    low, high = (value.item() for value in x.aminmax())
    slack = _ROUNDING * top
    if not (low >= -slack and high <= top + slack):  # written so that NaN is caught
        raise ValueError(f"{name} must lie in 0..{top} without NaN, got {low:.9g} to {high:.9g}")
    return x if low >= 0 and high <= top else x.clamp(0, top)


def _check_values(prob: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """prob and image, with values that lie outside by rounding clamped."""
    prob = _clamped("prob", prob, 1)
    if prob.dim() == 4:
        total = prob.sum(1, dtype=torch.float32)
        error = (total - 1).abs().amax().item()
        # Classes rounded one by one to 16 bits miss one by more.
        if error > (1e-2 if prob.dtype.itemsize == 2 else 1e-3):
            raise ValueError(
                f"prob must sum to one over the classes (dim 1), but is off by up to {error:g}"
            )
    if image.dtype == torch.uint8:
        return prob, image
    return prob, _clamped("image", image, 255)


def _warn_of_scale(image: Tensor) -> None:
    if image.is_floating_point() and 0 < (high := image.amax().item()) <= 1:
        warnings.warn(
            f"dense_crf: image has values up to {high:g}, but its scale is 0..255: "
            "in 0..1 all colours are nearly the same to the CRF",
            stacklevel=2,
        )


def _fake(prob: Tensor, image: Tensor, *arguments) -> Tensor:
    return prob.new_empty(prob.shape, dtype=torch.float32)


NO_GRADIENT = "dense_crf has no gradient: it is post-processing; call it on prob.detach()"


def _no_gradient(ctx, grad):
    raise NotImplementedError(NO_GRADIENT)


for _name in ("dense_crf", "dense_crf.unnamed"):
    schemas.register(_lib, _name, _forward, _fake)
for _name in (
    *("dense_crf", "dense_crf.unnamed"),
    *("dense_crf_cpu", "dense_crf_cuda", "dense_crf_cuda_on_host"),
):
    transforms.register_autograd(_lib, _name, _no_gradient)
