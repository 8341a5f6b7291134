"""The CUDA kernels of conv_lstm with their phases run on the CPU: the same code as on a GPU, but
for the launch and the barriers."""

import pytest
import torch
from checks import assert_error_bound, nan_filled_memory

from vsod_ops import backends
from vsod_ops.conv_lstm import op, reference

MODULE = backends.compiled_module("_cpu")
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=f"no CPU module: {MODULE}")

GRADIENTS = ("dx", "dh", "dc", "dweight_ih", "dweight_hh", "dbias", "dweight_peephole")


def draw(
    batch=1, steps=2, channels=3, hidden=4, height=9, width=11, kernel=3,
    *, dtype=torch.float64, state=True, bias=True, peephole=None, layout="contiguous", seed=0,
    scale=1.0,
):  # fmt: skip
    """(x, h, c, weight_ih, weight_hh, bias, weight_peephole), then (grad_out, grad_c)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, factor=scale, as_dtype=dtype):
        return (factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(as_dtype)

    def view(x):
        if layout == "permuted":
            return x.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
        if layout == "expanded":
            return x[:, :1].expand(x.shape)
        return x

    wide = op.state_dtype(dtype)
    spread = scale / (kernel * (channels + hidden) ** 0.5)
    shape = (batch, hidden, height, width)
    full = (3, hidden, height, width) if peephole == "full" else (3, hidden)
    inputs = (
        view(normal(batch, steps, channels, height, width)),
        normal(*shape) if state else None,
        normal(*shape, as_dtype=wide) if state else None,
        normal(4 * hidden, channels, kernel, kernel, factor=spread),
        normal(4 * hidden, hidden, kernel, kernel, factor=spread),
        normal(4 * hidden) if bias else None,
        normal(*full) if peephole else None,
    )
    grads = (
        view(normal(batch, steps, hidden, height, width)),
        normal(*shape, as_dtype=wide),
    )
    return inputs, grads


def on_host(inputs, grads, dilation, *, recompute=False, window=0, reverse=False, needs=None):
    save = op.SAVE_CELLS if recompute else op.SAVE_GATES
    ops = torch.ops.vsod_ops
    out, c_last, cells, gates = ops.conv_lstm_cuda_on_host(*inputs, dilation, save, reverse)
    needs = [t is not None for t in inputs] if needs is None else needs
    results = ops.conv_lstm_backward_cuda_on_host(
        *grads, *inputs, out, c_last, cells, gates, dilation, needs, window, reverse
    )
    return {"out": out, "c_last": c_last} | dict(zip(GRADIENTS, results, strict=True))


def by_reference(inputs, grads, dilation, dtype):
    def as_dtype(tensors):
        return [None if t is None else t.to(dtype) for t in tensors]

    inputs, grads = as_dtype(inputs), as_dtype(grads)
    out, c_last, cells, gates = reference.forward(*inputs, dilation, op.SAVE_GATES)
    needs = [t is not None for t in inputs]
    results = reference.backward(*grads, *inputs, out, c_last, cells, gates, dilation, needs)
    return {"out": out, "c_last": c_last} | dict(zip(GRADIENTS, results, strict=True))


def eager(inputs, grads, dilation):
    """Plain autograd with every tensor but the cell state in the inputs' own dtype."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, h, c, w_ih, w_hh, bias, peephole = leaves
    shape = (x.shape[0], w_hh.shape[1], *x.shape[3:])
    h = x.new_zeros(shape) if h is None else h
    c = x.new_zeros(shape) if c is None else c
    p = [0.0, 0.0, 0.0]
    if peephole is not None:
        p = peephole if peephole.dim() == 4 else peephole[:, :, None, None]
    options = {"padding": dilation * (w_ih.shape[-1] // 2), "dilation": dilation}
    outs = []
    for t in range(x.shape[1]):
        sums = torch.conv2d(x[:, t], w_ih, bias, **options) + torch.conv2d(h, w_hh, **options)
        i, f, g, o = sums.chunk(4, 1)
        c = (f + p[1] * c).sigmoid() * c + (i + p[0] * c).sigmoid() * g.tanh()
        h = ((o + p[2] * c).sigmoid() * c.tanh()).to(x.dtype)
        outs.append(h)
    out = torch.stack(outs, 1)
    used = [t for t in leaves if t is not None]
    results = iter(torch.autograd.grad((out, c), used, (grads[0], grads[1].to(c.dtype))))
    found = {n: next(results) for n, t in zip(GRADIENTS, leaves, strict=True) if t is not None}
    return {"out": out.detach(), "c_last": c.detach()} | found


def check(case, *, dilation=1, **options):
    """Every output and gradient of the phases against float64."""
    inputs, grads = draw(**case)
    dtype = inputs[0].dtype
    with nan_filled_memory():
        actual = on_host(inputs, grads, dilation, **options)
    oracle = by_reference(inputs, grads, dilation, torch.float64)
    narrow = eager(inputs, grads, dilation) if dtype.itemsize == 2 else None
    for name, expected in oracle.items():
        if expected.numel() == 0:
            assert actual[name].numel() == 0, name
        elif narrow is not None:
            assert_error_bound(name, actual[name], narrow[name], expected, dtype)
        else:
            assert actual[name].dtype == dtype
            torch.testing.assert_close(
                actual[name],
                expected.to(dtype),
                msg=lambda text, name=name: f"{name}: {text}",
            )


# Around the tiles of 32 x 16, 32 x 32 and 32 x 8 pixels, the chunks of 8 channels, the groups of 4
# hidden channels, of 4 or 8 gathered ones and of 16 gate channels.
SHAPES = (
    {"channels": 4, "hidden": 4, "height": 17, "width": 33, "steps": 3},
    {"channels": 1, "hidden": 1, "height": 1, "width": 1, "steps": 1},
    {"channels": 3, "hidden": 5, "height": 33, "width": 31, "batch": 2},
    {"channels": 9, "hidden": 8, "height": 8, "width": 32},
    {"channels": 2, "hidden": 13, "height": 1, "width": 65, "steps": 3},
    {"channels": 17, "hidden": 3, "height": 40, "width": 2, "batch": 2},
)
FORMS = (
    {"peephole": "channel"},
    {"peephole": "full", "layout": "permuted"},
    {"state": False, "bias": False, "layout": "expanded"},
)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s.values())))
def test_against_float64(shape, form, dtype):
    check(shape | form | {"dtype": dtype})


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "kernel, dilation", ((1, 1), (1, 7), (3, 2), (3, 12), (5, 1), (5, 3), (7, 1), (7, 2), (3, 64))
)
def test_any_kernel_and_dilation(kernel, dilation, dtype):
    # (3, 12) and (5, 3) with fewer channels a stage; (3, 64) and (7, 2) may take one tap a stage.
    case = {"channels": 3, "hidden": 5, "height": 21, "width": 35, "kernel": kernel}
    check(case | {"peephole": "channel", "dtype": dtype}, dilation=dilation)


