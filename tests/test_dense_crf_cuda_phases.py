"""The CUDA kernels of dense_crf run in loops on the CPU: the same code as on a GPU, but for the
launch and CUB's sort and scan."""

import os

import pytest
import torch
from checks import needs_cpu, picker, run_tests_again
from checks_dense_crf import (
    DSS,
    NUMBERS,
    OTHER_NUMBERS,
    SIZES,
    assert_like_pydensecrf,
    assert_like_the_cpu_kernel,
    constant,
    noise,
    on_host,
    pydensecrf,
    scene,
)

from vsod_ops import dense_crf
from vsod_ops.dense_crf import PRESETS, reference

pytestmark = needs_cpu


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


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
    assert_like_the_cpu_kernel(prob, image, OTHER_NUMBERS)


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
    pick = picker(3000 + sweep_index)
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
    run_tests_again(__file__, sweep, "-k", "cpu_kernel or random", VSOD_OPS_SIMD="portable")
