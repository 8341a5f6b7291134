"""The Triton kernels of conv_lstm: in the interpreter, compiled for GPUs, and on one.

Kernel tests run on CUDA tensors where there is a GPU, and on CPU tensors under TRITON_INTERPRET=1,
which must be set before triton is first imported: `test_kernels_in_the_interpreter` runs this file
once more in a process of its own that has it.  Compile tests need no GPU.
"""

import functools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from checks import assert_error_bound, nan_filled_memory
from torch.nn import functional as F

from vsod_ops.conv_lstm import conv_lstm, op, reference

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vsod_ops.conv_lstm import triton_kernels as tk  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"

needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRET, reason="no GPU, and not in the interpreter"
)
compiled_only = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")


def on_device(test):
    """On a GPU, where `-m cuda` selects it, or in the interpreter."""
    return pytest.mark.cuda(needs_device(test))


@compiled_only
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 20, done.stdout + done.stderr


NAMES = ("x", "h", "c", "weight_ih", "weight_hh", "bias", "weight_peephole")


def draw(
    batch, steps, channels, hidden, height, width, kernel, dtype, peephole=None, state=True,
    bias=True, seed=0,
):  # fmt: skip
    """The op's seven tensors, c in the cell state's dtype; peephole: None, "channel" or "full"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=dtype):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).to(DEVICE)

    scale = (kernel**2 * (channels + hidden)) ** -0.5
    plane = (hidden, height, width)
    return [
        normal(batch, steps, channels, height, width),
        normal(batch, *plane) if state else None,
        normal(batch, *plane, dtype=op.state_dtype(dtype)) if state else None,
        normal(4 * hidden, channels, kernel, kernel, scale=scale),
        normal(4 * hidden, hidden, kernel, kernel, scale=scale),
        normal(4 * hidden) if bias else None,
        None if peephole is None else normal(3, *(plane if peephole == "full" else plane[:1])),
    ]


def eager(x, state, weight_ih, weight_hh, bias, weight_peephole, dilation):
    """The definition in x's own dtype, as a user would write it."""
    options = {"dilation": dilation, "padding": dilation * (weight_hh.shape[-1] // 2)}
    shape = (x.shape[0], weight_hh.shape[1], *x.shape[3:])
    h, c = (x.new_zeros(shape), x.new_zeros(shape)) if state is None else state
    p = [0.0] * 3 if weight_peephole is None else weight_peephole
    if weight_peephole is not None and weight_peephole.dim() == 2:
        p = weight_peephole[:, :, None, None]
    out = []
    for x_t in x.unbind(1):
        gates = F.conv2d(x_t, weight_ih, bias, **options) + F.conv2d(h, weight_hh, **options)
        i, f, g, o = gates.chunk(4, 1)
        c = (f + p[1] * c).sigmoid() * c + (i + p[0] * c).sigmoid() * g.tanh()
        h = (o + p[2] * c).sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out, 1), (h, c)


def results(function, tensors, dtype=None, state_dtype=None):
    """name -> out, c_T and the gradient of every tensor, under fixed output gradients."""

    def leaf(name, t):
        to = state_dtype if name == "c" and state_dtype else dtype
        return None if t is None else t.detach().to(to or t.dtype).requires_grad_()

    leaves = {name: leaf(name, t) for name, t in zip(NAMES, tensors, strict=True)}
    x, h, c, *weights = leaves.values()
    out, (_, c_last) = function(x, None if h is None else (h, c), *weights)
    generator = torch.Generator().manual_seed(7)
    grads = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(tensors[0].dtype).to(y)
        for y in (out, c_last)
    ]
    given = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad([out, c_last], list(given.values()), grads)
    found = {f"d{name}": g for name, g in zip(given, found, strict=True)}
    return {"out": out.detach(), "c_T": c_last.detach(), **found}


def check(tensors, dilation=1, recompute=False):
    """Hold out, c_T and all gradients to float64 by the error rule."""
    dtype = tensors[0].dtype

    def ours(*args):
        return conv_lstm(*args, dilation=dilation, recompute=recompute, backend="triton")

    plain = functools.partial(eager, dilation=dilation)
    actual = results(ours, tensors)
    rival = results(plain, tensors, dtype, dtype)
    for name, expected in results(plain, tensors, torch.float64, torch.float64).items():
        assert_error_bound(name, actual[name], rival[name], expected, dtype)


