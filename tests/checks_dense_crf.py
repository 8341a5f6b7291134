"""Images, rivals and checks of dense_crf, for the tests of every backend."""

import os

import pytest
import torch
from checks import nan_filled_memory

from benchmarks import dense_crf as rivals
from vsod_ops import dense_crf
from vsod_ops.dense_crf import PRESETS

DSS = PRESETS["dss"]
NUMBERS = [float(DSS[name]) for name in list(DSS)[1:]]
OTHER_NUMBERS = {
    "iterations": 3,
    "gaussian_sxy": 1.5,
    "gaussian_weight": 2.0,
    "bilateral_sxy": 17,
    "bilateral_srgb": 1,
    "bilateral_weight": 6.5,
}
SIZES = ((97, 61), (64, 64), (1, 50), (37, 1), (7, 9), (1, 1))


# ---- images and maps of them


def scene(batch, height, width, *, classes=0, seed=0):
    """A bright ellipse on a shaded background with grain, and a coarse map of it."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    centre = torch.rand(batch, 2, 1, 1, generator=generator) - 0.5
    distance = ((y - centre[:, 0]) ** 2 + 2 * (x - centre[:, 1]) ** 2).sqrt()
    inside = (distance < 0.5).float()
    shade = 60 + 40 * y + 20 * x
    image = torch.stack([shade + 100 * inside, shade + 40 * inside, 1.5 * shade - 20 * inside], 1)
    image = image + 6 * torch.randn(image.shape, generator=generator)
    image = image.round().clamp(0, 255).to(torch.uint8)
    prob = (1.6 - 2.2 * distance + 0.2 * torch.randn(inside.shape, generator=generator)).sigmoid()
    if classes:
        logits = torch.randn(batch, classes, height, width, generator=generator)
        logits[:, 1] += 4 * prob - 1
        prob = logits.softmax(1)
    return prob, image


def noise(batch, height, width, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(batch, height, width, generator=generator)
    image = torch.randint(256, (batch, 3, height, width), generator=generator)
    return prob, image.to(torch.uint8)


def constant(batch, height, width):
    prob, image = scene(batch, height, width)
    return prob, torch.full_like(image, 77)


# ---- rivals


def pydensecrf(prob, image, numbers=DSS):
    pytest.importorskip("pydensecrf.densecrf")
    return rivals.pydensecrf(prob, image, numbers)


def assert_like_pydensecrf(actual, expected):
    assert (actual - expected).abs().mean() <= 1e-3
    if actual.dim() == 4:
        same = actual.argmax(1) == expected.argmax(1)
    else:
        same = (actual > 0.5) == (expected > 0.5)
    assert same.float().mean() >= 0.999


# ---- the CUDA kernels on the CPU


def on_host(prob, image, numbers=DSS, *, images_at_once=0, reverse=False):
    iterations, *widths = (numbers[name] for name in DSS)
    with nan_filled_memory():
        return torch.ops.vsod_ops.dense_crf_cuda_on_host(
            prob, image, iterations, *map(float, widths), images_at_once, reverse
        )


def assert_like_the_cpu_kernel(prob, image, numbers=DSS, *, compute=on_host):
    """To rounding.  Where features are rounded differently (multiply-adds) by 1e-5 of a weight, the
    iterations amplify that in pixels between two classes, also between levels of the CPU kernel;
    its portable level rounds like the host's run of the phases."""
    expected = dense_crf(prob, image, **numbers, backend="cpu")
    error = (compute(prob, image, numbers) - expected).abs()
    assert error.mean() <= 1e-6
    if os.environ.get("VSOD_OPS_SIMD") == "portable" and compute is on_host:
        assert error.max() <= 5e-5
    else:
        assert error.max() <= 2e-3
        assert (error > 1e-5).sum() <= max(1, 2e-3 * error.numel())
