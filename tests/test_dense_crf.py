"""dense_crf: the definition, pydensecrf, the CPU kernel, arguments, values, compile."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from checks import (
    BACKENDS,
    DTYPES,
    assert_two_threads_agree,
    nan_filled_memory,
    needs_cpu,
    run_tests_at_level,
)
from checks_dense_crf import (
    DSS,
    NUMBERS,
    OTHER_NUMBERS,
    assert_like_pydensecrf,
    noise,
    pydensecrf,
    scene,
)

from vsod_ops import backends, dense_crf
from vsod_ops.dense_crf import PRESETS, reference

OP = torch.ops.vsod_ops.dense_crf.default


@pytest.fixture(autouse=True)
def _one_thread():
    """Many small products: on a busy machine, threads of each would wait for one another."""
    torch.set_num_threads(1)


# ---- the definition


def test_reference_is_the_definition():
    prob, image = scene(1, 4, 5)
    height, width = prob.shape[1:]
    features = [
        [y, x, *(image[0, c, y, x].item() for c in range(3))]
        for y in range(height)
        for x in range(width)
    ]
    f = torch.tensor(features, dtype=torch.float64)
    kernels = []
    for scaled, weight in (
        (f[:, :2] / 3, 3.0),
        (torch.cat([f[:, :2] / 60, f[:, 2:] / 5], 1), 5.0),
    ):
        k = torch.exp(-0.5 * (scaled[:, None] - scaled).square().sum(-1))
        s = k.sum(1).rsqrt()
        kernels.append(weight * s[:, None] * k * s)
    p = prob.double().flatten()
    unary = -torch.stack([1 - p, p], 1).clip(1e-5, 1).log()
    q = (-unary).softmax(1)
    for _ in range(3):
        q = (-unary + sum(k @ q for k in kernels)).softmax(1)
    out = reference.forward(prob.double(), image, 3, 3, 3, 60, 5, 5)
    torch.testing.assert_close(out.flatten(), q[:, 1])


def test_reference_in_blocks(monkeypatch):
    prob, image = scene(1, 11, 13)
    whole = dense_crf(prob, image, backend="reference")
    monkeypatch.setattr(reference, "_BLOCK", 1000)
    torch.testing.assert_close(dense_crf(prob, image, backend="reference"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_classes_are_the_binary_case(backend):
    prob, image = scene(2, 19, 23)
    both = dense_crf(torch.stack([1 - prob, prob], 1), image, backend=backend)
    binary = dense_crf(prob, image, backend=backend)
    torch.testing.assert_close(both[:, 1], binary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.sum(1), torch.ones_like(binary))


@pytest.mark.parametrize("make", (scene, noise))
@needs_cpu
def test_no_further_from_brute_force_than_pydensecrf(make):
    prob, image = make(3, 24, 24)
    exact = reference.forward(prob.double(), image, DSS["iterations"], *NUMBERS)
    ours = (dense_crf(prob, image, backend="cpu") - exact).abs().mean()
    theirs = (pydensecrf(prob, image) - exact).abs().mean()
    assert ours <= theirs * 1.001


# ---- pydensecrf


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", (scene, noise))
@pytest.mark.parametrize("size", ((97, 61), (120, 160), (1, 50), (37, 1), (7, 9)))
@needs_cpu
def test_like_pydensecrf(make, size, preset):
    prob, image = make(2, *size)
    out = dense_crf(prob, image, preset=preset, backend="cpu")
    assert_like_pydensecrf(out, pydensecrf(prob, image, PRESETS[preset]))


@pytest.mark.parametrize("classes", (2, 3, 16, 17, 21))
@needs_cpu
def test_classes_like_pydensecrf(classes):
    prob, image = scene(2, 45, 67, classes=classes)
    assert_like_pydensecrf(dense_crf(prob, image, backend="cpu"), pydensecrf(prob, image))


@needs_cpu
def test_other_numbers_like_pydensecrf():
    prob, image = scene(1, 50, 70)
    out = dense_crf(prob, image, **OTHER_NUMBERS, backend="cpu")
    assert_like_pydensecrf(out, pydensecrf(prob, image, OTHER_NUMBERS))


def real_pairs(count):
    """(prob, image) of frames that have a published saliency map, both at the map's size."""
    root = os.environ.get("VSOD_DATA")
    if not root:
        pytest.skip("VSOD_DATA is not set: no real frames")
    maps = sorted((Path(root) / "mtnet-davis16-maps").glob("*/*.png"))
    frames = Path(root) / "davis16-270p" / "JPEGImages" / "480p"
    if not maps or not frames.is_dir():
        pytest.skip(f"no mtnet-davis16-maps with davis16-270p in {root}")
    pil = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    for path in maps[:: max(1, len(maps) // count)][:count]:
        with (
            pil.open(path) as saliency,
            pil.open(frames / path.parent.name / f"{path.stem}.jpg") as frame,
        ):
            image = numpy.array(frame.convert("RGB").resize(saliency.size))
            prob = numpy.array(saliency.convert("L")).astype("float32") / 255
        yield torch.from_numpy(prob)[None], torch.from_numpy(image).permute(2, 0, 1)[None]


@needs_cpu
def test_real_frames_like_pydensecrf():
    for prob, image in real_pairs(4):
        assert_like_pydensecrf(dense_crf(prob, image, backend="cpu"), pydensecrf(prob, image))


# ---- inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prob_dtypes(backend, dtype):
    prob, image = scene(1, 20, 24)
    prob = prob.to(dtype)
    out = dense_crf(prob, image, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, dense_crf(prob.float(), image, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
)
def test_image_dtypes(backend, dtype):
    prob, image = scene(1, 20, 24)
    out = dense_crf(prob, image.to(dtype), backend=backend)
    torch.testing.assert_close(out, dense_crf(prob, image, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fractional_colours_count(backend):
    prob, image = scene(1, 20, 24)
    brighter = dense_crf(prob, image.float().clamp(max=250) + 0.5, backend=backend)
    torch.testing.assert_close(
        brighter, dense_crf(prob, image.clamp(max=250), backend=backend), atol=2e-2, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_in_0_to_1_is_warned_about(backend):
    prob, image = scene(1, 8, 8)
    with pytest.warns(UserWarning, match=r"its scale is 0\.\.255"):
        dense_crf(prob, image / 255, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_crf(prob, torch.zeros(1, 3, 8, 8), backend=backend)


@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_in_nan_filled_memory(backend, classes):
    prob, image = scene(2, 21, 30, classes=classes)
    expected = dense_crf(prob, image, backend=backend)
    buffer = torch.full([2 * n + 1 for n in prob.shape], torch.nan)
    sliced = buffer[tuple(slice(1, None, 2) for _ in prob.shape)]
    sliced.copy_(prob)
    permuted = prob.mT.contiguous().mT
    channels_last = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with nan_filled_memory():
        for p in (sliced, permuted):
            out = dense_crf(p, channels_last, backend=backend)
            assert torch.equal(out, expected) and out.is_contiguous()


@needs_cpu
def test_batch_is_image_by_image():
    for make in (scene, noise):
        prob, image = make(5, 40, 52)
        whole = dense_crf(prob, image, backend="cpu")
        for i in range(5):
            alone = dense_crf(prob[i : i + 1], image[i : i + 1], backend="cpu")
            assert torch.equal(whole[i : i + 1], alone)


@needs_cpu
@pytest.mark.parametrize("classes", (0, 3))
def test_same_bits_on_every_run_and_thread_count(classes):
    prob, image = scene(3, 101, 83, classes=classes)
    results = []
    for threads in (1, 2, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(dense_crf(prob, image, backend="cpu"))
        results.append(torch.cat([dense_crf(prob[:1], image[:1], backend="cpu"), results[0][1:]]))
    for other in results[1:]:
        assert torch.equal(results[0], other)


@needs_cpu
def test_two_threads_at_once():
    inputs = [scene(1, 60, 60, seed=s) for s in (1, 2)]
    assert_two_threads_agree(lambda case: dense_crf(*case), inputs, repeats=10)


@needs_cpu
def test_hash_table_grows():
    prob, image = noise(3, 64, 64)
    expected = dense_crf(prob, image, backend="cpu")
    torch.set_num_threads(2)
    for capacity in (1, 16, 1000):
        out = torch.ops.vsod_ops.dense_crf_cpu(prob, image, 5, *NUMBERS, capacity)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_iterations_give_prob_back(backend):
    prob, image = scene(2, 9, 9)
    out = dense_crf(prob.half(), image, iterations=0, backend=backend)
    assert torch.equal(out, prob.half().float())
    same = dense_crf(prob, image, iterations=0, backend=backend)
    assert torch.equal(same, prob) and same.data_ptr() != prob.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel(backend):
    prob, image = torch.tensor([[[0.7]]]), torch.full((1, 3, 1, 1), 9, dtype=torch.uint8)
    # One pixel: both normalised kernels are 1, so the logits are those of prob plus 8 q.
    logits, q = torch.tensor([0.3, 0.7]).log(), torch.tensor([0.3, 0.7])
    for _ in range(5):
        q = (logits + 8 * q).softmax(0)
    torch.testing.assert_close(dense_crf(prob, image, backend=backend).flatten(), q[1:])


@pytest.mark.parametrize("colour", (0, 128, 255))
@needs_cpu
def test_constant_image(colour):
    prob, _ = scene(1, 40, 48)
    image = torch.full((1, 3, 40, 48), colour, dtype=torch.uint8)
    assert_like_pydensecrf(dense_crf(prob, image, backend="cpu"), pydensecrf(prob, image))
    flat = torch.full((1, 40, 48), 0.5)
    torch.testing.assert_close(dense_crf(flat, image, backend="cpu"), flat)


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_pixels(backend):
    prob = torch.zeros(1, 12, 12)
    prob[:, 4:8, 4:8] = 1
    out = dense_crf(prob, torch.zeros(1, 3, 12, 12, dtype=torch.uint8), backend=backend)
    assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_zero(backend):
    prob, image = scene(1, 18, 22)
    torch.testing.assert_close(
        dense_crf(prob, image, gaussian_weight=0, bilateral_weight=0, backend=backend),
        prob.clip(1e-5, 1 - 1e-5),
    )
    for name in ("gaussian_weight", "bilateral_weight"):
        off = dense_crf(prob, image, **{name: 0}, backend=backend)
        tiny = dense_crf(prob, image, **{name: 1e-12}, backend=backend)
        torch.testing.assert_close(off, tiny)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((0, 5, 6), (2, 0, 6), (0, 3, 5, 6)))
def test_empty(backend, shape):
    prob = torch.zeros(shape)
    image = torch.zeros(shape[0], 3, *shape[-2:], dtype=torch.uint8)
    assert dense_crf(prob, image, backend=backend).shape == shape


@needs_cpu
def test_large_image():
    prob, image = scene(1, 1080, 1920)
    out = dense_crf(prob, image, iterations=1)
    assert torch.isfinite(out).all()


def test_presets():
    prob, image = scene(1, 16, 16)
    default = dense_crf(prob, image)
    assert torch.equal(default, dense_crf(prob, image, preset="dss"))
    assert torch.equal(default, dense_crf(prob, image, **DSS))
    deeplab = dense_crf(prob, image, preset="deeplab")
    assert torch.equal(deeplab, dense_crf(prob, image, **PRESETS["deeplab"]))
    assert torch.equal(deeplab, dense_crf(prob, image, preset="dss", **PRESETS["deeplab"]))
    with pytest.raises(ValueError, match="preset must be one of"):
        dense_crf(prob, image, preset="mssa")


# ---- bad inputs

P, IMAGE = torch.full((2, 5, 6), 0.5), torch.zeros(2, 3, 5, 6, dtype=torch.uint8)
NAN = float("nan")


@pytest.mark.parametrize(
    "prob, image, options, error, message",
    [
        (P.numpy(), IMAGE, {}, TypeError, "prob must be a tensor, got ndarray"),
        (P, [1], {}, TypeError, "image must be a tensor, got list"),
        (P.int(), IMAGE, {}, TypeError, "prob must be float32, float16, bfloat16 or float64"),
        (P, IMAGE.bool(), {}, TypeError, "image must be uint8 or another real dtype"),
        (P[0], IMAGE, {}, ValueError, r"prob must be \(B, H, W\) or \(B, L, H, W\)"),
        (P, IMAGE[0], {}, ValueError, r"image must be \(B, 3, H, W\), got shape \(3, 5, 6\)"),
        (P, IMAGE[:, :1], {}, ValueError, r"image must be \(B, 3, H, W\)"),
        (P, IMAGE[:1], {}, ValueError, "image has batch size 1 but prob has 2"),
        (P, IMAGE[:, :, :4], {}, ValueError, r"image is 4x6 \(H x W\) but prob is 5x6"),
        (P, IMAGE.mT, {}, ValueError, r"image is 6x5 \(H x W\) but prob is 5x6"),
        (P[:, None], IMAGE, {}, ValueError, "prob has 1 classes and needs at least 2"),
        (P + 0.6, IMAGE, {}, ValueError, r"must lie in 0..1 without NaN, got 1\.1\d* to 1\.1"),
        (P - 0.6, IMAGE, {}, ValueError, r"prob must lie in 0..1"),
        (P * NAN, IMAGE, {}, ValueError, r"prob must lie in 0..1 without NaN, got nan"),
        (torch.stack([P, 0.9 * P], 1), IMAGE, {}, ValueError, "sum to one over the classes"),
        (P, IMAGE + 256.0, {}, ValueError, r"image must lie in 0..255 without NaN, got 256 to 256"),
        (P, IMAGE.int() - 1, {}, ValueError, "image must lie in 0..255"),
        (P, IMAGE * NAN, {}, ValueError, "image must lie in 0..255 without NaN"),
        (P, IMAGE, {"gaussian_sxy": 0}, ValueError, "gaussian_sxy must be above zero, got 0"),
        (P, IMAGE, {"bilateral_sxy": -1}, ValueError, "bilateral_sxy must be above zero, got -1"),
        (P, IMAGE, {"bilateral_srgb": 0.0}, ValueError, "bilateral_srgb must be above zero"),
        (P, IMAGE, {"bilateral_srgb": NAN}, ValueError, "bilateral_srgb must be finite, got nan"),
        (P, IMAGE, {"gaussian_weight": -1}, ValueError, "gaussian_weight must not be negative"),
        (
            P,
            IMAGE,
            {"gaussian_weight": 1e308},
            ValueError,
            "gaussian_weight must be at most 1e[+]30",
        ),
        (
            P,
            IMAGE,
            {"bilateral_weight": "5"},
            TypeError,
            "bilateral_weight must be a number, got str",
        ),
        (P, IMAGE, {"iterations": -1}, ValueError, "iterations must be from 0 to 1000, got -1"),
        (P, IMAGE, {"iterations": 1.5}, TypeError, "iterations must be an int, got float"),
        (P, IMAGE, {"iterations": True}, TypeError, "iterations must be an int, got bool"),
        (P, IMAGE, {"backend": "gpu"}, ValueError, "backend must be None or one of"),
        (P, IMAGE, {"backend": "triton"}, ValueError, "this op has no such backend"),
        (P, IMAGE.to("meta"), {}, ValueError, "image is on meta but prob is on cpu"),
    ],
)
def test_bad_arguments(prob, image, options, error, message):
    with pytest.raises(error, match=message):
        dense_crf(prob, image, **options)


@needs_cpu
def test_widths_that_the_lattice_cannot_hold():
    prob, image = scene(1, 60, 60)
    with pytest.raises(ValueError, match=r"bilateral_srgb = 0\.001 is too small for an image of"):
        dense_crf(prob, image, bilateral_srgb=0.001)
    with pytest.raises(ValueError, match="gaussian_sxy = 1e-05 is too small for an image of"):
        dense_crf(prob, image, gaussian_sxy=1e-5)
    # What is small but fits is an identity: no pixel sees another.
    out = dense_crf(prob, image, gaussian_sxy=0.05, bilateral_weight=0, iterations=1)
    q = torch.stack([1 - prob, prob], 1)
    expected = (q.clip(1e-5, 1).log() + 3 * q).softmax(1)[:, 1]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient():
    prob, image = scene(1, 8, 8)
    out = dense_crf(prob.requires_grad_(), image)
    with pytest.raises(NotImplementedError, match=r"no gradient.*call it on prob.detach\(\)"):
        out.sum().backward()


def test_without_a_compiled_backend_large_images_are_refused(monkeypatch):
    monkeypatch.setattr(backends, "compiled_module", lambda name: f"no {name} here")
    prob, image = scene(1, 160, 160)
    with pytest.raises(ValueError, match="at most 16384 pixels, not 25600, unless it is named"):
        OP(prob, image, 5, *NUMBERS, None)
    assert torch.equal(OP(prob, image, 0, *NUMBERS, None), prob)


# ---- a torch op


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", (0, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(backend, classes, dtype):
    prob, image = scene(2, 6, 7, classes=classes)
    permuted = prob.to(dtype).mT.contiguous().mT
    # With requires_grad the check would ask for a gradient, and dense_crf has none.
    torch.library.opcheck(OP, (permuted, image, 2, *NUMBERS, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_as_a_whole(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def f(logits, image):
        return dense_crf(logits.sigmoid(), image, preset="deeplab", backend=backend) > 0.5

    for size in ((9, 12), (14, 8), (10, 10)):
        prob, image = scene(1, *size)
        expected = dense_crf(prob.logit().sigmoid(), image, preset="deeplab", backend=backend)
        assert torch.equal(f(prob.logit(), image), expected > 0.5)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        prob = torch.empty(2, 4, 30, 40, dtype=torch.bfloat16)
        out = dense_crf(prob, torch.empty(2, 3, 30, 40, dtype=torch.uint8))
    assert out.shape == prob.shape and out.dtype == torch.float32 and out.is_contiguous()


@pytest.mark.parametrize("level", ("portable", "avx2", "avx512"))
@needs_cpu
def test_other_levels(level):
    some = "(like_pydensecrf and not deeplab) or bits or grows or one_pixel or binary_case"
    run_tests_at_level(level, __file__, "-k", some)
