"""conv_lstm: definition, gradients, arguments, torch integration, the CPU kernel."""

import math
import os
import subprocess
import sys

import pytest
import torch
from checks import (
    BACKENDS,
    CPU_MODULE,
    DTYPES,
    assert_two_threads_agree,
    nan_filled_memory,
    needs_cpu,
)
from checks_conv_lstm import (
    NAMES,
    check_conv_lstm,
    eager_conv_lstm,
    lstm_inputs,
    lstm_sweep_case,
    moved,
)

from vsod_ops import conv_lstm, conv_lstm_cell
from vsod_ops.conv_lstm.op import SAVE_CELLS, SAVE_GATES, SAVE_NOTHING

OP = torch.ops.vsod_ops.conv_lstm.default


def small(dtype=torch.float32, **options):
    options = {"peephole": "channel"} | options
    return lstm_inputs(2, 3, 3, 2, 5, 6, dtype, **options)


def call(inputs, **options):
    x, h, c, *others = inputs.values()
    return conv_lstm(x, None if h is None else (h, c), *others, **options)


def require_grad(inputs, wanted=NAMES):
    return {
        name: None if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in inputs.items()
    }


# ---- truth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("peephole", (None, "channel", "full"))
@pytest.mark.parametrize("dilation", (1, 2))
@pytest.mark.parametrize("recompute", (False, True))
def test_gradcheck(backend, peephole, dilation, recompute):
    torch.set_num_threads(1)  # thousands of tiny calls
    inputs = require_grad(lstm_inputs(2, 2, 2, 1, 2, 3, torch.float64, peephole=peephole))
    leaves = [t for t in inputs.values() if t is not None]

    def f(x, h, c, *others):
        out, (h_last, c_last) = conv_lstm(
            x, (h, c), *others, dilation=dilation, recompute=recompute, backend=backend
        )
        return out, h_last, c_last

    assert torch.autograd.gradcheck(f, leaves)