def test_one_tap_a_stage():
    # 32 + 2 * 40 columns and 32 + 2 * 40 rows of one channel are 50 KB.
    case = {"channels": 2, "hidden": 3, "height": 90, "width": 95}
    check(case, dilation=40)


@pytest.mark.parametrize("peephole", (None, "channel", "full"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("window", (1, 2, 3, 9))
def test_windows(peephole, recompute, window):
    """Gate gradients kept for a few steps at a time; gates kept or computed again."""
    case = {"steps": 5, "batch": 2, "peephole": peephole}
    check(case, recompute=recompute, window=window)


@pytest.mark.parametrize("missing", ("grad_out", "grad_c"))
def test_one_incoming_gradient(missing):
    inputs, (grad_out, grad_c) = draw(steps=3)
    given = (None, grad_c) if missing == "grad_out" else (grad_out, None)
    zeros = (
        torch.zeros_like(grad_out) if missing == "grad_out" else grad_out,
        torch.zeros_like(grad_c) if missing == "grad_c" else grad_c,
    )
    expected = by_reference(inputs, zeros, 1, torch.float64)
    for name, actual in on_host(inputs, given, 1).items():
        torch.testing.assert_close(actual, expected[name])


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone(wanted):
    inputs, grads = draw(peephole="channel")
    needs = [i == wanted for i in range(7)]
    everything = on_host(inputs, grads, 1)
    alone = on_host(inputs, grads, 1, needs=needs)
    for name, need in zip(GRADIENTS, needs, strict=True):
        if need:
            assert torch.equal(alone[name], everything[name])
        else:
            assert alone[name].numel() == 0


@pytest.mark.parametrize("kernel, dilation", ((3, 1), (3, 2), (5, 1)))
def test_order_of_threads_and_blocks_does_not_matter(kernel, dilation):
    """A phase that needs a barrier it does not have gives other numbers in reverse."""
    inputs, grads = draw(
        batch=2, channels=5, hidden=9, height=35, width=70, kernel=kernel, peephole="channel",
        dtype=torch.float32,
    )  # fmt: skip
    forth = on_host(inputs, grads, dilation)
    back = on_host(inputs, grads, dilation, reverse=True)
    for name, value in forth.items():
        assert torch.equal(value, back[name]), name


def test_many_tiles_share_a_weight_block():
    # 40 x 4 = 160 tiles of 32 x 8 pixels a frame, 2 x 4 frames: more than the 1056 blocks.
    check({"batch": 2, "steps": 4, "channels": 1, "hidden": 1, "height": 320, "width": 128})


def test_ends_of_the_range():
    """Gate inputs up to 1e4 and infinities saturate; NaN stays NaN, and only where it belongs."""
    x = torch.tensor([-1e4, -89.0, -45.0, -1e-8, 0.0, 1e-8, 45.0, 89.0, 1e4, torch.inf, -torch.inf])
    x = torch.cat([x, torch.tensor([torch.nan])])[None, None, None, None, :]
    w_ih = torch.ones(4, 1, 1, 1)
    w_hh = torch.zeros(4, 1, 1, 1)
    out, c_last, _, gates = torch.ops.vsod_ops.conv_lstm_cuda_on_host(
        x, None, None, w_ih, w_hh, None, None, 1, op.SAVE_GATES, False
    )
    wide = x.double().flatten()
    sigmoid, tanh = wide.sigmoid(), wide.tanh()
    c = sigmoid * tanh
    expected = torch.stack([sigmoid, sigmoid, tanh, sigmoid]).float()
    torch.testing.assert_close(gates.view(4, -1), expected, equal_nan=True, rtol=3e-7, atol=1e-37)
    torch.testing.assert_close(c_last.flatten(), c.float(), equal_nan=True, rtol=5e-7, atol=1e-37)
    torch.testing.assert_close(
        out.flatten(), (sigmoid * c.tanh()).float(), equal_nan=True, rtol=1e-6, atol=1e-37
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_infinity_and_nan_stay_where_they_belong(dtype):
    """A product with padding would make NaN of infinity in pixels that do not see it."""
    inputs, _ = draw(channels=3, hidden=5, height=9, width=20, steps=1, dtype=dtype)
    x = inputs[0].clone()
    x[0, 0, 1, 4, 3], x[0, 0, 0, 4, 15] = torch.inf, torch.nan
    w_ih = inputs[3].abs() + 0.1  # each tap gives +inf, no two of them -inf
    ops = torch.ops.vsod_ops
    *_, gates = ops.conv_lstm_cuda_on_host(
        x, None, None, w_ih, *inputs[4:], 1, op.SAVE_GATES, False
    )
    gates = gates.view(4, 5, 9, 20)
    sees_nan = torch.zeros(9, 20, dtype=torch.bool)
    sees_nan[3:6, 14:17] = True
    assert torch.equal(gates.isnan(), sees_nan.expand(4, 5, 9, 20))
    assert (gates[:, :, 3:6, 2:5] == 1).all()


def test_zero_state_is_no_state():
    inputs, grads = draw(steps=3, state=False)
    x = inputs[0]
    zero = x.new_zeros(x.shape[0], 4, *x.shape[3:])
    with_zeros = on_host((x, zero, zero, *inputs[3:]), grads, 1)
    without = on_host(inputs, grads, 1)
    for name in ("out", "c_last", "dx", "dweight_ih", "dweight_hh", "dbias"):
        assert torch.equal(with_zeros[name], without[name]), name


def test_random_cases(sweep_index):
    generator = torch.Generator().manual_seed(2000 + sweep_index)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    case = {
        "batch": pick((1, 2)),
        "steps": pick((1, 2, 3)),
        "channels": pick((1, 4, 7, 8, 12)),
        "hidden": pick((1, 2, 4, 6, 8, 11)),
        "height": pick((1, 7, 8, 16, 17, 33)),
        "width": pick((1, 5, 31, 32, 33, 66)),
        "kernel": pick((1, 3, 3, 3, 5)),
        "dtype": pick((torch.float64, torch.float32, torch.bfloat16)),
        "state": pick((True, False)),
        "bias": pick((True, False)),
        "peephole": pick((None, "channel", "full")),
        "layout": pick(("contiguous", "permuted", "expanded")),
        "seed": sweep_index,
    }
    check(case, dilation=pick((1, 1, 2, 5)), recompute=pick((False, True)), window=pick((0, 1, 2)))


def test_many_channels_are_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "compiled_module", lambda name: None)  # as if it were built
    for channels, hidden in ((4, 32), (32, 4)):
        for name in (None, "cuda"):
            assert op.choose(name, "cuda", torch.float32, channels, hidden) == "cuda"
    for channels, hidden, size in ((4, 33, "hidden"), (33, 4, "input")):
        assert op.choose(None, "cuda", torch.float32, channels, hidden) == "triton"
        with pytest.raises(ValueError, match=f"takes at most 32 {size} channels, not 33"):
            op.choose("cuda", "cuda", torch.float32, channels, hidden)
