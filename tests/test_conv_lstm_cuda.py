"""conv_lstm on CUDA tensors by its CUDA kernels, and what nvcc made of those."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from checks import assert_error_bound, nan_filled_memory
from test_conv_lstm_cuda_phases import FORMS, GRADIENTS, SHAPES, by_reference, draw, eager

from vsod_ops import backends, conv_lstm
from vsod_ops.conv_lstm import op

MODULE = backends.compiled_module("_cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(isinstance(MODULE, str), reason=f"no CUDA module: {MODULE}"),
]


def on_gpu(tests):
    for mark in needs_gpu:
        tests = mark(tests)
    return tests


def cuda_objdump():
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        pytest.skip("this triton carries no cuobjdump")
    return path


@pytest.mark.skipif(isinstance(MODULE, str), reason=f"no CUDA module: {MODULE}")
def test_no_kernel_spills():
    """Registers and stack of each kernel, for each architecture of the build."""
    done = subprocess.run(
        [cuda_objdump(), "-res-usage", MODULE.__file__], capture_output=True, text=True, check=True
    )
    usage = re.findall(
        r"Function (\S*conv_lstm_kernel\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        done.stdout,
    )
    architectures = re.findall(r"sm_\d+", MODULE.build_info()["architectures"])
    assert len(usage) >= 30 * len(set(architectures))
    for name, registers, stack, local in usage:
        assert int(stack) == 0 and int(local) == 0, f"{name} has a stack: it spills"
        assert int(registers) <= 168, name


@pytest.mark.skipif(isinstance(MODULE, str), reason=f"no CUDA module: {MODULE}")
def test_16_bit_kernels_use_tensor_cores():
    done = subprocess.run(
        [cuda_objdump(), "-sass", MODULE.__file__], capture_output=True, text=True
    )
    if "Function :" not in done.stdout:
        pytest.skip("cuobjdump finds no nvdisasm")
    for text in done.stdout.split("Function : ")[1:]:
        name = text.split("\n", 1)[0]
        convolves = re.search("Forward|Gather|StepBackward|WeightKernel", name)
        if "conv_lstm_kernel" in name and convolves:
            assert ("HMMA" in text) == ("c10" in name), name


def on_cuda(tensors):
    return [None if t is None else t.cuda() for t in tensors]


def run(inputs, grads, dilation=1, *, recompute=False, backend="cuda", check_last=True):
    """Outputs and gradients through the public function."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, h, c, *weights = leaves
    state = None if h is None else (h, c)
    out, (h_last, c_last) = conv_lstm(
        x, state, *weights, dilation=dilation, recompute=recompute, backend=backend
    )
    assert not check_last or torch.equal(h_last, out[:, -1])
    used = [t for t in leaves if t is not None]
    results = iter(torch.autograd.grad((out, c_last), used, grads))
    found = {n: next(results) for n, t in zip(GRADIENTS, leaves, strict=True) if t is not None}
    return {"out": out.detach(), "c_last": c_last.detach()} | found


def check(case, *, dilation=1, recompute=False):
    inputs, grads = draw(**case)
    cuda_inputs, cuda_grads = on_cuda(inputs), on_cuda(grads)
    with nan_filled_memory():
        actual = run(cuda_inputs, cuda_grads, dilation, recompute=recompute)
    narrow = eager(cuda_inputs, cuda_grads, dilation)
    oracle = by_reference(inputs, grads, dilation, torch.float64)
    for name, value in actual.items():
        assert_error_bound(name, value, narrow[name], oracle[name], inputs[0].dtype)


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


LARGER = (
    {"channels": 4, "hidden": 4, "height": 128, "width": 130, "batch": 2, "steps": 4},
    {"channels": 4, "hidden": 16, "height": 97, "width": 160, "batch": 2, "steps": 4},
    {"channels": 32, "hidden": 32, "height": 65, "width": 64, "batch": 1, "steps": 3},
)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("shape", SHAPES + LARGER, ids=lambda s: "x".join(map(str, s.values())))
def test_error_rule(shape, form, recompute, dtype):
    check(shape | form | {"dtype": dtype}, recompute=recompute)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kernel, dilation", ((1, 1), (3, 2), (3, 12), (5, 1), (5, 3), (7, 2), (3, 64))
)
def test_any_kernel_and_dilation(kernel, dilation, dtype):
    case = {"channels": 3, "hidden": 5, "height": 41, "width": 67, "kernel": kernel}
    check(case | {"peephole": "channel", "dtype": dtype}, dilation=dilation)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel, dilation", ((3, 1), (3, 12), (5, 2)))
