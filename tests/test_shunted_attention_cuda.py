"""shunted_attention on CUDA tensors: error rule, streams, graphs, compile.  Needs a GPU."""

import pytest
import torch
from checks import GPU_DTYPES, nan_filled_memory, needs_gpu
from checks_attention import attention_inputs, attention_sweep_case, check_attention

from vsod_ops import ShuntedAttention, shunted_attention

pytestmark = needs_gpu
SHAPES = [
    dict(batch=1, group_heads=(2, 2), queries=3920, lengths=(3920, 588), head_dim=128),
    dict(batch=2, group_heads=(4, 4), queries=980, lengths=(980, 147), head_dim=64),
    dict(batch=1, group_heads=(1, 2), queries=239, lengths=(513, 1), head_dim=40),
    dict(batch=1, group_heads=(1, 1, 2), queries=17, lengths=(1, 63, 113), head_dim=256),
]


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['queries']}x{s['head_dim']}")
@pytest.mark.parametrize("layout", ("contiguous", "permuted"))
def test_error_rule(shape, dtype, layout, tf32):
    tf32("highest")
    with nan_filled_memory():
        inputs = attention_inputs(**shape, dtype=dtype, device="cuda", layout=layout)
        check_attention(None, *inputs)


def test_tf32_when_torch_allows_it(tf32):
    tf32("high")
    check_attention(None, *attention_inputs(**SHAPES[1], dtype=torch.float32, device="cuda"))


def test_sweep(sweep_index):
    case = attention_sweep_case(sweep_index, GPU_DTYPES)
    check_attention(None, *attention_inputs(**case, device="cuda"))


@pytest.mark.parametrize("dtype", (*GPU_DTYPES, torch.float64))
def test_opcheck(dtype):
    q, keys, values = attention_inputs(
        2, (1, 2), 17, (17, 5), 16, dtype, device="cuda", layout="permuted", requires_grad=True
    )
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float64 else {}
    torch.library.opcheck(
        torch.ops.vsod_ops.shunted_attention.default, (q, keys, values, 0.3, None), **tolerances
    )


def gradients(q, keys, values):
    leaves = [x.detach().requires_grad_() for x in (q, *keys, *values)]
    out = shunted_attention(leaves[0], leaves[1:3], leaves[3:])
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def test_same_bits_on_every_run():
    inputs = attention_inputs(2, (2, 2), 980, (980, 147), 64, torch.bfloat16, device="cuda")
    first = gradients(*inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(*inputs), strict=True))


def test_cuda_graph():
    layer = ShuntedAttention(64, 2).cuda()
    x = torch.randn(1, 5, 14, 14, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # tuning and compilation, outside the graph
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
        out.square().sum().backward()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [out.clone(), *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad(set_to_none=True)
    expected = layer(x)
    expected.square().sum().backward()
    for a, b in zip(replayed, [expected, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(a, b)


def test_side_stream():
    inputs = attention_inputs(1, (1, 1), 980, (980, 147), 64, torch.bfloat16, device="cuda")
    expected = shunted_attention(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = [inputs[0] * 1, *inputs[1:]]
        out = shunted_attention(*late)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    inputs = attention_inputs(1, (1, 1), 100, (100, 20), 64, torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        check_attention(None, *inputs)


def test_compile():
    q, keys, values = attention_inputs(1, (1, 1), 200, (200, 30), 32, torch.float32, device="cuda")
    compiled = torch.compile(lambda *x: shunted_attention(*x) * 2, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(q, keys, values), shunted_attention(q, keys, values) * 2)


def test_autocast():
    inputs = attention_inputs(1, (1, 1), 64, (64, 8), 32, torch.float32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert shunted_attention(*inputs).dtype == torch.bfloat16


def test_offsets_above_2_31_elements():
    memory = torch.empty(2**31 + 2**16, dtype=torch.float16, device="cuda")
    q = memory.as_strided((1, 2, 64, 32), (1, 2**31, 32, 1))
    near = torch.randn(1, 2, 64, 32, device="cuda").half()
    q.copy_(near)
    torch.testing.assert_close(
        shunted_attention(q, [q], [q]), shunted_attention(near, [near], [near])
    )


def test_no_score_matrix_in_memory():
    inputs = attention_inputs(1, (1, 1), 15680, (15680, 1960), 64, torch.bfloat16, device="cuda")
    shunted_attention(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shunted_attention(*inputs)
    assert torch.cuda.max_memory_allocated() - before < 16 * inputs[0].nbytes
