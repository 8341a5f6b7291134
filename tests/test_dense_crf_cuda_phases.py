"""The CUDA kernels of dense_crf run in loops on the CPU: the same code as on a GPU, but for the
launch and CUB's sort and scan."""

import os
import subprocess
import sys

import pytest
import torch
from checks import nan_filled_memory
from test_dense_crf import DSS, NUMBERS, assert_like_pydensecrf, noise, pydensecrf, scene

from vsod_ops import backends, dense_crf
from vsod_ops.dense_crf import PRESETS, reference

MODULE = backends.compiled_module("_cpu")
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=f"no CPU module: {MODULE}")

SIZES = ((97, 61), (64, 64), (1, 50), (37, 1), (7, 9), (1, 1))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def constant(batch, height, width):
    prob, image = scene(batch, height, width)
    return prob, torch.full_like(image, 77)


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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", (scene, noise, constant))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_like_the_cpu_kernel(make, size, preset):
    assert_like_the_cpu_kernel(*make(3, *size), PRESETS[preset])


@pytest.mark.parametrize("classes", (2, 3, 16, 21))
@pytest.mark.parametrize("size", ((33, 47), (1, 1), (5, 1)), ids=str)
def test_classes_like_the_cpu_kernel(size, classes):
    assert_like_the_cpu_kernel(*scene(2, *size, classes=classes))


def test_float_image_like_the_cpu_kernel():
    prob, image = scene(2, 31, 29)
    image = (image.float() + torch.rand(image.shape)).clamp(0, 255)
    assert_like_the_cpu_kernel(prob, image)


@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("absent", ("gaussian_weight", "bilateral_weight", "both"))
def test_without_a_kernel(absent, classes):
    prob, image = scene(2, 19, 23, classes=classes)
    names = ("gaussian_weight", "bilateral_weight") if absent == "both" else (absent,)
    assert_like_the_cpu_kernel(prob, image, dict(DSS) | dict.fromkeys(names, 0))


def test_other_numbers_like_the_cpu_kernel():
    prob, image = scene(1, 50, 70)
    numbers = {
        "iterations": 3,
        "gaussian_sxy": 1.5,
        "gaussian_weight": 2.0,
        "bilateral_sxy": 17,
        "bilateral_srgb": 1,
        "bilateral_weight": 6.5,
    }
    assert_like_the_cpu_kernel(prob, image, numbers)


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_certain_pixels(value):
    prob, image = scene(1, 12, 13)
    prob[:, :6] = value
    assert_like_the_cpu_kernel(prob, image)


def test_close_to_brute_force():
    for make, bound in ((scene, 2e-3), (noise, 2e-2)):
        prob, image = make(3, 24, 24)
        exact = reference.forward(prob.double(), image, DSS["iterations"], *NUMBERS)
        ours = (on_host(prob, image) - exact).abs().mean()
        assert ours <= bound
        cpu = (dense_crf(prob, image, backend="cpu") - exact).abs().mean()
        assert ours <= 1.01 * cpu


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", (scene, noise))
def test_like_pydensecrf(make, preset):
    prob, image = make(2, 60, 81)
    expected = pydensecrf(prob, image, PRESETS[preset])
    assert_like_pydensecrf(on_host(prob, image, PRESETS[preset]), expected)


def test_classes_like_pydensecrf():
    prob, image = scene(2, 45, 67, classes=5)
    assert_like_pydensecrf(on_host(prob, image), pydensecrf(prob, image))


@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("images_at_once", (1, 2, 5))
def test_batch_is_image_by_image(images_at_once, classes):
    prob, image = scene(5, 40, 41, classes=classes)
    alone = torch.cat([on_host(prob[i : i + 1], image[i : i + 1]) for i in range(5)])
    assert torch.equal(on_host(prob, image, images_at_once=images_at_once), alone)


@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("make", (scene, constant))
def test_order_of_threads_does_not_matter(make, classes):
    """What needs a barrier inside of a launch, or adds to a shared sum, differs in reverse."""
    prob, image = make(2, 35, 70)
    if classes:
        prob = scene(2, 35, 70, classes=classes)[0]
    assert torch.equal(on_host(prob, image), on_host(prob, image, reverse=True))


def test_long_lists_of_pairs():
    # 200 x 210 pixels in a handful of vertices: lists of hundreds of segments.
    prob, image = constant(1, 200, 210)
    numbers = dict(DSS) | {"gaussian_sxy": 100, "bilateral_sxy": 400}
    assert_like_the_cpu_kernel(prob, image, numbers)


def test_widths_that_the_lattice_cannot_hold():
    prob, image = scene(1, 16, 16)
    for name in ("gaussian_sxy", "bilateral_sxy"):
        with pytest.raises(RuntimeError, match=f"{name} = .*too small for an image"):
            on_host(prob, image, dict(DSS) | {name: 1e-9})


def test_random_cases(sweep_index):
    generator = torch.Generator().manual_seed(3000 + sweep_index)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    size = pick((1, 2, 3)), pick((1, 2, 13, 32, 61)), pick((1, 3, 16, 31, 75))
    classes = pick((0, 0, 2, 3, 7))
    prob, image = scene(*size, classes=classes, seed=sweep_index)
    if pick((True, False)):
        image = noise(*size, seed=sweep_index)[1]
    numbers = {
        "iterations": pick((1, 2, 5)),
        "gaussian_sxy": pick((0.7, 3, 20)),
        "gaussian_weight": pick((0, 1, 3)),
        "bilateral_sxy": pick((5, 60, 300)),
        "bilateral_srgb": pick((3, 13, 100)),
        "bilateral_weight": pick((0, 2, 5)),
    }
    if os.environ.get("VSOD_OPS_SIMD") == "portable":
        assert_like_the_cpu_kernel(prob, image, numbers)
    else:  # points on borders between simplices get other vertices when rounded differently
        error = (on_host(prob, image, numbers) - dense_crf(prob, image, **numbers)).abs()
        assert error.mean() <= 1e-3


def test_like_the_portable_level(request):
    """The level is chosen once a process.  This one holds the random cases to rounding."""
    if os.environ.get("VSOD_OPS_SIMD"):
        pytest.skip("a level is forced already")
    sweep = f"--sweep={request.config.getoption('--sweep')}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, sweep, "-k", "cpu_kernel or random"],
        env=os.environ | {"VSOD_OPS_SIMD": "portable"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
