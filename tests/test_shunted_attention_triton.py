"""The Triton kernels of shunted_attention: in the interpreter, compiled for GPUs, and on one.

Kernel tests run on CUDA tensors where there is a GPU, and on CPU tensors under TRITON_INTERPRET=1,
which must be set before triton is first imported: `test_kernels_in_the_interpreter` runs this file
once more in a process of its own that has it.  Compile tests need no GPU.
"""

import math

import pytest
import torch
from checks import nan_filled_memory
from checks_attention import attention_inputs, attention_sweep_case, check_attention
from checks_triton import (
    DEVICE,
    INTERPRET,
    SHARED_MEMORY,
    TRITON,
    TYPE_NAMES,
    compile_for,
    compiled_only,
    figures,
    on_device,
    on_gpu,
    recorded_launches,
    run_in_the_interpreter,
    triton,
)
from checks_triton import compilations as compilations_of

from vsod_ops import shunted_attention, triton_tuning
from vsod_ops.shunted_attention import reference
from vsod_ops.shunted_attention.triton import launch, plan, tiles
from vsod_ops.shunted_attention.triton.backward import (
    shunted_attention_bwd_delta_kernel,
    shunted_attention_bwd_reduce_kernel,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@compiled_only
def test_kernels_in_the_interpreter():
    run_in_the_interpreter(__file__, "--sweep=4", at_least=31)


# Around the interpreter's tiles of 32; splits of the query loop begin at multiples of 128.
SHAPES = [
    dict(batch=1, group_heads=(1, 3), queries=113, lengths=(113, 17), head_dim=64),
    dict(batch=2, group_heads=(1, 2), queries=63, lengths=(63, 32), head_dim=24),
    dict(batch=1, group_heads=(1, 1, 1), queries=1, lengths=(1, 2, 33), head_dim=1),
    dict(batch=1, group_heads=(2,), queries=17, lengths=(65,), head_dim=8),
    dict(batch=1, group_heads=(1, 1), queries=40, lengths=(5, 64), head_dim=128),
    dict(batch=1, group_heads=(1, 1, 2), queries=32, lengths=(31, 96, 2), head_dim=40),
    dict(batch=1, group_heads=(1,), queries=33, lengths=(47,), head_dim=160),
    dict(batch=1, group_heads=(1,), queries=17, lengths=(33,), head_dim=256),
    dict(batch=1, group_heads=(1,) * 10, queries=9, lengths=tuple(range(2, 21, 2)), head_dim=16),
]


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s['queries']}x{s['lengths']}x{s['head_dim']}"
)
def test_error_rule(shape, dtype):
    check_attention("triton", *attention_inputs(**shape, dtype=dtype, device=DEVICE))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("permuted", "sliced"))
def test_strides_in_nan_filled_memory(layout, dtype):
    with nan_filled_memory():
        inputs = attention_inputs(2, (1, 2), 45, (45, 23), 24, dtype, layout=layout, device=DEVICE)
        check_attention("triton", *inputs, grad_layout="permuted")


@on_device
@pytest.mark.parametrize("offset", (1, 2, 4))
def test_unaligned_rows(offset):
    """Rows that begin at odd multiples of 2, 4 and 8 bytes."""
    q, keys, values = attention_inputs(1, (1, 1), 37, (37, 9), 32, torch.float16, device=DEVICE)

    def shifted(x):
        buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 2 * offset), math.nan)
        buffer[..., offset:-offset] = x
        return buffer[..., offset:-offset]

    assert launch.row_alignment([shifted(q)]) == offset
    check_attention("triton", shifted(q), [shifted(k) for k in keys], [shifted(v) for v in values])


@on_device
def test_sweep(sweep_index):
    case = attention_sweep_case(sweep_index, DTYPES)
    check_attention("triton", *attention_inputs(**case, device=DEVICE))