SHAPES = {
    "two tiles across frames": dict(batch=2, steps=3, channels=3, hidden=5, height=5, width=7),
    "padded hidden tile": dict(batch=1, steps=2, channels=20, hidden=17, height=3, width=5),
    "smaller than the kernel": dict(batch=2, steps=2, channels=1, hidden=1, height=1, width=2),
    "several tiles": dict(batch=1, steps=1, channels=33, hidden=8, height=9, width=13),
}


@on_device
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("two tiles across frames", dict(kernel=3, peephole="channel")),
        ("two tiles across frames", dict(kernel=3, peephole="full", dilation=2)),
        ("padded hidden tile", dict(kernel=1, peephole="full", recompute=True)),
        ("padded hidden tile", dict(kernel=3, state=False)),
        ("smaller than the kernel", dict(kernel=5, peephole="channel", dilation=2)),
        ("smaller than the kernel", dict(kernel=3, peephole="full", state=False, recompute=True)),
        ("several tiles", dict(kernel=3, bias=False, peephole="channel", state=False)),
        ("several tiles", dict(kernel=1, state=True, dilation=3)),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "-".join(map(str, x.values())),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_error_rule(shape, options, dtype):
    if INTERPRET and dtype == torch.float16 and shape != "padded hidden tile":
        pytest.skip("the interpreter treats float16 as it does float32")
    options = dict(options)
    calls = {k: options.pop(k) for k in ("dilation", "recompute") if k in options}
    check(draw(**SHAPES[shape], dtype=dtype, **options), **calls)


def permuted(x, order):
    """The same values, in memory in the order of the dimensions `order`."""
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


SMALL = dict(batch=2, steps=2, channels=4, hidden=3, height=3, width=5, kernel=3)


@on_device
@pytest.mark.parametrize("order", ((1, 0, 2, 3, 4), (0, 1, 3, 4, 2), (4, 3, 2, 1, 0)))
def test_strides_in_nan_filled_memory(order):
    with nan_filled_memory():
        tensors = draw(**SMALL, dtype=torch.float32, peephole="full")
        tensors[0] = permuted(tensors[0], order)
        tensors[1] = permuted(tensors[1], (3, 0, 2, 1))
        check(tensors, recompute=order[0] == 1)


@on_device
def test_channels_last_x_is_read_where_it_lies(monkeypatch):
    packed = []
    monkeypatch.setattr(tk, "_pack", lambda planes, rows: packed.append(planes))
    x = permuted(torch.randn(2, 1, 32, 3, 5, device=DEVICE), (0, 1, 3, 4, 2))
    assert tk._as_rows(x).data_ptr() == x.data_ptr() and not packed
    assert tk._as_rows(x.contiguous()).shape == (2, 1, 15, 32) and len(packed) == 1


def kernel_results(tensors, grad_out, grad_c):
    kept = tk.forward(*tensors, 1, op.SAVE_GATES)
    return [*kept, *tk.backward(grad_out, grad_c, *tensors, *kept, 1, [True] * 7)]


