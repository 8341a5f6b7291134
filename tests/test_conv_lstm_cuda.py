"""conv_lstm on CUDA tensors by its CUDA kernels, and what nvcc made of those."""

import re

import pytest
import torch
from checks import GPU_DTYPES, exact_float32, nan_filled_memory, needs_cpu
from checks_conv_lstm import (
    CUDA_FORMS,
    CUDA_SHAPES,
    assert_like_float64,
    cuda_case,
    lstm_results,
    moved,
    through_conv_lstm,
)
from checks_cuda import assert_no_spills, cuda_objdump, needs_cuda_module, on_gpu

from vsod_ops import conv_lstm
from vsod_ops.conv_lstm import op


@needs_cuda_module
def test_no_kernel_spills():
    assert_no_spills("conv_lstm_kernel", kernels=30, registers=168)


@needs_cuda_module
def test_16_bit_kernels_use_tensor_cores():
    code = cuda_objdump("-sass", check=False)
    if "Function :" not in code:
        pytest.skip("cuobjdump finds no nvdisasm")
    for text in code.split("Function : ")[1:]:
        name = text.split("\n", 1)[0]
        convolves = re.search("Forward|Gather|StepBackward|WeightKernel", name)
        if "conv_lstm_kernel" in name and convolves:
            assert ("HMMA" in text) == ("c10" in name), name


def draw_on_gpu(**case):
    return tuple(moved(some, "cuda") for some in cuda_case(**case))


def run(inputs, grads, dilation=1, **options):
    """Outputs and gradients through the public function."""
    return lstm_results(through_conv_lstm("cuda", dilation=dilation, **options), inputs, grads)


def check(case, *, dilation=1, recompute=False):
    inputs, grads = draw_on_gpu(**case)
    with nan_filled_memory():
        actual = run(inputs, grads, dilation, recompute=recompute)
    assert_like_float64(actual, inputs, grads, dilation)


@pytest.fixture(autouse=True)
def _no_tf32():
    with exact_float32():
        yield


def shape_id(shape):
    return "x".join(map(str, shape.values()))


LARGER = (
    {"channels": 4, "hidden": 4, "height": 128, "width": 130, "batch": 2, "steps": 4},
    {"channels": 4, "hidden": 16, "height": 97, "width": 160, "batch": 2, "steps": 4},
    {"channels": 32, "hidden": 32, "height": 65, "width": 64, "batch": 1, "steps": 3},
)


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("form", CUDA_FORMS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize(
    "shape", CUDA_SHAPES + LARGER, ids=lambda s: "x".join(map(str, s.values()))
)
def test_error_rule(shape, form, recompute, dtype):
    check(shape | form | {"dtype": dtype}, recompute=recompute)


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize(
    "kernel, dilation", ((1, 1), (3, 2), (3, 12), (5, 1), (5, 3), (7, 2), (3, 64))
)
def test_any_kernel_and_dilation(kernel, dilation, dtype):
    case = {"channels": 3, "hidden": 5, "height": 41, "width": 67, "kernel": kernel}
    check(case | {"peephole": "channel", "dtype": dtype}, dilation=dilation)


@on_gpu
@needs_cpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("kernel, dilation", ((3, 1), (3, 12), (5, 2)))
def test_same_as_the_phases_on_the_cpu(kernel, dilation, dtype):
    """Not bit by bit (the order of sums in a product, expf), but to rounding."""
    inputs, grads = cuda_case(
        steps=3, channels=5, hidden=9, height=35, width=70, kernel=kernel, dtype=dtype
    )
    inputs = list(inputs.values())
    ops = torch.ops.vsod_ops
    host = ops.conv_lstm_cuda_on_host(*inputs, dilation, op.SAVE_GATES, False)
    device = ops.conv_lstm_cuda(*moved(inputs, "cuda"), dilation, op.SAVE_GATES)
    needs = [t is not None for t in inputs]
    host += ops.conv_lstm_backward_cuda_on_host(*grads, *inputs, *host, dilation, needs, 0, False)
    device += ops.conv_lstm_backward_cuda(
        *moved([*grads, *inputs, *host[:4]], "cuda"), dilation, needs
    )
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for a, b in zip(host, device, strict=True):
        if a.numel():
            largest = a.double().abs().max().item()
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=tolerance * largest)


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_same_bits_on_every_run(dtype):
    inputs, grads = draw_on_gpu(
        batch=2, steps=4, channels=4, hidden=12, height=200, width=201, peephole="channel",
        dtype=dtype,
    )  # fmt: skip
    first = run(inputs, grads)
    for _ in range(3):
        for name, value in run(inputs, grads).items():
            assert torch.equal(value, first[name]), name


@on_gpu
def test_tf32_changes_nothing():
    """These kernels compute float32 in float32, whatever torch allows."""
    inputs, grads = draw_on_gpu(
        steps=3, channels=8, hidden=8, height=40, width=40, dtype=torch.float32
    )
    exact, before = run(inputs, grads), torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        allowed = run(inputs, grads)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in exact.items():
        assert torch.equal(value, allowed[name]), name


