"""The Triton kernels of conv_lstm: in the interpreter, compiled for GPUs, and on one."""

import functools
import math

import pytest
import torch
from checks import nan_filled_memory
from checks_conv_lstm import (
    assert_like_float64,
    lstm_gradients,
    lstm_inputs,
    lstm_results,
    through_conv_lstm,
)
from checks_triton import (
    DEVICE,
    INTERPRET,
    SHARED_MEMORY,
    TYPE_NAMES,
    compile_for,
    compiled_only,
    figures,
    on_device,
    on_gpu,
    recorded_launches,
    run_in_the_interpreter,
)
from checks_triton import compilations as compilations_of

from vsod_ops import triton_tuning
from vsod_ops.conv_lstm import conv_lstm, op, reference
from vsod_ops.conv_lstm.triton import backward, forward, launch, plan, tiles


@compiled_only
def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=20)


draw = functools.partial(lstm_inputs, device=DEVICE)


def tensors_of(*shape, **options):
    """The op's seven tensors."""
    return list(draw(*shape, **options).values())


def check(inputs, **options):
    """Hold out, c_T and all gradients to float64 by the error rule."""
    dilation = options.get("dilation", 1)
    grads = lstm_gradients(inputs)
    actual = lstm_results(through_conv_lstm("triton", **options), inputs, grads)
    assert_like_float64(actual, inputs, grads, dilation, narrow_state=True)


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


SMALL = dict(batch=2, steps=2, channels=4, hidden=3, height=3, width=5)


@on_device
@pytest.mark.parametrize("order", ((1, 0, 2, 3, 4), (0, 1, 3, 4, 2), (4, 3, 2, 1, 0)))
def test_strides_in_nan_filled_memory(order):
    with nan_filled_memory():
        inputs = draw(**SMALL, dtype=torch.float32, peephole="full")
        inputs["x"] = permuted(inputs["x"], order)
        inputs["h"] = permuted(inputs["h"], (3, 0, 2, 1))
        check(inputs, recompute=order[0] == 1)


@on_device
def test_channels_last_x_is_read_where_it_lies(monkeypatch):
    packed = []
    monkeypatch.setattr(launch, "pack", lambda planes, rows: packed.append(planes))
    x = permuted(torch.randn(2, 1, 32, 3, 5, device=DEVICE), (0, 1, 3, 4, 2))
    assert launch.as_rows(x).data_ptr() == x.data_ptr() and not packed
    assert launch.as_rows(x.contiguous()).shape == (2, 1, 15, 32) and len(packed) == 1


def kernel_results(tensors, grad_out, grad_c):
    kept = launch.forward(*tensors, 1, op.SAVE_GATES)
    return [*kept, *launch.backward(grad_out, grad_c, *tensors, *kept, 1, [True] * 7)]


@on_device
def test_repeats_are_equal_to_the_bit_and_split_sums_are_right():
    tensors = tensors_of(1, 2, 2, 3, 9, 15, torch.float32, kernel=1, peephole="channel")
    x = tensors[0]
    call = launch.Call(x, tensors[4], tensors[6], 1)
    assert call.pixels > 4 * plan.INTERPRETER_TILES["weight"].pixels  # so there are partial sums
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
    tensors = tensors_of(1, 2, 2, 3, 3, 5, torch.float32, peephole="full")
    grad_out = torch.randn(1, 2, 3, 3, 5, device=DEVICE)
    kept = launch.forward(*tensors, 1, op.SAVE_GATES)
    every = launch.backward(grad_out, None, *tensors, *kept, 1, [True] * 7)
    masks = [[i == j for i in range(7)] for j in range(7)] + [[False] * 7]
    for needs in masks:
        grads = launch.backward(grad_out, None, *tensors, *kept, 1, needs)
        for need, gradient, expected in zip(needs, grads, every, strict=True):
            if need:
                torch.testing.assert_close(gradient, expected)
            else:
                assert gradient.shape == (0,)


@on_device
@pytest.mark.parametrize("which", ("out", "c_T", "expanded"))
def test_one_output_alone_has_a_gradient(which):
    tensors = tensors_of(**SMALL, dtype=torch.float32)
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
    tensors = tensors_of(**SMALL, dtype=torch.float32, peephole="channel")
    out, c_last, cells, gates = launch.forward(*tensors, 1, op.SAVE_GATES)
    expected = reference.forward(*tensors, 1, op.SAVE_GATES)
    for actual, wanted in zip((out, c_last, cells), expected, strict=False):
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, wanted)
    assert gates.shape == expected[3].shape
    for save in (op.SAVE_NOTHING, op.SAVE_CELLS):
        less = launch.forward(*tensors, 1, save)
        assert torch.equal(less[0], out) and torch.equal(less[1], c_last)
        assert less[2].shape == (cells.shape if save else (0,)) and less[3].shape == (0,)