@on_device
@pytest.mark.parametrize("scale", (0.0, -0.7, 1.5))
def test_scale(scale):
    inputs = attention_inputs(1, (1, 1), 20, (40, 7), 16, torch.float32, device=DEVICE)
    check_attention("triton", *inputs, scale=scale)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key(dtype):
    """out is v, lse the score, dQ and dK are exactly 0."""
    q, keys, values = attention_inputs(1, (1,), 40, (1,), 16, dtype, device=DEVICE)
    out, lse, dq, dk, dv = results(q, keys, values, torch.ones_like(q))
    assert torch.equal(out, values[0].expand_as(out))
    torch.testing.assert_close(lse, (q.float() @ keys[0].float().mT)[..., 0] * 0.25)
    for x in (dq, dk):
        assert torch.equal(x, torch.zeros_like(x))
    torch.testing.assert_close(dv, torch.full_like(dv, 40))


def results(q, keys, values, grad_out, scale=0.25):
    """(out, lse, dq, dk.., dv..) of the kernels."""
    out, lse = launch.forward(q, keys, values, scale)
    every = [True] * len(keys)
    dq, dk, dv = launch.backward(grad_out, q, keys, values, out, lse, scale, True, every, every)
    return [out, lse, dq, *dk, *dv]


def reference_results(q, keys, values, grad_out, scale=0.25):
    out, lse = reference.forward(q, keys, values, scale)
    dq, dk, dv = reference.backward(grad_out, q, keys, values, out, lse, scale)
    return [out, lse, dq, *dk, *dv]


