"""Shapes without data: meta tensors, compiled calls whose numbers and lengths change, export."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from vsod_ops import ConvLSTM, ShuntedAttention, conv_lstm, dense_crf, shunted_attention


def attention_inputs(length, head_dim=8, device="cpu"):
    q, k = torch.randn(1, 4, 6, head_dim), torch.randn(1, 2, length, head_dim)
    return q.to(device), [k.to(device), k[:, :, :1].to(device)]


def test_meta_tensors():
    q, keys = attention_inputs(5, device="meta")
    out, lse = shunted_attention(q, keys, keys, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, q.shape[:3])
    x, weight_ih, weight_hh = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for shape in ((2, 3, 4, 5, 6), (8, 4, 3, 3), (8, 2, 3, 3))
    )
    out, (_, c) = conv_lstm(x, None, weight_ih, weight_hh)
    assert out.shape == (2, 3, 2, 5, 6) and out.dtype == torch.bfloat16
    assert c.shape == (2, 2, 5, 6) and c.dtype == torch.float32
    image = torch.empty(1, 3, 4, 4, dtype=torch.uint8, device="meta")
    assert dense_crf(torch.empty(1, 4, 4, device="meta"), image).shape == (1, 4, 4)
    with torch.device("meta"):
        assert ShuntedAttention(8, 2)(torch.empty(1, 2, 4, 4, 8)).shape == (1, 2, 4, 4, 8)
        assert ConvLSTM(3, 2, 3)(torch.empty(1, 2, 3, 4, 4))[0].shape == (1, 2, 2, 4, 4)


def count_compilations(function, calls):
    """How often torch.compile compiles `function` for all calls, each of which must be right."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    traced = torch.compile(function, backend=backend, fullgraph=True)
    for arguments in calls:
        torch.testing.assert_close(traced(*arguments), function(*arguments))
    return len(compiled)


def scaled_attention(q, key):
    return shunted_attention(q * 2, [key, key[:, :, :2]], [key, key[:, :, 1:3]])


def scaled_conv_lstm(x, weight_ih, weight_hh):
    out, (_, c) = conv_lstm(x * 2, None, weight_ih, weight_hh)
    return out.sum() + c


CALLS = {
    "shunted_attention": (scaled_attention, ((1, 4, 6, 8), (1, 2, 5, 8))),
    "conv_lstm": (scaled_conv_lstm, ((1, 2, 3, 4, 5), (8, 3, 1, 1), (8, 2, 1, 1))),
}


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("op", CALLS)
def test_compiled_graphs_hold_the_fused_op(op, dynamic):
    """Both directions of a call, and not the definition in plain PyTorch."""
    function, shapes = CALLS[op]
    graphs = []

    def record(graph, _inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append({str(node.target) for node in nodes})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    traced = torch.compile(
        function, backend=aot_autograd(fw_compiler=record), dynamic=dynamic, fullgraph=True
    )
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for call in (traced, function):
        out = call(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    forward, backward = graphs
    assert f"vsod_ops.{op}.unnamed" in forward
    assert f"vsod_ops.{op}_backward.unnamed" in backward
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("op", CALLS)
def test_transforms_inside_and_outside_of_a_compiled_call(op):
    """There the definition runs, as it does without torch.compile."""
    function, shapes = CALLS[op]
    x, *others = (torch.randn(shape) for shape in shapes)

    def loss(x):
        return function(x, *others).square().sum()

    torch._dynamo.reset()
    expected = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="eager")(x), expected)
    traced = torch.compile(loss, backend="eager")
    torch.testing.assert_close(traced(x), loss(x))
    torch.testing.assert_close(torch.func.grad(traced)(x), expected)
    torch.testing.assert_close(torch.func.jvp(traced, (x,), (x,)), torch.func.jvp(loss, (x,), (x,)))


def test_a_scale_that_changes_is_not_compiled_in():
    q, keys = attention_inputs(5)
    calls = [(scale,) for scale in (0.1, 0.2, -0.3, 0.7, 1.1)]
    count = count_compilations(lambda scale: shunted_attention(q, keys, keys, scale=scale), calls)
    assert count <= 2


def test_lengths_that_change_are_not_compiled_in():
    calls = [attention_inputs(length) for length in (5, 7, 9, 12, 31)]
    assert count_compilations(lambda q, keys: shunted_attention(q, keys, keys), calls) <= 2


def test_head_dims_that_change_are_not_compiled_in():
    calls = [attention_inputs(5, head_dim) for head_dim in (8, 16, 24, 32, 40)]
    assert count_compilations(lambda q, keys: shunted_attention(q, keys, keys), calls) <= 2


def test_steps_and_sizes_that_change_are_not_compiled_in():
    weights = torch.randn(8, 3, 3, 3), torch.randn(8, 2, 3, 3)
    calls = [(torch.randn(1, steps, 3, 14, 15),) for steps in (4, 5, 6, 7)]
    assert count_compilations(lambda x: conv_lstm(x, None, *weights)[0], calls) <= 2
    calls = [(torch.randn(1, 4, 3, size, 15),) for size in (10, 11, 12, 13)]
    assert count_compilations(lambda x: conv_lstm(x, None, *weights)[0], calls) <= 2


def test_a_length_that_depends_on_data():
    """What boolean indexing leaves has a length that no shape says."""

    def kept(q, key, mask):
        key = key[:, :, mask]
        torch._check(key.shape[2] >= 1)
        return shunted_attention(q, [key], [key])

    q, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    mask = torch.arange(9) % 2 == 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        traced = torch.compile(kept, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(traced(q, key, mask), kept(q, key, mask))


def test_conv_lstm_is_exported_for_any_number_of_steps():
    lstm = ConvLSTM(3, 2, 3, num_layers=2).eval()
    steps = torch.export.Dim("steps", min=1, max=64)
    x = torch.randn(1, 4, 3, 5, 6)
    exported = torch.export.export(lstm, (x,), dynamic_shapes=({1: steps},)).module()
    for count in (1, 2, 4, 9):
        x = torch.randn(1, count, 3, 5, 6)
        torch.testing.assert_close(exported(x), lstm(x))
    gradients = [torch.autograd.grad(f(x)[0].sum(), f.parameters()) for f in (exported, lstm)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_state_after_no_steps_is_a_copy(dtype):
    weight_ih, weight_hh = (
        torch.randn(8, 1, 1, 1, dtype=dtype),
        torch.randn(8, 2, 1, 1, dtype=dtype),
    )
    state = torch.randn(1, 2, 3, 3, dtype=dtype), torch.randn(1, 2, 3, 3)
    x = torch.empty(1, 0, 1, 3, 3, dtype=dtype)
    _, (h, c) = conv_lstm(x, state, weight_ih, weight_hh)
    for new, old in zip((h, c), state, strict=True):
        assert torch.equal(new, old)
        new.zero_()
        assert old.any()
