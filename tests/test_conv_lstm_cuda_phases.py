"""The CUDA kernels of conv_lstm with their phases run on the CPU: the same code as on a GPU, but
for the launch and the barriers."""

import pytest
import torch
from checks import nan_filled_memory, needs_cpu, picker
from checks_conv_lstm import (
    CUDA_FORMS,
    CUDA_SHAPES,
    GRADIENTS,
    assert_like_float64,
    cuda_case,
    oracle_results,
)

from vsod_ops import backends
from vsod_ops.conv_lstm import op

pytestmark = needs_cpu


def on_host(inputs, grads, dilation, *, recompute=False, window=0, reverse=False, needs=None):
    tensors = list(inputs.values())
    save = op.SAVE_CELLS if recompute else op.SAVE_GATES
    ops = torch.ops.vsod_ops
    kept = ops.conv_lstm_cuda_on_host(*tensors, dilation, save, reverse)
    needs = [t is not None for t in tensors] if needs is None else needs
    found = ops.conv_lstm_backward_cuda_on_host(
        *grads, *tensors, *kept, dilation, needs, window, reverse
    )
    return dict(zip(("out", "c_T", *GRADIENTS), (*kept[:2], *found), strict=True))


def check(case, *, dilation=1, **options):
    """Every output and gradient of the phases against float64."""
    inputs, grads = cuda_case(**case)
    with nan_filled_memory():
        actual = on_host(inputs, grads, dilation, **options)
    for name, value in actual.items():
        wide = name in ("c_T", "dc")
        assert value.dtype == (op.state_dtype(inputs["x"].dtype) if wide else inputs["x"].dtype)
    assert_like_float64(actual, inputs, grads, dilation, exact=True)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", CUDA_FORMS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=lambda s: "x".join(map(str, s.values())))
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
    inputs, (grad_out, grad_c) = cuda_case(steps=3)
    given = (None, grad_c) if missing == "grad_out" else (grad_out, None)
    zeros = (
        torch.zeros_like(grad_out) if missing == "grad_out" else grad_out,
        torch.zeros_like(grad_c) if missing == "grad_c" else grad_c,
    )
    expected = oracle_results(inputs, zeros)
    actual = on_host(inputs, given, 1)
    for name, wanted in expected.items():
        torch.testing.assert_close(actual[name], wanted)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_alone(wanted):
    inputs, grads = cuda_case(peephole="channel")
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
    inputs, grads = cuda_case(
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
    inputs, _ = cuda_case(channels=3, hidden=5, height=9, width=20, steps=1, dtype=dtype)
    x = inputs["x"].clone()
    x[0, 0, 1, 4, 3], x[0, 0, 0, 4, 15] = torch.inf, torch.nan
    w_ih = inputs["weight_ih"].abs() + 0.1  # each tap gives +inf, no two of them -inf
    ops = torch.ops.vsod_ops
    *_, gates = ops.conv_lstm_cuda_on_host(
        x, None, None, w_ih, *list(inputs.values())[4:], 1, op.SAVE_GATES, False
    )
    gates = gates.view(4, 5, 9, 20)
    sees_nan = torch.zeros(9, 20, dtype=torch.bool)
    sees_nan[3:6, 14:17] = True
    assert torch.equal(gates.isnan(), sees_nan.expand(4, 5, 9, 20))
    assert (gates[:, :, 3:6, 2:5] == 1).all()


def test_zero_state_is_no_state():
    inputs, grads = cuda_case(steps=3, state=False)
    x = inputs["x"]
    zero = x.new_zeros(x.shape[0], 4, *x.shape[3:])
    with_zeros = on_host(inputs | {"h": zero, "c": zero}, grads, 1)
    without = on_host(inputs, grads, 1)
    for name in ("out", "c_T", "dx", "dweight_ih", "dweight_hh", "dbias"):
        assert torch.equal(with_zeros[name], without[name]), name


def test_random_cases(sweep_index):
    pick = picker(2000 + sweep_index)
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
