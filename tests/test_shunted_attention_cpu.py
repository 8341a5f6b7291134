"""The CPU kernel of shunted_attention: error rule, odd shapes, every SIMD level, same bits."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from checks import DTYPES, nan_filled_memory, needs_cpu, run_tests_at_level
from checks_attention import attention_inputs, attention_sweep_case, check_attention

from vsod_ops import ShuntedAttention, shunted_attention
from vsod_ops.shunted_attention import op

pytestmark = needs_cpu

# Around the tile sizes of every level: 14 or 6 rows, 16, 32 columns, 224 and 256 keys.
SHAPES = [
    dict(batch=1, group_heads=(2, 2), queries=980, lengths=(980, 147), head_dim=64),
    dict(batch=2, group_heads=(1, 2), queries=113, lengths=(300, 57), head_dim=40),
    dict(batch=1, group_heads=(1, 1, 1), queries=1, lengths=(1, 2, 33), head_dim=1),
    dict(batch=1, group_heads=(1, 3), queries=17, lengths=(513, 1), head_dim=8),
    dict(batch=1, group_heads=(2,), queries=239, lengths=(225,), head_dim=256),
    dict(batch=3, group_heads=(1,), queries=63, lengths=(257,), head_dim=113),
    dict(batch=1, group_heads=(2, 1), queries=14, lengths=(31, 448), head_dim=160),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s['queries']}x{s['lengths']}x{s['head_dim']}"
)
def test_error_rule(shape, dtype):
    check_attention("cpu", *attention_inputs(**shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("permuted", "sliced"))
def test_strides_in_nan_filled_memory(layout, dtype):
    with nan_filled_memory():
        inputs = attention_inputs(2, (1, 2), 45, (45, 23), 24, dtype, layout=layout)
        check_attention("cpu", *inputs, grad_layout="permuted")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_over_from_a_call_full_of_nan(dtype):
    poison = attention_inputs(1, (1, 1), 300, (300, 300), 64, dtype, requires_grad=True)
    with torch.no_grad():
        for x in (poison[0], *poison[1], *poison[2]):
            x.fill_(torch.nan)
    shunted_attention(*poison, backend="cpu").sum().backward()
    check_attention("cpu", *attention_inputs(1, (1, 1), 31, (45, 3), 20, dtype))


def test_sweep(sweep_index):
    case = attention_sweep_case(sweep_index, DTYPES)
    check_attention("cpu", *attention_inputs(**case))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_same_bits_on_every_run_and_thread_count(dtype):
    q, keys, values = attention_inputs(2, (2, 2), 500, (500, 75), 32, dtype, requires_grad=True)
    results = []
    for threads in (1, 2, 2, 3, 7):
        torch.set_num_threads(threads)
        out, lse = shunted_attention(q, keys, values, return_lse=True, backend="cpu")
        grads = torch.autograd.grad(out, [q, *keys, *values], torch.ones_like(out))
        results.append([out, lse, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_memory_beyond_the_outputs_does_not_grow_with_the_scores():
    # At N = 4000 the scores of one head would be 64 MB; packed keys and values are 2 MB.
    q, keys, values = attention_inputs(1, (1, 1), 4000, (4000, 500), 64, torch.float32)

    def allocated(backend):
        with torch.profiler.profile(profile_memory=True) as profile:
            shunted_attention(q, keys, values, backend=backend)
        return sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())

    out_and_lse = q.nbytes + 2 * 4000 * 4
    packed = sum(x.nbytes for x in (*keys, *values))
    assert out_and_lse <= allocated("cpu") <= 1.2 * (out_and_lse + packed)
    assert allocated("reference") > 64e6  # the measure sees scores where there are any


# Tokens around what is one vector, single rows, and more than the kernel's few rows; weights of one
# block of the depth and of several, of one tile of a task and of several.
@pytest.mark.parametrize(
    "tokens, dim, heads, reductions",
    [
        ((1, 1, 1, 1), 16, 1, (1,)),
        ((1, 1, 7, 7), 64, 2, (1, 2)),
        ((2, 3, 3, 3), 48, 6, (2, (1, 2, 3), 1)),
        ((1, 4, 5, 5), 256, 4, (1, 2)),
        ((3, 5, 7, 7), 32, 4, ((1, 1, 2), 3)),
        ((1, 9, 7, 10), 176, 2, (2, 2)),
    ],
)
@pytest.mark.parametrize("layout", ("contiguous", "permuted"))
def test_the_layer_without_gradients(tokens, dim, heads, reductions, layout, monkeypatch):
    layer = ShuntedAttention(dim, heads, reductions)
    x = torch.randn(*tokens, dim)
    if layout == "permuted":
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    expected = copy.deepcopy(layer).double()(x.double())
    calls = count_calls(monkeypatch)
    with nan_filled_memory(), torch.no_grad():
        out = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def count_calls(monkeypatch):
    """What the compiled layer is called with from now on."""
    calls, layer = [], op.layer
    monkeypatch.setattr(op, "layer", lambda *inputs: calls.append(inputs) or layer(*inputs))
    return calls


def test_the_layer_has_the_same_bits_for_any_thread_count():
    layer, x = ShuntedAttention(272, 2), torch.randn(1, 8, 7, 7, 272)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(layer(x[:, :2]))  # what has more rows is the library's product
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_layer_takes_its_parts_one_by_one_where_they_are_not_plain(monkeypatch):
    calls = count_calls(monkeypatch)
    x = torch.randn(1, 3, 4, 4, 32)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def hook(layer):
        layer.key_value[1].register_forward_hook(lambda module, inputs, output: 2 * output)

    def pre_hook(layer):
        layer.reduce[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))

    def another_forward(layer):
        layer.query.forward = lambda x: torch.nn.functional.linear(2 * x, layer.query.weight)

    def another_class(layer):
        layer.out.__class__ = Doubled

    def no_bias(layer):
        layer.query.bias = None

    for change in (hook, pre_hook, another_forward, another_class, no_bias):
        layer = ShuntedAttention(32, 4)
        change(layer)
        expected = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *rest: seen.append(m))
    with handle, torch.no_grad():
        layer = ShuntedAttention(32, 4)
        layer(x)
    assert layer.query in seen and layer.out in seen
    for layer in (ShuntedAttention(32, 4, padding="floor"), ShuntedAttention(40, 4)):
        with torch.no_grad():
            layer(x.repeat(1, 1, 1, 1, 2)[..., : layer.dim])
    ShuntedAttention(32, 4)(x)  # whoever asks for no gradient says so
    assert not calls


def test_the_layer_checks_what_it_is_given():
    weight, bias, x = torch.randn(16, 16), torch.randn(16), torch.randn(1, 2, 2, 2, 16)
    key_value = [torch.randn(32, 16), torch.randn(32)]
    convolution = [torch.randn(16, 16, 2, 1, 1), bias]
    one, two = [1, 1, 1], [2, 1, 1]
    good = [weight, bias, *key_value, weight, bias]
    assert op.layer(x, good, [], 2, one).shape == x.shape
    assert op.layer(x, good, convolution, 2, two).shape == x.shape
    for message, arguments in {
        "x must be float32": (x.double(), good, [], 2, one),
        "x must have 5 dimensions": (x[0], good, [], 2, one),
        "16 channels do not fit 3 heads": (x, good, [], 3, one),
        "query.weight must have shape": (x, [weight[:8], *good[1:]], [], 2, one),
        "key_value.bias must have shape": (x, [*good[:3], bias, *good[4:]], [], 2, one),
        "out.weight must be contiguous": (x, [*good[:4], weight.mT, bias], [], 2, one),
        "got 6 projections": (x, good, convolution, 2, one * 2),
        "got 0 reductions": (x, good, [], 2, two),
        "reduce.weight must have shape": (x, good, convolution, 2, [1, 2, 1]),
        "rates must be at least 1": (x, good, convolution, 2, [0, 1, 1]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op.layer(*arguments)


@pytest.mark.parametrize("level", ("portable", "avx2", "avx512"))
def test_other_levels(level):
    run_tests_at_level(level, __file__, "--sweep=6")


def test_unknown_level_is_refused():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vsod_ops import backends; print(backends.compiled_module('_cpu'))",
        ],
        env=os.environ | {"VSOD_OPS_SIMD": "mmx"},
        capture_output=True,
        text=True,
    )
    assert "VSOD_OPS_SIMD must be" in done.stdout