# (B, T, C, M, H, W), around the sizes of vectors, register tiles and gate panels.
SHAPES = [
    ((2, 3, 4, 4, 17, 63), dict(peephole="full")),
    ((1, 1, 1, 1, 1, 1), dict(state=False)),
    ((1, 2, 5, 9, 7, 130), dict(kernel=5, peephole="channel")),
    ((3, 2, 2, 3, 9, 33), dict(kernel=1, bias=False)),
    ((1, 4, 4, 16, 40, 113), dict(state=False)),
    ((2, 2, 24, 20, 12, 20), dict(peephole="channel")),
    ((1, 2, 40, 33, 16, 16), dict()),
    ((1, 2, 2, 2, 2, 600), dict(peephole="full", bias=False)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, options", SHAPES, ids=lambda v: str(v))
def test_error_rule(backend, shape, options, dtype):
    check_conv_lstm(backend, lstm_inputs(*shape, dtype, **options))


# Narrow, or with many channels: the library convolves.
NARROW = [
    ((2, 3, 36, 28, 7, 6), dict(peephole="channel", layout="permuted")),
    ((8, 1, 120, 100, 1, 1), dict()),
    ((2, 2, 3, 22, 9, 15), dict(peephole="full", kernel=5)),
    ((1, 3, 96, 100, 3, 20), dict(state=False, bias=False)),
]


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("shape, options", NARROW, ids=lambda v: str(v))
def test_error_rule_on_narrow_images(shape, options, recompute, dtype):
    inputs = lstm_inputs(*shape, dtype, **options)
    check_conv_lstm("cpu", inputs, dilation=2, recompute=recompute, grad_layout="permuted")


@needs_cpu
@pytest.mark.parametrize("recompute", (False, True))
def test_steps_of_narrow_images_are_taken_in_windows(recompute):
    """4M x H x W gate sums of 20 steps are 42 MB: more than one window."""
    inputs = lstm_inputs(1, 20, 4, 32, 512, 8, torch.float32, kernel=1)
    check_conv_lstm("cpu", inputs, recompute=recompute)


@needs_cpu
@pytest.mark.parametrize(
    "wanted, calls",
    (
        (["bias"], 2),  # dh of steps 2 and 1
        (["x"], 3),  # and dx of all steps
        (["weight_ih"], 3),
        (["x", "weight_ih"], 3),
        (["weight_hh"], 4),  # that of the first h apart
        (["h"], 3),
        (list(NAMES), 6),
    ),
)
def test_narrow_images_convolve_only_for_the_gradients_that_are_needed(wanted, calls):
    leaves = require_grad(lstm_inputs(1, 3, 32, 32, 32, 3, torch.float32), wanted)
    out, _ = call(leaves, backend="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("aten::convolution_backward") == calls


@needs_cpu
def test_autocast_does_not_reach_into_narrow_images():
    inputs = lstm_inputs(1, 2, 32, 32, 8, 8, torch.float32)
    rounded = {k: t.to(torch.bfloat16) for k, t in inputs.items() if t is not None}
    rounded = inputs | rounded | {"c": inputs["c"]}
    expected, _ = call(rounded, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = call(inputs, backend="cpu")
    assert torch.equal(out, expected)


@needs_cpu
@pytest.mark.parametrize("channels, hidden", ((3, 5), (64, 64)))
def test_products_of_bfloat16_are_exact_and_summed_in_float32(channels, hidden):
    inputs = lstm_inputs(1, 1, channels, hidden, 9, 33, torch.bfloat16, peephole="channel")
    _, (_, c_last) = call(inputs, backend="cpu")
    _, expected = eager_conv_lstm(**moved(inputs, torch.float64))
    torch.testing.assert_close(c_last.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_kernel_reaches_beyond_the_image(backend, dtype):
    inputs = lstm_inputs(2, 2, 3, 3, 2, 3, dtype, kernel=5, peephole="channel")
    check_conv_lstm(backend, inputs, dilation=7, recompute=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("permuted", "sliced"))
@pytest.mark.parametrize("recompute", (False, True))
def test_strides_in_nan_filled_memory(backend, layout, dtype, recompute):
    with nan_filled_memory():
        inputs = lstm_inputs(2, 3, 3, 5, 9, 21, dtype, layout=layout, peephole="full")
        check_conv_lstm(backend, inputs, recompute=recompute, grad_layout="permuted")


@needs_cpu
def test_sweep(sweep_index):
    inputs, options = lstm_sweep_case(sweep_index, DTYPES)
    check_conv_lstm("cpu", lstm_inputs(**inputs), **options)


@needs_cpu
@pytest.mark.parametrize("save", (SAVE_CELLS, SAVE_GATES))
def test_kept_gates_and_recomputed_gates_give_the_same(save):
    inputs = require_grad(lstm_inputs(1, 3, 4, 4, 20, 40, torch.float32, peephole="channel"))
    out, c_last, *_ = OP(*inputs.values(), 1, save, "cpu")
    grads = torch.autograd.grad((out, c_last), list(inputs.values()), (out * 0 + 1, c_last * 0 + 1))
    expected, expected_c, *_ = OP(*inputs.values(), 1, save, "reference")
    others = torch.autograd.grad(
        (expected, expected_c), list(inputs.values()), (out * 0 + 1, c_last * 0 + 1)
    )
    for name, a, b in zip(inputs, grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@needs_cpu
def test_a_forward_that_kept_nothing_still_has_a_backward():
    inputs = require_grad(small(torch.float64))
    results = []
    for save in (SAVE_NOTHING, SAVE_GATES):
        out, c_last, *_ = OP(*inputs.values(), 1, save, None)
        results.append(torch.autograd.grad((out * c_last[:, None]).sum(), list(inputs.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_equal_the_whole(backend, dtype):
    inputs = lstm_inputs(2, 5, 3, 4, 9, 20, dtype, peephole="channel")
    x, h, c, *others = inputs.values()
    out, (h_last, c_last) = conv_lstm(x, (h, c), *others, backend=backend)
    first, state = conv_lstm(x[:, :2], (h, c), *others, backend=backend)
    second, state = conv_lstm(x[:, 2:], state, *others, backend=backend)
    assert torch.equal(torch.cat([first, second], 1), out)
    assert torch.equal(state[0], h_last) and torch.equal(state[1], c_last)
    step = (h, c)
    for t in range(5):
        step = conv_lstm_cell(x[:, t], step, *others, backend=backend)
        assert torch.equal(step[0], out[:, t])
    assert torch.equal(step[1], c_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    inputs = small(torch.float64)
    inputs["x"] = torch.randn(1, 1, 3, 5, 1, dtype=torch.float64).expand(2, 3, 3, 5, 6)
    inputs["h"] = torch.randn(1, 2, 1, 1, dtype=torch.float64).expand(2, 2, 5, 6)
    inputs = require_grad(inputs)
    out, _ = call(inputs, backend=backend)
    expected, _ = eager_conv_lstm(**inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.ones(1, dtype=torch.float64).expand(out.shape)
    for a, b in zip(
        torch.autograd.grad(out, list(inputs.values()), grad),
        torch.autograd.grad(expected, list(inputs.values()), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@needs_cpu
def test_sigmoid_and_tanh_over_the_whole_range():
    tiny = torch.logspace(-37, 4, 200001)
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4])
    x = torch.cat([torch.linspace(-120, 120, 1_000_003), tiny, -tiny, ends])
    sigmoid, tanh = torch.ops.vsod_ops.conv_lstm_activate_cpu(x)
    for actual, expected in ((sigmoid, x.double().sigmoid()), (tanh, x.double().tanh())):
        assert torch.equal(actual.isnan(), expected.isnan())
        normal = expected.abs() > torch.finfo(torch.float32).tiny
        ulp = 2.0 ** (torch.frexp(expected.abs()).exponent - 24)
        error = ((actual - expected).abs() / ulp)[normal]
        assert error.max() < 3, error.max()
        rest = ~normal & ~expected.isnan()
        assert (actual - expected)[rest].abs().max() <= 2.0**-126
    assert sigmoid[-7:-3].tolist() == [0.5, 0.5, 1.0, 0.0]
    assert tanh[-5:-3].tolist() == [1.0, -1.0] and torch.signbit(tanh[-6])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_only_their_neighbours(backend, dtype):
    inputs = lstm_inputs(1, 2, 2, 2, 9, 40, dtype, state=False)
    clean, _ = call(inputs, backend=backend)
    inputs["x"][0, 0, 0, 4, 20] = math.nan
    out, _ = call(inputs, backend=backend)
    bad = torch.zeros(2, 9, 40, dtype=torch.bool)
    bad[0, 3:6, 19:22] = bad[1, 2:7, 18:23] = True
    assert torch.equal(out[0].isnan().any(1), bad)
    keep = ~bad[:, None].expand(2, 2, 9, 40)
    assert torch.equal(out[0][keep], clean[0][keep])
    inputs["x"][0, 0, 0, 4, 20] = math.inf
    out, _ = call(inputs, backend=backend)
    assert not out.isnan().any() and out.abs().max() <= 1


@needs_cpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 50, 130), (1, 2, 33, 32, 20, 24)])
def test_same_bits_for_every_run_and_thread_count(shape, dtype):
    inputs = require_grad(lstm_inputs(*shape, dtype, peephole="channel"))

    def run():
        out, (_, c_last) = call(inputs, backend="cpu")
        loss = out.float().sum() + c_last.square().sum()
        return [out, c_last, *torch.autograd.grad(loss, list(inputs.values()))]

    torch.set_num_threads(1)
    expected = run()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@needs_cpu
def test_two_threads_at_once():
    cases = [lstm_inputs(1, 2, 3, 4, 30, 60, torch.float32, seed=s) for s in (1, 2)]
    assert_two_threads_agree(lambda case: call(case)[0], cases)


@needs_cpu
@pytest.mark.parametrize("level", ("portable", "avx2", "avx512", "avx512bf16"))
def test_every_simd_level(level):
    levels = CPU_MODULE.build_info()["levels"].split(", ")
    if level not in levels or levels.index(level) > levels.index(CPU_MODULE.build_info()["level"]):
        pytest.skip(f"this CPU or build has no {level}")
    code = (
        "import torch\n"
        "from checks_conv_lstm import check_conv_lstm, lstm_inputs\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "    for recompute in (False, True):\n"
        "        inputs = lstm_inputs(2, 2, 5, 7, 11, 75, dtype, peephole='full')\n"
        "        check_conv_lstm('cpu', inputs, dilation=2, recompute=recompute)\n"
        "    check_conv_lstm('cpu', lstm_inputs(1, 2, 20, 20, 9, 17, dtype, state=False))\n"
    )
    env = os.environ | {"VSOD_OPS_SIMD": level}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- torch integration


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("contiguous", "permuted", "sliced"))
@pytest.mark.parametrize("save", (SAVE_NOTHING, SAVE_CELLS, SAVE_GATES))
def test_opcheck(backend, dtype, layout, save):
    inputs = small(dtype, layout=layout)
    if save != SAVE_NOTHING:
        inputs = require_grad(inputs)
    tolerances = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}
    torch.library.opcheck(OP, (*inputs.values(), 1, save, backend), **tolerances)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", (SAVE_CELLS, SAVE_GATES))
def test_opcheck_backward_op(backend, save):
    inputs = small(layout="permuted")
    kept = OP(*inputs.values(), 1, save, backend)
    grads = (torch.randn_like(kept[0]), torch.randn_like(kept[1]))
    needs = [True, False, True, True, False, True, True]
    torch.library.opcheck(
        torch.ops.vsod_ops.conv_lstm_backward.default,
        (*grads, *inputs.values(), *kept, 1, needs, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_op_gives_each_gradient_the_dtype_of_its_tensor(backend, dtype):
    inputs = lstm_inputs(1, 3, 2, 3, 5, 6, dtype, peephole="channel")
    tensors = tuple(inputs.values())
    kept = OP(*tensors, 1, SAVE_CELLS, backend)
    grads = torch.ops.vsod_ops.conv_lstm_backward(
        *(torch.ones_like(kept[0]), None, *tensors, *kept, 1, [True] * 7, backend)
    )
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed(backend):
    inputs = small(torch.float64)

    def loss_of(leaves):
        out, (_, c_last) = call(leaves, backend=backend)
        return out.square().sum() + c_last.sum()

    leaves = require_grad(inputs)
    everything = dict(
        zip(leaves, torch.autograd.grad(loss_of(leaves), list(leaves.values())), strict=True)
    )
    for wanted in (["x"], ["h"], ["c"], ["weight_ih"], ["weight_hh"], ["bias"],
                   ["weight_peephole"], ["h", "c"], ["x", "bias"]):  # fmt: skip
        leaves = require_grad(inputs, wanted)
        loss_of(leaves).backward()
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, everything[name], msg=name)
            else:
                assert leaf.grad is None, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_the_two_outputs_alone_has_a_gradient(backend):
    leaves = require_grad(small(torch.float64))
    for pick in (0, 1):
        ours, (_, c_last) = call(leaves, backend=backend)
        grads = torch.autograd.grad((ours, c_last)[pick].sum(), list(leaves.values()))
        expected = torch.autograd.grad(eager_conv_lstm(**leaves)[pick].sum(), list(leaves.values()))
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradient_of_the_last_h():
    leaves = require_grad(small(torch.float64))
    _, (h_last, _) = call(leaves)
    grads = torch.autograd.grad(h_last.sum(), list(leaves.values()))
    expected = torch.autograd.grad(eager_conv_lstm(**leaves)[0][:, -1].sum(), list(leaves.values()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_is_a_clear_error():
    leaves = require_grad(small())
    out, _ = call(leaves)
    (dx,) = torch.autograd.grad(out.sum(), leaves["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.sum().backward()


def test_inference_keeps_nothing():
    inputs = small()
    assert [t.numel() for t in OP(*inputs.values(), 1, SAVE_NOTHING, None)[2:]] == [0, 0]
    assert call(inputs)[0].grad_fn is None
    with torch.no_grad():
        assert call(require_grad(inputs))[0].grad_fn is None


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_forward_and_backward_without_graph_breaks(dynamic):
    torch._dynamo.reset()

    def f(x, h, c, *others):
        out, (_, c_last) = conv_lstm(x * 2, (h, c), *others)
        return out, c_last

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3):
        for height in (5, 9, 12) if dynamic else (5,):
            inputs = require_grad(lstm_inputs(2, 3, 3, 2, height, height + 1, torch.float32,
                                              peephole="channel"))  # fmt: skip
            results = []
            for function in (compiled, f):
                out, c_last = function(*inputs.values())
                loss = out.square().sum() + c_last.sum()
                results.append([out, c_last, *torch.autograd.grad(loss, list(inputs.values()))])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, h, c, *others):
            return conv_lstm(x, (h, c), *others)

    inputs = tuple(small().values())
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(
        program.module()(*inputs), conv_lstm(inputs[0], inputs[1:3], *inputs[3:])
    )


def test_autocast_keeps_the_cell_state_in_float32():
    leaves = require_grad(small())
    leaves["weight_ih"] = leaves["weight_ih"].detach().bfloat16()  # mixed dtypes are legal
    with torch.autocast("cpu", torch.bfloat16):
        out, (h, c) = call(leaves)
    assert (out.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (out.float().sum() + c.sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == "weight_ih" else leaf.grad.dtype == torch.float32, name


def test_16_bit_state_may_be_float32():
    inputs = small(torch.bfloat16)
    assert inputs["c"].dtype == torch.float32
    out, (_, c) = call(inputs)
    assert out.dtype == torch.bfloat16 and c.dtype == torch.float32
    rounded = inputs | {"c": inputs["c"].bfloat16()}
    assert call(rounded)[1][1].dtype == torch.float32


# ---- arguments


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_no_steps(backend):
    for batch, steps, height in ((0, 3, 5), (2, 3, 0), (0, 0, 5)):
        inputs = require_grad(lstm_inputs(batch, steps, 3, 2, height, 6, torch.float32))
        out, (h, c) = call(inputs, backend=backend)
        assert out.shape == (batch, steps, 2, height, 6)
        assert h.shape == c.shape == (batch, 2, height, 6)
        if steps:
            out.sum().backward()
            weight = inputs["weight_ih"]
            assert torch.equal(weight.grad, torch.zeros_like(weight))
    inputs = lstm_inputs(2, 0, 3, 2, 5, 6, torch.float32)
    out, (h, c) = call(inputs, backend=backend)
    assert out.shape == (2, 0, 2, 5, 6)
    assert torch.equal(h, inputs["h"]) and torch.equal(c, inputs["c"])
    out, (h, c) = call(inputs | {"h": None}, backend=backend)
    assert not h.any() and not c.any() and h.shape == (2, 2, 5, 6)


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


BAD_CALLS = [
    (dict(x=zeros(2, 3, 5, 6)), ValueError, r"x must be \(B, T, C, H, W\)"),
    (dict(x=[1.0]), TypeError, "x must be a tensor"),
    (dict(x=zeros(2, 3, 3, 5, 6, dtype=torch.int64)), TypeError, "x must be float32"),
    (dict(x=zeros(2, 3, 0, 5, 6)), ValueError, "x has no channels"),
    (dict(weight_hh=zeros(8, 2, 2, 2)), ValueError, "weight_hh has an even kernel, 2"),
    (dict(weight_hh=zeros(9, 2, 3, 3)), ValueError, r"weight_hh must be \(4M, M, k, k\)"),
    (dict(weight_hh=zeros(8, 2, 3, 5)), ValueError, r"weight_hh must be \(4M, M, k, k\) = "),
    (dict(weight_ih=zeros(8, 3, 5, 5)), ValueError, r"weight_ih must be .*= \(8, 3, 3, 3\)"),
    (dict(weight_ih=zeros(8, 4, 3, 3)), ValueError, r"weight_ih must be .*= \(8, 3, 3, 3\)"),
    (dict(weight_ih=zeros(8, 3, 3, 3).double()), TypeError, "weight_ih is torch.float64 but x is"),
    (dict(weight_ih=zeros(8, 3, 3, 3, device="meta")), ValueError, "weight_ih is on meta but x"),
    (dict(bias=zeros(7)), ValueError, r"bias must be \(4M,\) = \(8,\)"),
    (dict(weight_peephole=zeros(2, 2)), ValueError, r"weight_peephole must be \(3, M\) = \(3, 2\)"),
    (
        dict(weight_peephole=zeros(3, 2, 5, 5)),
        ValueError,
        r"weight_peephole must be \(3, M, H, W\) = \(3, 2, 5, 6\)",
    ),
    (dict(weight_peephole=zeros(3, 2, 5)), ValueError, r"\(3, M\) or \(3, M, H, W\)"),
    (dict(h=zeros(2, 2, 5, 5)), ValueError, r"state\[0\] must be .*= \(2, 2, 5, 6\)"),
    (dict(c=zeros(2, 3, 5, 6)), ValueError, r"state\[1\] must be .*= \(2, 2, 5, 6\)"),
    (dict(c=zeros(2, 2, 5, 6).bfloat16()), TypeError, r"state\[1\] is torch.bfloat16"),
    (dict(h=None), TypeError, "state.*must be a tensor"),
    (dict(dilation=0), ValueError, "dilation must be at least 1, got 0"),
    (dict(dilation=1.5), TypeError, "dilation must be an int"),
    (dict(backend="metal"), ValueError, "backend must be None or one of"),
]


@pytest.mark.parametrize("change, error, message", BAD_CALLS)
def test_bad_arguments(change, error, message):
    arguments = small() | change
    state = (arguments.pop("h"), arguments.pop("c"))
    with pytest.raises(error, match=message):
        conv_lstm(arguments.pop("x"), state, **arguments)


def test_bad_states_and_the_cell():
    inputs = small()
    x, h, c, *others = inputs.values()
    for state in (h, (h,), (h, c, c)):
        with pytest.raises(TypeError, match="state must be None or a pair"):
            conv_lstm(x, state, *others)
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\)"):
        conv_lstm_cell(x, (h, c), *others)
