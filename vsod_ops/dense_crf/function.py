"""The public function: argument checks and presets, then the torch op."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .. import transforms
from ..backends import check_name
from . import op

PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "dss": MappingProxyType(
            {
                "iterations": 5,
                "gaussian_sxy": 3,
                "gaussian_weight": 3,
                "bilateral_sxy": 60,
                "bilateral_srgb": 5,
                "bilateral_weight": 5,
            }
        ),
        "deeplab": MappingProxyType(
            {
                "iterations": 10,
                "gaussian_sxy": 3,
                "gaussian_weight": 3,
                "bilateral_sxy": 67,
                "bilateral_srgb": 3,
                "bilateral_weight": 4,
            }
        ),
    }
)

MAX_ITERATIONS = 1000
MAX_WEIGHT = 1e30  # its products with messages are float32
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_IMAGE_DTYPES = (*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dense_crf(
    prob: Tensor,
    image: Tensor,
    *,
    preset: str = "dss",
    iterations: int | None = None,
    gaussian_sxy: float | None = None,
    gaussian_weight: float | None = None,
    bilateral_sxy: float | None = None,
    bilateral_srgb: float | None = None,
    bilateral_weight: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean-field marginals of a fully connected CRF: masks that follow the edges of the image.

    Every pixel is joined to every other by two Gaussian kernels, one over positions (smoothness)
    and one over positions and colours (appearance), with Potts compatibility, symmetric
    normalisation and the unary ``-log(clip(prob, 1e-5, 1))``: the algorithm and the numbers of
    ``pydensecrf`` (``unary_from_softmax``, ``addPairwiseGaussian``, ``addPairwiseBilateral``,
    ``inference``).  Compiled backends filter on the permutohedral lattice, as it does.  Computed
    in float32, any strides, no gradient.  Source: Kraehenbuehl and Koltun 2011; Adams, Baek and
    Davis 2010 for the lattice.

    Args:
        prob: (B, H, W) foreground probability, or (B, L, H, W) probabilities of L >= 2 classes
            that sum to one; in [0, 1]; float32, float16, bfloat16 or float64.
        image: (B, 3, H, W) uint8, or any integer or float dtype with values in 0..255 (not 0..1).
        preset: "dss" (saliency papers) or "deeplab": the numbers for the arguments below that
            are not given.
        iterations: mean-field updates; 0 gives prob back.  dss 5, deeplab 10.
        gaussian_sxy: standard deviation of the smoothness kernel in pixels.  3, 3.
        gaussian_weight: its weight, 0 turns it off.  3, 3.
        bilateral_sxy: standard deviation of the appearance kernel in pixels.  60, 67.
        bilateral_srgb: its standard deviation in colour, on the scale 0..255.  5, 3.
        bilateral_weight: its weight, 0 turns it off.  5, 4.
        backend: "cpu", "cuda" or "reference" (brute force, small images); None takes the fastest
            that can run (``python -m vsod_ops.doctor`` says which).

    Returns:
        The marginals, float32, contiguous, shaped like prob.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        A map that is unsure of everything right of the middle, where the image is one colour:

        >>> image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> image[..., 4:] = 200
        >>> prob = torch.full((1, 8, 8), 0.1)
        >>> prob[..., 4:] = torch.tensor([0.9, 0.4, 0.9, 0.9])
        >>> (dense_crf(prob, image) > 0.5)[0, 0].tolist()
        [False, False, False, False, True, True, True, True]
    """
    if not isinstance(preset, str):
        raise TypeError(f"preset must be a string, got {type(preset).__name__}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {preset!r}")
    numbers = dict(PRESETS[preset])
    given = {
        "iterations": iterations,
        "gaussian_sxy": gaussian_sxy,
        "gaussian_weight": gaussian_weight,
        "bilateral_sxy": bilateral_sxy,
        "bilateral_srgb": bilateral_srgb,
        "bilateral_weight": bilateral_weight,
    }
    numbers |= {name: value for name, value in given.items() if value is not None}
    _check(prob, image)
    _check_numbers(numbers)
    if transforms.has_tangent((prob,)) or transforms.is_differentiated(prob):
        raise NotImplementedError(op.NO_GRADIENT)
    check_name(backend)
    widths = [float(numbers[name]) for name in list(given)[1:]]
    arguments = (prob, image, numbers["iterations"], *widths)
    try:
        return op.unnamed(*arguments) if backend is None else op.dense_crf(*arguments, backend)
    except RuntimeError:
        op.explain(*arguments)
        raise


def _check_numbers(numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if name == "iterations":
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"iterations must be an int, got {type(value).__name__}")
            if not 0 <= value <= MAX_ITERATIONS:
                raise ValueError(f"iterations must be from 0 to {MAX_ITERATIONS}, got {value}")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if math.isnan(value) or math.isinf(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name.endswith("_weight"):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            if value > MAX_WEIGHT:
                raise ValueError(f"{name} must be at most {MAX_WEIGHT:g}, got {value}")
        elif value <= 0:
            raise ValueError(f"{name} must be above zero, got {value}")


def _check(prob: Tensor, image: Tensor) -> None:
    for name, x in (("prob", prob), ("image", image)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if prob.dtype not in _FLOATS:
        raise TypeError(f"prob must be float32, float16, bfloat16 or float64, got {prob.dtype}")
    if image.dtype not in _IMAGE_DTYPES:
        raise TypeError(f"image must be uint8 or another real dtype, got {image.dtype}")
    if prob.dim() not in (3, 4):
        raise ValueError(f"prob must be (B, H, W) or (B, L, H, W), got shape {tuple(prob.shape)}")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"image must be (B, 3, H, W), got shape {tuple(image.shape)}")
    if image.device != prob.device:
        raise ValueError(f"image is on {image.device} but prob is on {prob.device}")
    if image.shape[0] != prob.shape[0]:
        raise ValueError(f"image has batch size {image.shape[0]} but prob has {prob.shape[0]}")
    if image.shape[2:] != prob.shape[-2:]:
        raise ValueError(
            f"image is {image.shape[2]}x{image.shape[3]} (H x W) "
            f"but prob is {prob.shape[-2]}x{prob.shape[-1]}"
        )
    if prob.dim() == 4 and prob.shape[1] < 2:
        raise ValueError(
            f"prob has {prob.shape[1]} classes and needs at least 2; "
            "a foreground probability is (B, H, W), without a class axis"
        )
