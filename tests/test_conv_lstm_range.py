"""conv_lstm on huge and infinite numbers, which Winograd's form of 3 x 3 kernels cannot add."""

import math

import pytest
import torch
from checks_conv_lstm import eager_conv_lstm, lstm_inputs, lstm_results, moved, through_conv_lstm

from vsod_ops import backends, conv_lstm

needs_cpu = pytest.mark.skipif(
    isinstance(backends.compiled_module("_cpu"), str), reason="needs the compiled CPU module"
)
SHAPES = [(2, 3, 3, 4, 12, 37), (1, 2, 20, 12, 9, 33), (1, 3, 1, 1, 3, 5)]
FINITE = (3e18, -1e30, 2e30, -1e35, 1e37)


def case(shape, dtype, seed, values, where):
    """Inputs with some of `values` in some places of `where`."""
    inputs = lstm_inputs(*shape, dtype, peephole="channel", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    flat = inputs[where].view(-1)
    count = 1 if where.startswith("weight") else 3
    places = torch.randint(flat.numel(), (count,), generator=generator)
    chosen = torch.randint(len(values), (count,), generator=generator)
    flat[places] = torch.tensor([values[i] for i in chosen], dtype=torch.float64).to(dtype)
    return inputs


def assert_same_numbers(actual, expected, dtype):
    tolerance = 2e-2 if dtype.itemsize == 2 else 2e-4
    for name, value in expected.items():
        torch.testing.assert_close(
            *(actual[name].double(), value.double()),
            rtol=tolerance, atol=tolerance * max(1.0, value.abs().nan_to_num().max().item()),
            equal_nan=True, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["x", "h", "weight_ih", "weight_hh"])
def test_huge_numbers_give_what_the_definition_gives(shape, dtype, where):
    values = tuple(v**8 for v in FINITE) if dtype == torch.float64 else FINITE
    for seed in range(6):
        inputs = case(shape, dtype, seed, values, where)
        grad_out = torch.randn(*shape[:2], shape[3], *shape[4:]).to(dtype)
        grads = grad_out, torch.zeros(shape[0], shape[3], *shape[4:])
        oracle = lstm_results(eager_conv_lstm, moved(inputs, torch.float64), grads)
        for recompute in (False, True):
            function = through_conv_lstm("cpu", recompute=recompute)
            actual = lstm_results(function, inputs, grads)
            assert_same_numbers(actual, oracle, dtype)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [(math.inf,), (-math.inf,), (math.inf, -math.inf, math.nan)])
def test_infinities_and_nan_give_what_the_definition_gives(shape, dtype, values):
    seen_nan = False
    for seed in range(12):
        inputs = case(shape, dtype, seed, values, "x" if seed % 3 else "h")
        with torch.no_grad():
            oracle, c_last = eager_conv_lstm(**moved(inputs, torch.float64))
            out, c_actual = through_conv_lstm("cpu", check_last=False)(**inputs)
        assert_same_numbers({"out": out, "c_T": c_actual}, {"out": oracle, "c_T": c_last}, dtype)
        seen_nan = seen_nan or oracle.isnan().any().item()
    assert seen_nan or len(values) == 1


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps_kept", [False, True])
def test_infinite_gradients_are_those_of_the_definition(shape, dtype, steps_kept):
    """What a loss scale that is too large sends back, in one place of a map."""
    infinite = 0
    for seed in range(4):
        inputs = lstm_inputs(*shape, dtype, peephole="channel", seed=seed)
        grad_out = torch.randn(*shape[:2], shape[3], *shape[4:]).to(dtype)
        value = (math.inf, -math.inf, -1e37, 3e20)[seed]
        grad_out.view(-1)[(7919 * seed + 3) % grad_out.numel()] = value
        grads = grad_out, torch.zeros(shape[0], shape[3], *shape[4:])
        oracle = lstm_results(eager_conv_lstm, moved(inputs, torch.float64), grads)
        actual = lstm_results(through_conv_lstm("cpu", recompute=not steps_kept), inputs, grads)
        for name, expected in oracle.items():
            assert torch.equal(actual[name].isfinite(), expected.to(dtype).isfinite()), name
            assert torch.equal(actual[name].isnan(), expected.isnan()), name
            infinite += expected.isinf().sum()
    assert infinite > 0


@pytest.mark.parametrize("backend", [None, "reference"])
def test_taps_beyond_the_image_are_zeros_however_far(backend):
    x, weight = torch.randn(1, 2, 2, 4, 5), torch.randn(8, 2, 3, 3)
    expected = conv_lstm(x, None, weight, weight, dilation=5, backend=backend)[0]
    for dilation in (6, 2**31, 2**62, 2**63 - 1):
        leaf = x.clone().requires_grad_()
        out = conv_lstm(leaf, None, weight, weight, dilation=dilation, backend=backend)[0]
        assert torch.equal(out, expected)
        out.sum().backward()
        tangent = torch.func.jvp(
            lambda x, d=dilation: conv_lstm(x, None, weight, weight, dilation=d)[0], (x,), (x,)
        )[1]
        assert leaf.grad.isfinite().all() and tangent.isfinite().all()
    with pytest.raises(ValueError, match=r"dilation must be below 2\*\*63"):
        conv_lstm(x, None, weight, weight, dilation=2**63)