@on_gpu
def test_side_stream_and_graph():
    inputs, grads = draw_on_gpu(height=64, width=64, peephole="channel", dtype=torch.float32)
    expected = run(inputs, grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        aside = run(inputs | {"x": inputs["x"] * 1}, grads)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(aside[name], value) for name, value in expected.items())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, grads, check_last=False)  # which would wait for the GPU
    inputs["x"].mul_(0.5)
    graph.replay()
    expected = run(inputs, grads)
    assert all(torch.equal(captured[name], value) for name, value in expected.items())


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    inputs, grads = cuda_case(height=40, width=40, dtype=torch.float32)
    expected = run(moved(inputs, "cuda"), moved(grads, "cuda"))
    second = [moved(some, "cuda:1") for some in (inputs, grads)]
    with torch.cuda.device(0):
        actual = run(*second)
    for name, value in expected.items():
        assert torch.equal(actual[name].cpu(), value.cpu()), name


@on_gpu
def test_compile():
    inputs, grads = cuda_case(height=33, width=40, peephole="channel", dtype=torch.float32)
    x, h, c, *weights = (t.cuda().requires_grad_() for t in inputs.values())

    def call(x, h, c, *weights):
        return 2 * conv_lstm(x, (h, c), *weights)[0]

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    results = []
    for function in (compiled, call):
        out = function(x, h, c, *weights)
        results.append([out, *torch.autograd.grad(out, (x, *weights), grads[0].cuda())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_opcheck(dtype):
    inputs, _ = cuda_case(height=9, width=13, layout="permuted", dtype=dtype)
    leaves = [None if t is None else t.cuda().requires_grad_() for t in inputs.values()]
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    arguments = (*leaves, 1, op.SAVE_GATES, None)
    torch.library.opcheck(op.conv_lstm, arguments, **tolerances)


@on_gpu
def test_autocast_keeps_the_cell_state_in_float32():
    inputs, _ = draw_on_gpu(height=16, width=16, dtype=torch.float32)
    x, h, c, *weights = inputs.values()
    with torch.autocast("cuda", torch.bfloat16):
        out, (_, c_last) = conv_lstm(x, (h, c), *weights)
    assert out.dtype == torch.bfloat16 and c_last.dtype == torch.float32


@on_gpu
def test_strides_above_2_31_elements():
    inputs, grads = draw_on_gpu(batch=2, height=16, width=16, dtype=torch.float16)
    expected, x = run(inputs, grads), inputs["x"]
    memory = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device="cuda")
    far = memory.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x)
    for name, value in run(inputs | {"x": far}, grads).items():
        torch.testing.assert_close(value, expected[name])


@on_gpu
def test_more_than_2_31_elements():
    """The last corner of frames that fill more than 2^31 elements, against that corner alone."""
    x = torch.randn(1, 2, 1, 32768, 32800, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    inputs, _ = draw_on_gpu(channels=1, hidden=1, dtype=torch.bfloat16)
    weights = list(inputs.values())[3:]
    out, (_, c_last) = conv_lstm(x, None, *weights, backend="cuda")
    corner = (..., slice(-72, None), slice(-72, None))
    expected, (_, c_expected) = conv_lstm(x[corner].contiguous(), None, *weights, backend="cuda")
    inner = (..., slice(8, None), slice(8, None))  # beyond what the cut reaches in two steps
    torch.testing.assert_close(out[corner][inner], expected[inner])
    torch.testing.assert_close(c_last[corner][inner], c_expected[inner])


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_ends_of_the_range(dtype):
    numbers = [-torch.inf, -1e4, -89.0, -1e-4, 0.0, 1e-4, 89.0, 1e4, torch.inf, torch.nan]
    x = torch.tensor(numbers, dtype=dtype, device="cuda")[None, None, None, None, :]
    weights = (x.new_ones(4, 1, 1, 1), x.new_zeros(4, 1, 1, 1))
    out, (_, c) = conv_lstm(x, None, *weights, backend="cuda")
    wide = x.double().flatten()
    expected = wide.sigmoid() * wide.tanh()
    torch.testing.assert_close(
        c.flatten(), expected.to(c.dtype), equal_nan=True, rtol=1e-6, atol=1e-37
    )
    expected = wide.sigmoid() * expected.tanh()
    torch.testing.assert_close(out.flatten(), expected.to(dtype), equal_nan=True)


@on_gpu
def test_many_channels_go_elsewhere():
    x = torch.randn(1, 2, 4, 8, 8, device="cuda")
    weights = (torch.randn(256, 4, 3, 3, device="cuda"), torch.randn(256, 64, 3, 3, device="cuda"))
    conv_lstm(x, None, *weights)
    with pytest.raises(ValueError, match="takes at most 32 hidden channels, not 64"):
        conv_lstm(x, None, *weights, backend="cuda")