@on_device
def test_nan_and_inf_reach_the_same_elements_as_in_the_reference():
    q, keys, values = attention_inputs(1, (2, 2), 40, (70, 40), 16, torch.float32, device=DEVICE)
    q[0, 0, 3, 2] = math.nan
    q[0, 2, 39, 0] = math.inf
    q[0, 3, 5, 1] = -math.inf
    grad_out = torch.randn_like(q)
    grad_out[0, 1, 38, 4] = math.inf
    arguments = q, keys, values, grad_out
    for actual, expected in zip(results(*arguments), reference_results(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@on_device
def test_minus_inf_scores():
    """A block of keys, all keys, and none at -inf: no NaN but where softmax has one."""
    q, keys, values = attention_inputs(1, (3,), 9, (70,), 16, torch.float32, device=DEVICE)
    q[..., 0] = q[..., 0].abs() + 0.5
    keys[0][0, 0, :40, 0] = -math.inf
    keys[0][0, 1, :, 0] = -math.inf
    out, lse = launch.forward(q, keys, values, 0.25)
    expected, expected_lse = reference.forward(q, keys, values, 0.25)
    assert torch.isfinite(out[0, 0]).all() and torch.isnan(out[0, 1]).all()
    assert (lse[0, 1] == -math.inf).all()
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    # With the sign of the scale turned the same keys are at +inf.
    out, lse = launch.forward(q, keys, values, -0.25)
    expected, expected_lse = reference.forward(q, keys, values, -0.25)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)


@pytest.fixture
def split_query_loops(monkeypatch):
    """Split the query loop of every group wherever it can be."""

    def rows(part, queries, head_dim, needs, workers):
        return [min(128, queries)] * part.real

    plan.backward.cache_clear()
    monkeypatch.setattr(plan, "_split_rows", rows)
    yield
    plan.backward.cache_clear()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", ((150, 20), (40,)))
def test_split_query_loops(split_query_loops, lengths, dtype):
    heads = (1, 2)[: len(lengths)]
    shape = dict(batch=2, group_heads=heads, queries=150, lengths=lengths, head_dim=40)
    q, keys, values = attention_inputs(**shape, dtype=dtype, layout="permuted", device=DEVICE)
    (part,) = plan.launches(2, 150, lengths, heads)
    every = (True,) * len(lengths)
    backward = plan.backward(part, 150, 40, (True, every, every), 132)
    assert backward.splits.parts[: part.real] == (2,) * len(lengths)
    assert backward.reduce_programs > 0
    with nan_filled_memory():
        check_attention("triton", q, keys, values)


@on_device
@pytest.mark.parametrize("split", (False, True))
def test_repeats_are_equal_to_the_bit(split, request):
    if split:
        request.getfixturevalue("split_query_loops")
    inputs = attention_inputs(1, (1, 2), 140, (60, 33), 16, torch.float16, device=DEVICE)
    grad_out = torch.randn_like(inputs[0])
    first = results(*inputs, grad_out)
    for _ in range(1 if INTERPRET else 10):
        for a, b in zip(first, results(*inputs, grad_out), strict=True):
            assert torch.equal(a, b)


@on_device
@pytest.mark.parametrize("split", (False, True))
def test_only_the_gradients_that_are_needed(split, request):
    if split:
        request.getfixturevalue("split_query_loops")
    q, keys, values = attention_inputs(1, (1, 1), 140, (20, 33), 16, torch.float32, device=DEVICE)
    grad_out = torch.randn_like(q)
    _, _, dq, *rest = results(q, keys, values, grad_out)
    out, lse = launch.forward(q, keys, values, 0.25)
    for need_q, need_keys, need_values in (
        (True, [False, False], [False, False]),
        (False, [True, False], [False, False]),
        (False, [False, False], [False, True]),
        (True, [False, True], [True, False]),
        (False, [False, False], [False, False]),
    ):
        needs = [need_q, *need_keys, *need_values]
        actual = launch.backward(
            grad_out, q, keys, values, out, lse, 0.25, need_q, need_keys, need_values
        )
        actual = [actual[0], *actual[1], *actual[2]]
        for need, gradient, expected in zip(needs, actual, [dq, *rest], strict=True):
            if need:
                # Another set of products may round differently on a GPU.
                torch.testing.assert_close(gradient, expected)
            else:
                assert gradient.shape == (0,)


@on_device
def test_expanded_gradient():
    """out.sum() has a gradient whose strides are all 0."""
    inputs = attention_inputs(1, (1, 1), 21, (21, 5), 16, torch.float32, device=DEVICE)
    leaves = [x.requires_grad_() for x in (inputs[0], *inputs[1], *inputs[2])]
    grads = []
    for backend in ("triton", "reference"):
        out = shunted_attention(leaves[0], leaves[1:3], leaves[3:], backend=backend)
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@on_device
def test_a_key_tensor_that_is_shared_and_expanded():
    q, (k,), (v,) = attention_inputs(2, (1,), 19, (35,), 16, torch.float32, device=DEVICE)
    q = torch.cat([q, -q], 1)
    one = k[:1].expand(2, 1, 35, 16)
    check_attention("triton", q, [one, k], [v, v])


def test_longest_groups_go_first_and_every_head_is_covered():
    (part,) = plan.launches(3, 100, (10, 90, 40), (1, 2, 4))
    assert part.order == (1, 2, 0, 0) and part.real == 3
    assert part.groups.lengths[:3] == (90, 40, 10) and part.groups.first_heads[:3] == (1, 3, 0)
    assert part.groups.first_pairs == (0, 6, 18, 21)
    many = plan.launches(1, 5, tuple(range(1, 20)), (1,) * 19)
    assert sorted(g for part in many for g in part.order[: part.real]) == list(range(19))
    assert [len(part.order) for part in many] == [8, 8, 4]


def test_query_loops_are_split_where_that_fills_the_machine():
    # 4 heads of 490 keys alone: 16 tiles of keys on 132 multiprocessors.
    (part,) = plan.launches(1, 3920, (490,), (4,))
    needs = (True, (True,), (True,))
    backward = plan.backward(part, 3920, 128, needs, 132)
    assert 4 <= backward.splits.parts[0] <= 8
    assert backward.workspace <= 2 * 4 * 3920 * 128
    # With a batch of 64 they fill it by themselves.
    (part,) = plan.launches(64, 3920, (490,), (4,))
    assert plan.backward(part, 3920, 128, needs, 132).splits.parts[0] == 1
    # Longest programs first: short queries' dQ programs come last.
    (part,) = plan.launches(1, 3920, (490, 3920), (2, 2))
    backward = plan.backward(part, 3920, 128, (True, (True, True), (True, True)), 132)
    columns = [work.columns for work in backward.work]
    assert columns == sorted(columns, reverse=True) and columns[-1] == 3 * 490


def test_makespan():
    work = [plan.Work(rows=128 * 62, repeats=1, columns=8), plan.Work(128 * 62, 1, 1)]
    assert plan.makespan(work, 128, 132) == 128 * 8
    assert plan.makespan(work, 64, 132) == 64 * (8 + 1)
    assert plan.makespan([plan.Work(128, 1000, 1)], 128, 100) == 128 * 10


@compiled_only
def test_nothing_is_timed_again_when_only_the_batch_changes(monkeypatch):
    timed = []

    def bench(tile):
        timed.append(tile)
        # Twice the work a program in 1.5 times the time.
        return 1.5 if tile.owned == 128 else 1.0

    monkeypatch.setattr(triton_tuning, "is_capturing", lambda: False)
    monkeypatch.setattr(triton_tuning, "_milliseconds", lambda launch, tile: bench(tile))
    monkeypatch.setattr(launch, "timings", triton_tuning.Timings())
    q = torch.zeros(1, 4, 3920, 128, dtype=torch.bfloat16)
    chosen = {}
    for batch in (1, 2, 3, 8, 16):
        (part,) = plan.launches(batch, 3920, (3920, 490), (2, 2))
        constants = launch._constants(part, q, 8)
        tile = launch.choose_tile("forward", q, part, part.work, constants, lambda tile: None)
        chosen[batch] = tile.owned
    assert timed == plan.TILES["forward", "hopper", "half", 128]
    # One tile of 128 rows on 62 of 132 multiprocessors, or two of 64 on 124; many fill both.
    assert chosen[1] == 64 and chosen[16] == 128


@compiled_only
def test_numbers_are_not_compiled_in(monkeypatch):
    """Lengths, heads and strides of 1 and of multiples of 16 need no kernel of their own."""
    monkeypatch.setattr(triton_tuning, "is_capturing", lambda: True)  # so nothing is timed
    variants = {}
    with recorded_launches() as launches:
        for lengths, heads in (((64, 1), (1, 1)), ((48, 17), (2, 16)), ((33, 5), (3, 1))):
            for batch in (1, 16):
                shape = (batch, heads, 160, lengths, 64, torch.float16)
                q, keys, values = attention_inputs(*shape, layout="permuted")
                results(q, keys, values, torch.ones_like(q))
    for name, kinds in launches:
        without_tiles = [x for x in kinds.values() if x[0] != "constexpr"]
        variants.setdefault(name, set()).add(str(without_tiles))
    assert {"shunted_attention_fwd_kernel", "shunted_attention_bwd_kernel"} <= set(variants)
    assert {len(found) for found in variants.values()} == {1}
    numbers = ("i32", "i32")
    for name, kinds in launches:
        if name != "shunted_attention_bwd_delta_kernel":
            tensors = "dkeys" if "reduce" in name else "keys"
            assert kinds[tensors][0] == (("*fp16", "*fp16"), *[numbers] * 4)
            assert kinds["groups"][0] == (numbers,) * 4


def compile_kernel(kernel, capability, dtype, constants, groups=2, warps=4, stages=1):
    """The kernel for an architecture, with the options of a launch."""
    pointer = "*" + TYPE_NAMES[dtype]
    strided = tiles.Strided((pointer,) * groups, *[("i32",) * groups] * 4)
    kinds = dict.fromkeys(("p_q", "p_out", "p_grad", "p_dq"), pointer)
    kinds |= dict.fromkeys(("keys", "values", "dkeys", "dvalues"), strided)
    for name, bundle, numbers in (
        ("groups", plan.Groups, groups),
        ("splits", plan.Splits, groups),
        ("segments", plan.Segments, 2 * groups),
    ):
        kinds[name] = bundle(*[("i32",) * numbers] * len(bundle._fields))
    kinds |= dict.fromkeys(("p_lse", "p_stats", "p_partial"), "*fp32") | {"scale": "fp32"}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    return compile_for(kernel, capability, signature, constants, warps=warps, stages=stages)


def constants_of(kind, dtype, precision, head_dim):
    exact = dtype == torch.float32 and precision == "ieee"
    constants = {
        "G": 2,
        "D": head_dim,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "VEC": 16 // dtype.itemsize,
        "PRECISION": precision,
        "SLICE": 32 if exact else 0,
        "INTERPRET": False,
    }
    if kind == "backward":
        constants |= {"S": 4, "GRAD_VEC": 16 // dtype.itemsize}
        constants |= {"NEED_Q": True, "NEED_K": True, "NEED_V": True}
    return constants


def compile_tuned(kind, capability, dtype, precision, head_dim, tile):
    constants = constants_of(kind, dtype, precision, head_dim)
    constants |= {"BO": tile.owned, "BI": tile.walked}
    kernel = launch.TUNED_KERNELS[kind]
    options = {"warps": tile.warps, "stages": tile.stages}
    return figures(compile_kernel(kernel, capability, dtype, constants, **options))


def compile_cases():
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(c, bf16, "ieee", d) for c in (90, 80, 100) for d in (64, 128)]
    cases += [(90, bf16, "ieee", 256), (90, fp32, "ieee", 64), (90, fp32, "tf32", 64)]
    cases += [(c, fp32, p, 128) for c in (90, 80, 100) for p in ("ieee", "tf32")]
    for capability, dtype, precision, head_dim in cases:
        for kind in ("forward", "backward"):
            device = triton_tuning.Device(capability // 10, 132, SHARED_MEMORY[capability])
            for tile in plan.admitted_tiles(kind, device, dtype, precision, head_dim):
                yield kind, capability, dtype, precision, head_dim, tile


@pytest.fixture(scope="module")
def compilations():
    with compilations_of(compile_tuned, list(compile_cases())) as compiled:
        yield compiled


@compiled_only
@pytest.mark.parametrize(
    "case", list(compile_cases()), ids=lambda c: "-".join(map(str, [*c[:-1], *c[-1]]))
)
def test_compiles_without_spills(case, compilations):
    _, capability, dtype, _, head_dim, *_ = case
    _, spilled, shared, products = compilations(case)
    # Tiles were chosen with 3.9; of them 3.6 spills a few loop invariants in two.
    assert spilled <= (0 if TRITON >= (3, 9) else 64)
    assert shared <= SHARED_MEMORY[capability]
    if dtype == torch.bfloat16:
        assert products
        if capability == 90 and head_dim <= 128:
            assert "wgmma.mma_async" in products
        if capability == 100 and head_dim <= 128:
            assert "tcgen05.mma" in products


@compiled_only
@pytest.mark.parametrize("capability", (80, 90, 100))
def test_small_kernels_compile_without_spills(capability):
    constants = {"D": 256, "BD": 256}
    delta = constants | {"VEC": 8, "GRAD_VEC": 8, "INTERPRET": False, "ROWS": plan.DELTA_ROWS}
    kernel = compile_kernel(shunted_attention_bwd_delta_kernel, capability, torch.bfloat16, delta)
    assert figures(kernel)[1] == 0
    reduce = constants | {"G": 2, "ROWS": plan.REDUCE_ROWS}
    kernel = compile_kernel(shunted_attention_bwd_reduce_kernel, capability, torch.bfloat16, reduce)
    assert figures(kernel)[1] == 0


@on_gpu
def test_cuda_graph_and_side_stream():
    q, keys, values = attention_inputs(2, (2, 2), 300, (300, 40), 64, torch.float16, device="cuda")
    grad_out = torch.randn_like(q)
    expected = results(q, keys, values, grad_out)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = results(q, keys, values, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(q, keys, values, grad_out)
    graph.replay()
    for a, b, c in zip(expected, on_stream, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@on_gpu
def test_more_than_2_to_the_31_elements():
    """Rows of one buffer that lie further apart than 32-bit offsets reach."""
    far = torch.empty(2, 1, 64, 2**25, dtype=torch.bfloat16, device="cuda")[..., :64]
    q, (k,), (v,) = attention_inputs(2, (1,), 64, (64,), 64, torch.bfloat16, device="cuda")
    check_attention("triton", far.copy_(q), [k], [v])


@on_gpu
def test_tf32_follows_torch():
    torch.manual_seed(0)
    q, keys, values = attention_inputs(1, (2,), 256, (256,), 64, torch.float32, device="cuda")
    exact, _ = launch.forward(q, keys, values, 0.125)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded, _ = launch.forward(q, keys, values, 0.125)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-2)
