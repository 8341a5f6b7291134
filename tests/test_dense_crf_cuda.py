"""dense_crf on CUDA tensors by its CUDA kernels, and what nvcc made of those."""

import pytest
import torch
from checks import nan_filled_memory, needs_cpu
from checks_cuda import assert_no_spills, needs_cuda_module, on_gpu
from checks_dense_crf import (
    DSS,
    NUMBERS,
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
from vsod_ops.dense_crf import PRESETS, op, reference


@needs_cuda_module
def test_no_kernel_spills():
    assert_no_spills("dense_crf_kernel", kernels=15, registers=128)


def run(prob, image, **options):
    with nan_filled_memory():
        return dense_crf(prob.cuda(), image.cuda(), backend="cuda", **options).cpu()


@on_gpu
@needs_cpu
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", (scene, noise, constant))
@pytest.mark.parametrize("size", (*SIZES, (270, 480)), ids=str)
def test_like_the_cpu_kernel(make, size, preset):
    prob, image = make(3, *size)
    assert_like_the_cpu_kernel(
        prob, image, PRESETS[preset], compute=lambda p, i, numbers: run(p, i, **numbers)
    )


@on_gpu
@needs_cpu
@pytest.mark.parametrize("classes", (2, 3, 21))
def test_classes_like_the_phases_on_the_cpu(classes):
    prob, image = scene(2, 45, 67, classes=classes)
    error = (run(prob, image) - on_host(prob, image)).abs()
    assert error.mean() <= 1e-6 and error.max() <= 1e-3


@on_gpu
def test_close_to_brute_force():
    for make, bound in ((scene, 2e-3), (noise, 2e-2)):
        prob, image = make(3, 24, 24)
        exact = reference.forward(prob.double(), image, DSS["iterations"], *NUMBERS)
        assert (run(prob, image) - exact).abs().mean() <= bound


@on_gpu
@pytest.mark.parametrize("make", (scene, noise))
def test_like_pydensecrf(make):
    prob, image = make(2, 120, 160)
    assert_like_pydensecrf(run(prob, image), pydensecrf(prob, image))


@on_gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_dtypes(dtype):
    prob, image = scene(2, 30, 31)
    prob = prob.to(dtype)
    expected = run(prob.float(), image)
    torch.testing.assert_close(run(prob, image.int()), expected, rtol=0, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("classes", (0, 3))
def test_same_bits_on_every_run_and_in_a_batch(classes):
    prob, image = scene(9, 200, 301, classes=classes)
    first = run(prob, image)
    for _ in range(3):
        assert torch.equal(run(prob, image), first)
    assert torch.equal(run(prob[4:5], image[4:5]), first[4:5])


@on_gpu
def test_batch_in_groups():
    # 40 images of 60,000 pixels are more than go together.
    prob, image = scene(40, 200, 300)
    assert torch.equal(run(prob, image)[37:], run(prob[37:], image[37:]))


@on_gpu
def test_side_stream():
    prob, image = (x.cuda() for x in scene(2, 97, 131))
    expected = dense_crf(prob, image, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = dense_crf(prob, image, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    prob, image = scene(2, 97, 131)
    with torch.cuda.device(0):
        actual = dense_crf(prob.to("cuda:1"), image.to("cuda:1"), backend="cuda")
    assert actual.device.index == 1 and torch.equal(actual.cpu(), run(prob, image))


@on_gpu
def test_compile():
    prob, image = (x.cuda() for x in scene(2, 97, 131))

    def call(prob, image):
        return 2 * dense_crf(prob, image)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(prob, image), call(prob, image))


@on_gpu
@pytest.mark.parametrize("classes", (0, 3))
def test_opcheck(classes):
    prob, image = (x.cuda() for x in scene(2, 30, 31, classes=classes))
    torch.library.opcheck(op.dense_crf, (prob, image, 3, *NUMBERS, None))


@on_gpu
def test_more_than_2_31_elements():
    prob, image = (x.cuda() for x in scene(1, 512, 512))
    expected = dense_crf(prob, image, iterations=1)
    count = 2**31 // prob.numel() + 1
    many = dense_crf(prob.expand(count, -1, -1), image.expand(count, -1, -1, -1), iterations=1)
    assert many.numel() > 2**31
    assert torch.equal(many[0], expected[0]) and torch.equal(many[-1], expected[0])


@on_gpu
def test_it_is_the_default():
    prob, image = (x.cuda() for x in scene(1, 200, 200))  # too many pixels for brute force
    assert torch.equal(dense_crf(prob, image), dense_crf(prob, image, backend="cuda"))


@on_gpu
def test_empty_and_too_small_widths():
    prob, image = (x.cuda() for x in scene(1, 16, 16))
    assert dense_crf(prob[:0], image[:0], backend="cuda").shape == (0, 16, 16)
    with pytest.raises(ValueError, match="too small for an image"):
        dense_crf(prob, image, gaussian_sxy=1e-9, backend="cuda")