def test_same_as_the_phases_on_the_cpu(kernel, dilation, dtype):
    """Not bit by bit (the order of sums in a product, expf), but to rounding."""
    if isinstance(backends.compiled_module("_cpu"), str):
        pytest.skip("no CPU module")
    inputs, grads = draw(
        steps=3, channels=5, hidden=9, height=35, width=70, kernel=kernel, dtype=dtype
    )
    ops = torch.ops.vsod_ops
    host = ops.conv_lstm_cuda_on_host(*inputs, dilation, op.SAVE_GATES, False)
    device = ops.conv_lstm_cuda(*on_cuda(inputs), dilation, op.SAVE_GATES)
    needs = [t is not None for t in inputs]
    host += ops.conv_lstm_backward_cuda_on_host(*grads, *inputs, *host, dilation, needs, 0, False)
    device += ops.conv_lstm_backward_cuda(
        *on_cuda(grads), *on_cuda(inputs), *on_cuda(host[:4]), dilation, needs
    )
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for a, b in zip(host, device, strict=True):
        if a.numel():
            largest = a.double().abs().max().item()
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=tolerance * largest)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run(dtype):
    inputs, grads = draw(
        batch=2, steps=4, channels=4, hidden=12, height=200, width=201, peephole="channel",
        dtype=dtype,
    )  # fmt: skip
    inputs, grads = on_cuda(inputs), on_cuda(grads)
    first = run(inputs, grads)
    for _ in range(3):
        for name, value in run(inputs, grads).items():
            assert torch.equal(value, first[name]), name


@on_gpu
def test_tf32_changes_nothing():
    """These kernels compute float32 in float32, whatever torch allows."""
    inputs, grads = draw(steps=3, channels=8, hidden=8, height=40, width=40, dtype=torch.float32)
    inputs, grads = on_cuda(inputs), on_cuda(grads)
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
    inputs, grads = draw(height=64, width=64, peephole="channel", dtype=torch.float32)
    inputs, grads = on_cuda(inputs), on_cuda(grads)
    expected = run(inputs, grads)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        aside = run([inputs[0] * 1, *inputs[1:]], grads)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(aside[name], value) for name, value in expected.items())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, grads, check_last=False)  # which would wait for the GPU
    inputs[0].mul_(0.5)
    graph.replay()
    expected = run(inputs, grads)
    assert all(torch.equal(captured[name], value) for name, value in expected.items())


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    inputs, grads = draw(height=40, width=40, dtype=torch.float32)
    expected = run(on_cuda(inputs), on_cuda(grads))
    second = [[None if t is None else t.to("cuda:1") for t in some] for some in (inputs, grads)]
    with torch.cuda.device(0):
        actual = run(*second)
    for name, value in expected.items():
        assert torch.equal(actual[name].cpu(), value.cpu()), name


@on_gpu
def test_compile():
    inputs, grads = draw(height=33, width=40, peephole="channel", dtype=torch.float32)
    x, h, c, *weights = (t.cuda().requires_grad_() for t in inputs)

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
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    inputs, _ = draw(height=9, width=13, layout="permuted", dtype=dtype)
    leaves = [None if t is None else t.cuda().requires_grad_() for t in inputs]
    tolerances = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    arguments = (*leaves, 1, op.SAVE_GATES, None)
    torch.library.opcheck(op.conv_lstm, arguments, **tolerances)


@on_gpu
def test_autocast_keeps_the_cell_state_in_float32():
    inputs, _ = draw(height=16, width=16, dtype=torch.float32)
    x, h, c, *weights = on_cuda(inputs)
    with torch.autocast("cuda", torch.bfloat16):
        out, (_, c_last) = conv_lstm(x, (h, c), *weights)
    assert out.dtype == torch.bfloat16 and c_last.dtype == torch.float32


@on_gpu
def test_strides_above_2_31_elements():
    inputs, grads = draw(batch=2, height=16, width=16, dtype=torch.float16)
    inputs, grads = on_cuda(inputs), on_cuda(grads)
    expected, x = run(inputs, grads), inputs[0]
    memory = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device="cuda")
    far = memory.as_strided(x.shape, (2**31, *x.stride()[1:])).copy_(x)
    for name, value in run([far, *inputs[1:]], grads).items():
        torch.testing.assert_close(value, expected[name])


@on_gpu
def test_more_than_2_31_elements():
    """The last corner of frames that fill more than 2^31 elements, against that corner alone."""
    x = torch.randn(1, 2, 1, 32768, 32800, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    inputs, _ = draw(channels=1, hidden=1, dtype=torch.bfloat16)
    weights = on_cuda(inputs[3:])
    out, (_, c_last) = conv_lstm(x, None, *weights, backend="cuda")
    corner = (..., slice(-72, None), slice(-72, None))
    expected, (_, c_expected) = conv_lstm(x[corner].contiguous(), None, *weights, backend="cuda")
    inner = (..., slice(8, None), slice(8, None))  # beyond what the cut reaches in two steps
    torch.testing.assert_close(out[corner][inner], expected[inner])
    torch.testing.assert_close(c_last[corner][inner], c_expected[inner])


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
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
    with pytest.raises(ValueError, match="at most 32; x has 4, the state 64"):
        conv_lstm(x, None, *weights, backend="cuda")