@on_device
def test_chunks_equal_the_whole():
    x, h, c, *weights = tensors_of(1, 4, 2, 3, 3, 4, torch.bfloat16, peephole="full")
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
    kept = launch.forward(
        x, None, None, weight_ih, weight_hh, values.repeat(4), None, 1, op.SAVE_GATES
    )
    i, f, g, o = kept[3].view(4, n).double()
    sigmoid, tanh = values.double().sigmoid(), values.double().tanh()
    for actual, expected in ((i, sigmoid), (f, sigmoid), (o, sigmoid), (g, tanh)):
        torch.testing.assert_close(actual, expected, rtol=5e-7, atol=1e-38, equal_nan=True)
    torch.testing.assert_close(
        kept[1].view(n).double(), sigmoid * tanh, rtol=1e-6, atol=1e-38, equal_nan=True
    )


@on_device
def test_nan_and_inf_reach_the_same_elements_as_in_the_reference():
    tensors = tensors_of(1, 2, 2, 3, 7, 9, torch.float32)
    tensors[0][0, 0, 1, 2, 3] = math.nan
    tensors[0][0, 1, 0, 6, 8] = math.inf
    for actual, expected in zip(
        launch.forward(*tensors, 1, op.SAVE_CELLS), reference.forward(*tensors, 1, 1), strict=True
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@on_device
def test_huge_dilation_leaves_the_middle_tap():
    tensors = tensors_of(1, 1, 2, 3, 3, 4, torch.float32)
    out = launch.forward(*tensors, 2**40, op.SAVE_NOTHING)[0]
    middle = [t[..., 1:2, 1:2].contiguous() if t.dim() == 4 else t for t in tensors[3:5]]
    expected = reference.forward(*tensors[:3], *middle, *tensors[5:], 1, op.SAVE_NOTHING)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_too_many_pixels_is_an_error():
    x = torch.empty(1, 1, 1, 1, 1).expand(1, 2**12, 1, 2**10, 2**10)
    with pytest.raises(ValueError, match="x has 4294967296 pixels"):
        launch.Call(x, torch.empty(4, 1, 1, 1), None, 1)


@compiled_only
def test_nothing_is_timed_again_when_only_the_batch_changes(monkeypatch):
    timed = []

    def milliseconds(launch, tile):
        timed.append(tile)
        # Twice the tile in 1.5 times the time.
        return 1.5 if tile.pixels * tile.channels >= 4096 else 1.0

    monkeypatch.setattr(triton_tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(triton_tuning, "is_capturing", lambda: False)
    monkeypatch.setattr(launch, "timings", triton_tuning.Timings())
    call = launch.Call(
        torch.empty(1, 1, 64, 64, 64, dtype=torch.bfloat16), torch.empty(256, 64, 3, 3), None, 1
    )
    chosen = {}
    for batch in (1, 2, 4, 8, 64):
        chosen[batch] = call.choose_tile(
            *("forward", ("shape",)),
            lambda t, batch=batch: plan.cdiv(
                plan.cdiv(4096 * batch, t.pixels) * plan.cdiv(64, t.channels), 132
            ),
            lambda t: None,
        )
    assert len(timed) == len(plan.TILES["forward", "hopper", "half"])
    assert chosen[64].pixels >= chosen[1].pixels


@compiled_only
def test_steps_are_not_compiled_in(monkeypatch):
    """More steps, another step or a larger batch need no kernel of their own."""
    device = triton_tuning.Device(8, 108, SHARED_MEMORY[80])
    monkeypatch.setattr(triton_tuning, "describe", lambda index: device)
    monkeypatch.setattr(triton_tuning, "is_capturing", lambda: True)  # so nothing is timed
    variants = []
    for batch, steps in ((2, 4), (3, 18), (17, 33)):
        with recorded_launches(80) as launches:
            for save in (op.SAVE_NOTHING, op.SAVE_CELLS, op.SAVE_GATES):
                sizes = (batch, steps, 3, 5, 4, 8)
                tensors = tensors_of(*sizes, torch.bfloat16, kernel=1, peephole="channel")
                kept = launch.forward(*tensors, 1, save)
                if save:
                    launch.backward(kept[0], None, *tensors, *kept, 1, [True] * 7)
        variants.append({(name, str(kinds)) for name, kinds in launches})
    assert variants[0] == variants[1] == variants[2]
    names = [name for name, _ in variants[0]]
    assert names.count("conv_lstm_fwd_kernel") <= 8 and names.count("conv_lstm_bwd_kernel") <= 4


KERNELS = {
    "forward": forward.conv_lstm_fwd_kernel,
    "backward": backward.conv_lstm_bwd_kernel,
    "input": backward.conv_lstm_bwd_input_kernel,
    "weight": backward.conv_lstm_bwd_weight_kernel,
    "sums": backward.conv_lstm_bwd_sums_kernel,
    "pack": forward.conv_lstm_pack_kernel,
}
FLOAT_POINTERS = {"p_c", "p_c_new", "p_c_last", "p_cells", "p_dc", "p_dc_new"}
FLOAT_POINTERS |= {"p_partial", "p_sums", "p_full"}
# Multiples of 16 whatever the shape; and those that are where H * W is.
PADDED = {"CP", "MP", "depth", "width_ih", "width_hh"}
ALIGNED = {"area", "width", "height", "hidden", "n_channels"}
BUNDLES = {
    "size": (tiles.Sizes, ""),
    "grad": (tiles.Strided, "grad."),
    "planes": (tiles.Strided, "planes."),
}


def compile_kernel(kernel, capability, dtype, constants, warps, stages, aligned=True):
    """The kernel for an architecture, with every pointer given."""
    signature, attributes, positions = {}, {}, {}

    def parameter(name, path):
        """What the compiler is told about an argument, or about an entry of one."""
        pointer = name.startswith("p_") or name.endswith(".p")
        if name in PADDED or pointer or (aligned and name in ALIGNED):
            attributes[path] = [["tt.divisibility", 16]]
        if name in constants:
            positions[path] = constants[name]
            return "constexpr"
        if pointer:
            return "*fp32" if name in FLOAT_POINTERS else "*" + TYPE_NAMES[dtype]
        return "i32"

    for index, name in enumerate(kernel.arg_names):
        if name in BUNDLES:
            bundle, prefix = BUNDLES[name]
            entries = enumerate(bundle._fields)
            signature[name] = bundle(*(parameter(prefix + x, (index, i)) for i, x in entries))
        else:
            signature[name] = parameter(name, (index,))
    return compile_for(
        kernel, capability, signature, positions,
        warps=warps, stages=stages, attributes=attributes,
    )  # fmt: skip


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
        device = triton_tuning.Device(capability // 10, 132, SHARED_MEMORY[capability])
        for kind in ("forward", "backward", "weight") if aligned else ("forward", "backward"):
            for tile in plan.admitted_tiles(kind, device, dtype, precision, aligned):
                yield kind, capability, dtype, precision, aligned, tile
        if aligned:
            tile = plan.admitted_tiles("backward", device, dtype, precision, aligned)[0]
            yield "input", capability, dtype, precision, aligned, tile


@pytest.fixture(scope="module")
def compilations():
    with compilations_of(compile_tile, list(compile_cases())) as compiled:
        yield compiled


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
    pixels, channels = plan.SUMS_TILE
    sums = {"PEEPHOLE": True, "BP": pixels, "BM": channels}
    pixels, channels = plan.PACK_TILE
    pack = {"BP": pixels, "BC": channels}
    pointwise = plan.POINTWISE_TILE
    without = {"K": 3, "PRECISION": "ieee", "INTERPRET": False, "FULL": True, "p_weight": None}
    without |= {"BP": pointwise.pixels, "BM": pointwise.channels, "BK": pointwise.depth}
    for kind, constants in (("sums", sums), ("pack", pack), ("backward", without)):
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
        ("backward", "grad.p p_dc", ONES),
        ("backward", "p_c p_peephole", {}),
        ("input", "", ONES),
        ("weight", "", ONES),
        ("sums", "p_c p_full", ONES),
        ("sums", "p_c", {}),
        ("pack", "", ONES | dict.fromkeys((f"planes.{axis}" for axis in "btcyx"), 1)),
    ],
)
def test_compiles_without_some_pointers_and_with_sizes_of_1(kind, missing, sizes):
    """A size of 1 and a missing pointer are constants to the compiler."""
    constants = {"K": 1, "PRECISION": "ieee", "INTERPRET": False, "FULL": "p_h" in missing}
    constants |= {"BP": 32, "BM": 16, "BN": 16, "BK": 16, "BC": 16, "PEEPHOLE": True}
    constants |= sizes | dict.fromkeys(missing.split())
    kernel = KERNELS[kind]
    assert figures(compile_kernel(kernel, 90, torch.bfloat16, constants, 4, 2))[1] == 0


def gpu_results(tensors):
    grad_out = torch.ones_like(tensors[0][:, :, :1].expand(-1, -1, tensors[4].shape[1], -1, -1))
    return kernel_results(tensors, grad_out, None)


@on_gpu
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    @pytest.mark.parametrize("peephole", (None, "channel", "full"))
    @pytest.mark.parametrize("size", (28, 33))
    def test_many_channels(self, dtype, peephole, size):
        inputs = draw(2, 3, 64, 96, size, size, dtype, peephole=peephole)
        check(inputs, recompute=peephole == "full")

    def test_cuda_graph_and_side_stream(self):
        tensors = tensors_of(2, 3, 64, 64, 28, 28, torch.bfloat16, peephole="channel")
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
        inputs = draw(2, 1, 8, 8, 16, 16, torch.bfloat16)
        far = torch.empty(2, 2**30 + 1, dtype=torch.bfloat16, device=DEVICE)[:, :2048]
        far = far.view(2, 1, 8, 16, 16).copy_(inputs["x"])
        check(inputs | {"x": far})

    def test_tf32_follows_torch(self):
        tensors = tensors_of(1, 1, 64, 64, 16, 16, torch.float32)
        exact = launch.forward(*tensors, 1, op.SAVE_NOTHING)[0]
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            rounded = launch.forward(*tensors, 1, op.SAVE_NOTHING)[0]
        finally:
            torch.set_float32_matmul_precision(before)
        assert not torch.equal(exact, rounded)
        torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