@on_device
def test_repeats_are_equal_to_the_bit_and_split_sums_are_right():
    tensors = draw(1, 2, 2, 3, 9, 15, 1, torch.float32, peephole="channel")
    x = tensors[0]
    call = tk._Call(x, tensors[4], tensors[6], 1)
    assert call.pixels > 4 * tk._INTERPRETER_TILES["weight"].pixels  # so there are partial sums
    grad_out, grad_c = (
        torch.randn_like(tensors[1].expand(1, 3, 9, 15)),
        torch.randn_like(tensors[2]),
    )
    grad_out = torch.stack([grad_out, -grad_out], 1)
    first = kernel_results(tensors, grad_out, grad_c)
    for a, b in zip(first, kernel_results(tensors, grad_out, grad_c), strict=True):
        assert torch.equal(a, b)
    kept = reference.forward(*tensors, 1, op.SAVE_GATES)
    expected = reference.backward(grad_out, grad_c, *tensors, *kept, 1, [True] * 7)
    for a, b in zip(first[4:], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on_device
def test_only_the_gradients_that_are_needed():
    tensors = draw(1, 2, 2, 3, 3, 5, 3, torch.float32, peephole="full")
    grad_out = torch.randn(1, 2, 3, 3, 5, device=DEVICE)
    kept = tk.forward(*tensors, 1, op.SAVE_GATES)
    every = tk.backward(grad_out, None, *tensors, *kept, 1, [True] * 7)
    masks = [[i == j for i in range(7)] for j in range(7)] + [[False] * 7]
    for needs in masks:
        grads = tk.backward(grad_out, None, *tensors, *kept, 1, needs)
        for need, gradient, expected in zip(needs, grads, every, strict=True):
            if need:
                torch.testing.assert_close(gradient, expected)
            else:
                assert gradient.shape == (0,)


@on_device
@pytest.mark.parametrize("which", ("out", "c_T", "expanded"))
def test_one_output_alone_has_a_gradient(which):
    tensors = draw(**SMALL, dtype=torch.float32)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        x, h, c, *weights = leaves
        out, (_, c_last) = conv_lstm(x, (h, c), *weights, backend=backend)
        y = {"out": out.square(), "c_T": c_last.square(), "expanded": out}[which].sum()
        grads.append(torch.autograd.grad(y, [t for t in leaves if t is not None]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on_device
def test_what_forward_keeps():
    tensors = draw(**SMALL, dtype=torch.float32, peephole="channel")
    out, c_last, cells, gates = tk.forward(*tensors, 1, op.SAVE_GATES)
    expected = reference.forward(*tensors, 1, op.SAVE_GATES)
    for actual, wanted in zip((out, c_last, cells), expected, strict=False):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, wanted)
    assert gates.shape == expected[3].shape
    for save in (op.SAVE_NOTHING, op.SAVE_CELLS):
        less = tk.forward(*tensors, 1, save)
        assert torch.equal(less[0], out) and torch.equal(less[1], c_last)
        assert less[2].shape == (cells.shape if save else (0,)) and less[3].shape == (0,)


@on_device
def test_chunks_equal_the_whole():
    x, h, c, *weights = draw(1, 4, 2, 3, 3, 4, 3, torch.bfloat16, peephole="full")
    whole, (_, c_last) = conv_lstm(x, (h, c), *weights, backend="triton")
    first, state = conv_lstm(x[:, :1], (h, c), *weights, backend="triton")
    second, (_, c_chunked) = conv_lstm(x[:, 1:], state, *weights, backend="triton")
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(c_chunked, c_last)


@on_device
def test_ends_of_the_range():
    """sigmoid, tanh at +-1e4 and +-inf; NaN stays NaN: gates set by the bias alone."""
    values = torch.tensor(
        [0.0, 1e-8, -1e-3, 0.3, 0.599, 0.601, -3.0, 8.9, -20.0, 88.0, -88.0, 1e4, -1e4, math.inf,
         -math.inf, math.nan], device=DEVICE,
    )  # fmt: skip
    n = len(values)
    x, weight_ih = torch.zeros(1, 1, 1, 1, 1, device=DEVICE), torch.zeros(4 * n, 1, 1, 1).to(DEVICE)
    weight_hh = torch.zeros(4 * n, n, 1, 1, device=DEVICE)
    kept = tk.forward(x, None, None, weight_ih, weight_hh, values.repeat(4), None, 1, op.SAVE_GATES)
    i, f, g, o = kept[3].view(4, n).double()
    sigmoid, tanh = values.double().sigmoid(), values.double().tanh()
    for actual, expected in ((i, sigmoid), (f, sigmoid), (o, sigmoid), (g, tanh)):
        torch.testing.assert_close(actual, expected, rtol=5e-7, atol=1e-38, equal_nan=True)
    torch.testing.assert_close(
        kept[1].view(n).double(), sigmoid * tanh, rtol=1e-6, atol=1e-38, equal_nan=True
    )


@on_device
def test_nan_and_inf_reach_the_same_elements_as_in_the_reference():
    tensors = draw(1, 2, 2, 3, 7, 9, 3, torch.float32)
    tensors[0][0, 0, 1, 2, 3] = math.nan
    tensors[0][0, 1, 0, 6, 8] = math.inf
    for actual, expected in zip(
        tk.forward(*tensors, 1, op.SAVE_CELLS), reference.forward(*tensors, 1, 1), strict=True
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@on_device
def test_huge_dilation_leaves_the_middle_tap():
    tensors = draw(1, 1, 2, 3, 3, 4, 3, torch.float32)
    out = tk.forward(*tensors, 2**40, op.SAVE_NOTHING)[0]
    middle = [t[..., 1:2, 1:2].contiguous() if t.dim() == 4 else t for t in tensors[3:5]]
    expected = reference.forward(*tensors[:3], *middle, *tensors[5:], 1, op.SAVE_NOTHING)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_too_many_pixels_is_an_error():
    x = torch.empty(1, 1, 1, 1, 1).expand(1, 2**12, 1, 2**10, 2**10)
    with pytest.raises(ValueError, match="x has 4294967296 pixels"):
        tk._Call(x, torch.empty(4, 1, 1, 1), None, 1)


@compiled_only
def test_nothing_is_timed_again_when_only_the_batch_changes(monkeypatch):
    timed = []

    def bench(function, **_):
        timed.append(function.__defaults__[0])
        # Twice the tile in 1.5 times the time.
        return 1.5 if timed[-1].pixels * timed[-1].channels >= 4096 else 1.0

    monkeypatch.setattr(triton.testing, "do_bench", bench)
    monkeypatch.setattr(tk, "_rates", {})
    monkeypatch.setattr(tk, "_device", lambda index: tk._Device(9, 132, 232448))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = torch.empty(1, dtype=torch.bfloat16)
    chosen = {}
    for batch in (1, 2, 4, 8, 64):
        chosen[batch] = tk._choose(
            *("forward", x, ("shape",), "ieee", True),
            lambda t, batch=batch: triton.cdiv(
                triton.cdiv(4096 * batch, t.pixels) * triton.cdiv(64, t.channels), 132
            ),
            lambda t: None,
        )
    assert len(timed) == len(tk._TILES["forward", "hopper", "half"])
    assert chosen[64].pixels >= chosen[1].pixels


SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = {
    "forward": tk.conv_lstm_fwd_kernel,
    "backward": tk.conv_lstm_bwd_kernel,
    "input": tk.conv_lstm_bwd_input_kernel,
    "weight": tk.conv_lstm_bwd_weight_kernel,
    "sums": tk.conv_lstm_bwd_sums_kernel,
    "pack": tk.conv_lstm_pack_kernel,
}
FLOAT_POINTERS = {"p_c", "p_c_new", "p_c_last", "p_cells", "p_dc", "p_dc_new"}
FLOAT_POINTERS |= {"p_partial", "p_sums", "p_full"}
# Multiples of 16 whatever the shape; and those that are where H * W is.
PADDED = {"CP", "MP", "depth", "width_ih", "width_hh"}
ALIGNED = {"area", "width", "height", "hidden", "n_channels"}


def compile_kernel(kernel, capability, dtype, constants, warps, stages, aligned=True):
    """The kernel for an architecture, with the options of a launch and every pointer given."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in FLOAT_POINTERS else "*" + TYPE_NAMES[dtype]
        else:
            signature[name] = "i32"
        if name in PADDED or name.startswith("p_") or (aligned and name in ALIGNED):
            attributes[(index,)] = [["tt.divisibility", 16]]
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, positions, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def figures(kernel):
    """(registers, bytes of stack and local memory, shared memory, tensor core instructions)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    products = set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", kernel.asm["ptx"]))
    registers, stack, local = (int(x) for x in match.groups())
    return registers, stack + local, kernel.metadata.shared, products


def compile_tile(kind, capability, dtype, precision, aligned, tile):
    constants = {"K": 3, "PRECISION": precision, "INTERPRET": False, "BP": tile.pixels}
    constants |= {"BM": tile.channels, "BN" if kind == "weight" else "BK": tile.depth}
    if kind in ("forward", "backward"):
        constants["FULL"] = True
    kernel = compile_kernel(
        KERNELS[kind], capability, dtype, constants, tile.warps, tile.stages, aligned
    )
    return figures(kernel)


def compile_cases():
    """Every tile that may be launched; the input kernel is the backward one with less to do."""
    bf16, fp32 = torch.bfloat16, torch.float32
    machines = [(c, bf16, "ieee", a) for c in (90, 80, 100) for a in (True, False)]
    machines += [(90, fp32, precision, a) for precision in ("ieee", "tf32") for a in (True, False)]
    for capability, dtype, precision, aligned in machines:
        device = tk._Device(capability // 10, 132, SHARED_MEMORY[capability])
        for kind in ("forward", "backward", "weight") if aligned else ("forward", "backward"):
            for tile in tk.admitted_tiles(kind, device, dtype, precision, aligned):
                yield kind, capability, dtype, precision, aligned, tile
        if aligned:
            tile = tk.admitted_tiles("backward", device, dtype, precision, aligned)[0]
            yield "input", capability, dtype, precision, aligned, tile


@pytest.fixture(scope="module")
def compilations():
    """Compilations in two processes at once, all begun when the first is asked for."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:

        @functools.cache
        def begin():
            return {case: pool.submit(compile_tile, *case) for case in compile_cases()}

        yield lambda case: begin()[case].result()


@compiled_only
@pytest.mark.parametrize(
    "case", list(compile_cases()), ids=lambda c: "-".join(map(str, [*c[:-1], *c[-1]]))
)
def test_compiles_without_spills(case, compilations):
    _, capability, dtype, precision, _, _ = case
    registers, spilled, shared, products = compilations(case)
    print(f"{registers} registers, {spilled} bytes spilled, {shared} bytes shared, {products}")
    assert spilled == 0
    assert shared <= SHARED_MEMORY[capability]
    if dtype == torch.bfloat16:
        expected = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert products == {expected}
    elif precision == "tf32":
        assert products


@compiled_only
@pytest.mark.parametrize("capability", (80, 90, 100))
def test_small_kernels_compile_without_spills(capability):
    pixels, channels = tk._SUMS_TILE
    sums = {"PEEPHOLE": True, "BP": pixels, "BM": channels}
    pixels, channels = tk._PACK_TILE
    pack = {"BP": pixels, "BC": channels}
    pointwise = tk._POINTWISE_TILE
    backward = {"K": 3, "PRECISION": "ieee", "INTERPRET": False, "FULL": True, "p_weight": None}
    backward |= {"BP": pointwise.pixels, "BM": pointwise.channels, "BK": pointwise.depth}
    for kind, constants in (("sums", sums), ("pack", pack), ("backward", backward)):
        kernel = compile_kernel(
            KERNELS[kind], capability, torch.bfloat16, constants, 4, 1, aligned=False
        )
        assert figures(kernel)[1] == 0, kind


ONES = dict.fromkeys(("hidden", "n_channels", "height", "width", "area", "dilation"), 1)


@compiled_only
@pytest.mark.parametrize(
    ("kind", "missing", "sizes"),
    [
        ("forward", "p_h p_c p_peephole p_gates p_h_new", {}),
        ("forward", "p_bias", ONES),
        ("forward", "p_out p_h_new p_h p_c", {}),
        ("backward", "p_grad p_dc", ONES),
        ("backward", "p_c p_peephole", {}),
        ("input", "", ONES),
        ("weight", "", ONES),
        ("sums", "p_c p_full", ONES),
        ("sums", "p_c", {}),
        ("pack", "", ONES | dict.fromkeys(("s_b", "s_t", "s_c", "s_y", "s_x"), 1)),
    ],
)
def test_compiles_without_some_pointers_and_with_sizes_of_1(kind, missing, sizes):
    """A size of 1 and a missing pointer are constants to the compiler."""
    constants = {"K": 1, "PRECISION": "ieee", "INTERPRET": False, "FULL": "p_h" in missing}
    constants |= {"BP": 32, "BM": 16, "BN": 16, "BK": 16, "BC": 16, "PEEPHOLE": True}
    constants |= sizes | dict.fromkeys(missing.split())
    kernel = KERNELS[kind]
    constants = {name: x for name, x in constants.items() if name in kernel.arg_names}
    assert figures(compile_kernel(kernel, 90, torch.bfloat16, constants, 4, 2))[1] == 0


on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
]


def gpu_results(tensors):
    grad_out = torch.ones_like(tensors[0][:, :, :1].expand(-1, -1, tensors[4].shape[1], -1, -1))
    return kernel_results(tensors, grad_out, None)


class TestOnAGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("peephole", (None, "channel", "full"))
    @pytest.mark.parametrize("size", (28, 33))
    def test_many_channels(self, dtype, peephole, size):
        tensors = draw(2, 3, 64, 96, size, size, 3, dtype, peephole=peephole)
        check(tensors, recompute=peephole == "full")

    def test_cuda_graph_and_side_stream(self):
        tensors = draw(2, 3, 64, 64, 28, 28, 3, torch.bfloat16, peephole="channel")
        expected = gpu_results(tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_stream = gpu_results(tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gpu_results(tensors)
        graph.replay()
        for a, b, c in zip(expected, on_stream, captured, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)

    def test_more_than_2_to_the_31_elements(self):
        x, h, c, *weights = draw(2, 1, 8, 8, 16, 16, 3, torch.bfloat16)
        far = torch.empty(2, 2**30 + 1, dtype=torch.bfloat16, device=DEVICE)[:, :2048]
        far = far.view(2, 1, 8, 16, 16).copy_(x)
        check([far, h, c, *weights])

    def test_tf32_follows_torch(self):
        tensors = draw(1, 1, 64, 64, 16, 16, 3, torch.float32)
        exact = tk.forward(*tensors, 1, op.SAVE_NOTHING)[0]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            rounded = tk.forward(*tensors, 1, op.SAVE_NOTHING)[0]
        finally:
            torch.set_float32_matmul_precision(before)
        assert not torch.equal(exact, rounded)
        torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
