"""shunted_attention as a torch op: definition, arguments, autograd, compile, export."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from checks import BACKENDS, DTYPES, assert_two_threads_agree
from checks_attention import attention_inputs, eager_attention

from vsod_ops import schemas, shunted_attention
from vsod_ops.shunted_attention import op

OP = torch.ops.vsod_ops.shunted_attention.default


def small(dtype=torch.float32, **options):
    return attention_inputs(2, (1, 2), 5, (5, 3), 8, dtype, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_sdpa_with_one_group(backend):
    q, (k,), (v,) = attention_inputs(2, (3,), 17, (33,), 24, torch.float64)
    out = shunted_attention(q, [k], [v], backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_separate_attentions(backend):
    q, keys, values = attention_inputs(2, (1, 3, 2), 11, (7, 20, 2), 16, torch.float64)
    out, lse = shunted_attention(q, keys, values, return_lse=True, backend=backend)
    expected, expected_lse = eager_attention(q, keys, values, 0.25)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    assert lse.dtype == torch.float32 and not lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    q, keys, values = small(torch.float64, requires_grad=True)

    def f(q, k0, k1, v0, v1):
        return shunted_attention(q, [k0, k1], [v0, v1], scale=0.4, backend=backend)

    assert torch.autograd.gradcheck(f, (q, *keys, *values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("contiguous", "permuted", "sliced"))
@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(backend, dtype, layout, requires_grad):
    q, keys, values = small(dtype, layout=layout, requires_grad=requires_grad)
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.library.opcheck(OP, (q, keys, values, 0.3, backend), **tolerances)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward_op(backend):
    q, keys, values = small(layout="permuted")
    out, lse = OP(q, keys, values, 0.3, backend)
    arguments = (torch.randn_like(out), q, keys, values, out, lse, 0.3)
    torch.library.opcheck(
        torch.ops.vsod_ops.shunted_attention_backward.default,
        (*arguments, True, [True, False], [False, True], backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed(backend):
    q, keys, values = small(torch.float64, requires_grad=True)
    everything = torch.autograd.grad(
        shunted_attention(q, keys, values, backend=backend).square().sum(), [q, *keys, *values]
    )
    for wanted in ([0], [1], [4], [0, 3], [2, 4]):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((q, *keys, *values))]
        out = shunted_attention(leaves[0], leaves[1:3], leaves[3:], backend=backend)
        out.square().sum().backward()
        for i, x in enumerate(leaves):
            if i in wanted:
                torch.testing.assert_close(x.grad, everything[i])
            else:
                assert x.grad is None


def test_no_gradient_that_nobody_asked_for(monkeypatch):
    """What requires a gradient may still not be asked for."""
    needs = []
    backward = op._backward_unnamed
    monkeypatch.setattr(
        op, "_backward_unnamed", lambda *inputs: needs.append(inputs[7:]) or backward(*inputs)
    )
    q, keys, values = small(requires_grad=True)
    between = [q * 2, *(k * 2 for k in keys), *(v * 2 for v in values)]
    out = shunted_attention(between[0], between[1:3], between[3:]).sum()
    torch.autograd.grad(out, [between[0], between[3]], retain_graph=True)
    torch.autograd.grad(out, keys[1], retain_graph=True)
    out.backward()
    assert needs == [
        (True, [False, False], [True, False]),
        (False, [False, True], [False, False]),
        (True, [True, True], [True, True]),
    ]


def test_unneeded_gradients_cost_no_memory():
    q, keys, values = small()
    out, lse = OP(q, keys, values, 0.3, None)
    backward = torch.ops.vsod_ops.shunted_attention_backward
    dq, dkeys, dvalues = backward(
        out, q, keys, values, out, lse, 0.3, True, [False, False], [False, False], None
    )
    assert dq.shape == q.shape
    assert [g.numel() for g in (*dkeys, *dvalues)] == [0, 0, 0, 0]


def test_double_backward_is_a_clear_error():
    q, keys, values = small(requires_grad=True)
    (dq,) = torch.autograd.grad(shunted_attention(q, keys, values).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_keeps_the_memory_order_of_q(backend):
    q, keys, values = small(layout="permuted")
    assert shunted_attention(q, keys, values, backend=backend).stride() == q.stride()


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_forward_and_backward_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, keys, values: shunted_attention(q * 2, keys, values, return_lse=True),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=3):
        for queries in (5, 9, 12, 17) if dynamic else (5,):
            inputs = attention_inputs(2, (1, 2), queries, (queries, 3), 8, torch.float32)
            results = []
            for f in (compiled, lambda q, k, v: shunted_attention(q * 2, k, v, return_lse=True)):
                q, keys, values = (
                    x.detach().requires_grad_()
                    if isinstance(x, torch.Tensor)
                    else [t.detach().requires_grad_() for t in x]
                    for x in inputs
                )
                out, lse = f(q, keys, values)
                grads = torch.autograd.grad(out.square().sum(), [q, *keys, *values])
                results.append([out, lse, *grads])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compile_with_inductor():
    torch._dynamo.reset()
    q, keys, values = small(requires_grad=True)
    f = torch.compile(lambda *x: shunted_attention(*x).relu().sum(), fullgraph=True, dynamic=True)
    (dq,) = torch.autograd.grad(f(q, keys, values), q)
    (expected,) = torch.autograd.grad(shunted_attention(q, keys, values).relu().sum(), q)
    torch.testing.assert_close(dq, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k0, k1, v0, v1):
            return shunted_attention(q, [k0, k1], [v0, v1])

    q, keys, values = small()
    program = torch.export.export(Layer(), (q, *keys, *values))
    torch.testing.assert_close(
        program.module()(q, *keys, *values), shunted_attention(q, keys, values)
    )


def test_autocast_runs_in_its_dtype():
    q, keys, values = small(requires_grad=True)
    keys[0] = keys[0].detach().bfloat16()  # mixed dtypes are legal under autocast
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = shunted_attention(q, keys, values, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert shunted_attention(q, keys, values).dtype == torch.float16


def test_empty_batch_and_no_queries():
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape, requires_grad=True)
        k = torch.randn(shape[0], 2, 3, 8, requires_grad=True)
        out, lse = shunted_attention(q, [k], [k], return_lse=True)
        assert out.shape == shape and lse.shape == shape[:3]
        out.sum().backward()
        assert q.grad.shape == shape and torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_rows(backend, dtype):
    q, keys, values = attention_inputs(1, (1, 1), 20, (300, 40), 16, dtype)
    clean = shunted_attention(q, keys, values, backend=backend)
    q = q.clone()
    q[0, 0, 3, 2] = math.nan
    q[0, 1, 7, 0] = math.inf
    out, lse = shunted_attention(q, keys, values, return_lse=True, backend=backend)
    expected, expected_lse = eager_attention(
        q.double(), [k.double() for k in keys], [v.double() for v in values], 0.25
    )
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    bad = out.isnan().any(-1)
    assert bad.sum() == 2
    assert torch.equal(out[~bad], clean[~bad])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_inf_scores(backend, dtype):
    # Scores are q * k in one dimension: keys of -inf are masked out, a whole block of them too.
    q = torch.ones(1, 1, 4, 1, dtype=dtype)
    k = torch.randn(1, 1, 700, 1).to(dtype)
    v = torch.randn(1, 1, 700, 1).to(dtype)
    k[..., :300, :] = -math.inf
    k[..., 600:, :] = -math.inf
    out, lse = shunted_attention(q, [k], [v], return_lse=True, backend=backend)
    expected, expected_lse = shunted_attention(
        q, [k[..., 300:600, :]], [v[..., 300:600, :]], return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    k[...] = -math.inf
    out, lse = shunted_attention(q, [k], [v], return_lse=True, backend=backend)
    assert out.isnan().all() and torch.equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", (0.0, -0.7, 30.0))
def test_unusual_scales(backend, scale):
    q, keys, values = attention_inputs(1, (1, 1), 20, (300, 5), 16, torch.float64)
    leaves = [x.requires_grad_() for x in (q, *keys, *values)]
    out, lse = shunted_attention(q, keys, values, scale=scale, return_lse=True, backend=backend)
    expected, expected_lse = eager_attention(q, keys, values, scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def change(**replacements):
    """Arguments of a good call with some replaced."""
    q, keys, values = small()
    return {"q": q, "keys": keys, "values": values} | replacements


def head_slices(x, n):
    return [t[:, :n] for t in x]


BAD_CALLS = [
    (lambda: change(q=torch.zeros(5, 8)), ValueError, r"q must have 4 dimensions"),
    (lambda: change(q=torch.zeros(2, 3, 5, 8, dtype=torch.int64)), TypeError, "q must be float32"),
    (lambda: change(q=[1.0]), TypeError, "q must be a tensor"),
    (lambda: change(keys=[]), ValueError, "keys is empty"),
    (lambda: change(keys=torch.zeros(2, 3, 5, 8)), TypeError, "keys must be a list or tuple"),
    (lambda: change(keys=small()[1][:1]), ValueError, "keys has 1 groups but values has 2"),
    (lambda: change(q=torch.zeros(2, 4, 5, 8)), ValueError, r"1 \+ 2 = 3 heads but q has 4"),
    (
        lambda: change(values=[torch.zeros(2, 1, 5, 8), torch.zeros(2, 4, 3, 8)]),
        ValueError,
        r"keys\[1\] has 2 heads but values\[1\] has 4",
    ),
    (
        lambda: change(values=[torch.zeros(2, 1, 6, 8), torch.zeros(2, 2, 3, 8)]),
        ValueError,
        r"keys\[0\] has length 5 but values\[0\] has 6",
    ),
    (
        lambda: change(keys=[torch.zeros(2, 1, 5, 9), torch.zeros(2, 2, 3, 8)]),
        ValueError,
        r"keys\[0\] has head_dim 9 but q has 8",
    ),
    (
        lambda: change(keys=[torch.zeros(3, 1, 5, 8), torch.zeros(2, 2, 3, 8)]),
        ValueError,
        r"keys\[0\] has batch size 3 but q has 2",
    ),
    (
        lambda: change(
            keys=[torch.zeros(2, 1, 0, 8), torch.zeros(2, 2, 3, 8)],
            values=[torch.zeros(2, 1, 0, 8), torch.zeros(2, 2, 3, 8)],
        ),
        ValueError,
        r"keys\[0\] has length 0",
    ),
    (
        lambda: change(
            keys=[torch.zeros(2, 0, 5, 8), torch.zeros(2, 3, 3, 8)],
            values=[torch.zeros(2, 0, 5, 8), torch.zeros(2, 3, 3, 8)],
        ),
        ValueError,
        r"keys\[0\] has no heads",
    ),
    (
        lambda: change(keys=[k.double() for k in small()[1]]),
        TypeError,
        r"keys\[0\] is torch.float64 but q is torch.float32",
    ),
    (
        lambda: change(values=[v.to("meta") for v in small()[2]]),
        ValueError,
        r"values\[0\] is on meta but q is on cpu",
    ),
    (lambda: change(scale=math.nan), ValueError, "scale must be finite"),
    (lambda: change(scale=math.inf), ValueError, "scale must be finite"),
    (lambda: change(backend="metal"), ValueError, "backend must be None or one of"),
    (lambda: change(backend="cuda"), ValueError, "backend 'cuda' cannot run"),
    (
        lambda: {
            "q": torch.zeros(1, 1, 2, 257),
            "keys": [torch.zeros(1, 1, 2, 257)],
            "values": [torch.zeros(1, 1, 2, 257)],
        },
        ValueError,
        "head_dim 257; it must be from 1 to 256",
    ),
]


@pytest.mark.parametrize("compiled", (True, False))
@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_bad_arguments(call, error, message, compiled, monkeypatch):
    """The same words whether the compiled module looks at the arguments first or nobody does."""
    if not compiled:
        monkeypatch.setattr(schemas, "has_cpu_kernels", lambda: False)
    with pytest.raises(error, match=message):
        shunted_attention(**call())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_triton_on_cpu_tensors_says_why_not():
    with pytest.raises(ValueError, match="backend 'triton' cannot run"):
        shunted_attention(*small(), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_above_2_31_elements(backend):
    # The second head lies 2^31 + 64 elements behind the first; only the pages used are touched.
    memory = torch.empty(2**31 + 1024, dtype=torch.float16)
    q = memory.as_strided((1, 2, 6, 8), (1, 2**31 + 64, 8, 1))
    small_q = torch.randn(1, 2, 6, 8).half()
    q.copy_(small_q)
    out = shunted_attention(q, [q], [q], backend=backend)
    expected = shunted_attention(small_q, [small_q], [small_q], backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    k = torch.randn(1, 1, 7, 8, dtype=torch.float64).expand(3, 2, 7, 8)
    q = torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True)
    grad_out = torch.ones(1, dtype=torch.float64).expand(3, 2, 5, 8)
    out = shunted_attention(q, [k], [k], backend=backend)
    expected, _ = eager_attention(q, [k], [k], 8**-0.5)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, q, grad_out), torch.autograd.grad(expected, q, grad_out)
    )


def test_two_threads_at_once():
    inputs = [
        attention_inputs(1, (1, 1), 200, (300, 50), 32, torch.float32, seed=s) for s in (1, 2)
    ]
    assert_two_threads_agree(lambda case: shunted_attention(*case), inputs)


def test_import_is_light():
    code = (
        "import sys, vsod_ops\n"
        "heavy = {'triton', 'torchvision', 'matplotlib', 'vsod_models'} & set(sys.modules)\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "q = torch.randn(1, 2, 3, 4); vsod_ops.shunted_attention(q, [q], [q])\n"
        "heavy |= {'triton', 'torchvision'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_trains_like_the_reference():
    def losses(backend):
        torch.manual_seed(3)
        weight = (torch.randn(8, 24) * 0.3).requires_grad_()
        x, target = torch.randn(4, 12, 8), torch.randn(4, 12, 8)
        optimizer = torch.optim.Adam([weight], lr=0.05)
        history = []
        for _ in range(20):
            q, k, v = (x @ weight).view(4, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
            out = shunted_attention(
                q, [k[:, :1], k[:, 1:, ::2]], [v[:, :1], v[:, 1:, ::2]], backend=backend
            )
            loss = F.mse_loss(out.transpose(1, 2).flatten(2), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    fused, reference = losses(None), losses("reference")
    assert fused[-1] < fused[0]
    assert fused == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_hook_may_change_the_strides_of_what_is_saved(backend):
    q, k, v = (torch.randn(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(shunted_attention(q, [k], [v]).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT):
        out = shunted_attention(q, [k], [v], backend=backend)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), expected)
