"""Inputs, definition and checks of shunted_attention, for the tests of every backend."""

import torch
from checks import assert_error_bound, picker

from vsod_ops import shunted_attention

ATTENTION_LAYOUTS = ("contiguous", "permuted", "sliced")


def attention_inputs(
    batch,
    group_heads,
    queries,
    lengths,
    head_dim,
    dtype,
    *,
    device="cpu",
    seed=0,
    layout="contiguous",
    requires_grad=False,
):
    """q (B, H, N, D), keys and values (B, H_g, N_g, D), drawn from N(0, 1).

    layout "permuted": (B, N, H, D) memory, as projections give it; "sliced": every second element
    of every axis of a larger buffer that is NaN elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, rows):
        shape = (batch, heads, rows, head_dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        if layout == "permuted":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "sliced":
            buffer = torch.full(
                [2 * n + 1 for n in shape], float("nan"), dtype=dtype, device=device
            )
            view = buffer[1::2, 1::2, 1::2, 1::2]
            x = view.copy_(x)
        return x.detach().requires_grad_(requires_grad)

    q = draw(sum(group_heads), queries)
    keys = [draw(h, n) for h, n in zip(group_heads, lengths, strict=True)]
    values = [draw(h, n) for h, n in zip(group_heads, lengths, strict=True)]
    return q, keys, values


def eager_attention(q, keys, values, scale):
    """The definition in q's own dtype, as a user would write it: (out, lse)."""
    outs, lses, first = [], [], 0
    for k, v in zip(keys, values, strict=True):
        scores = (q[:, first : first + k.shape[1]] @ k.mT) * scale
        outs.append(scores.softmax(-1) @ v)
        lses.append(scores.logsumexp(-1))
        first += k.shape[1]
    return torch.cat(outs, 1), torch.cat(lses, 1)


def attention_results(function, q, keys, values, grad_out):
    """name -> tensor: out, lse and the gradients of (q, keys, values) under grad_out."""
    leaves = [x.detach().requires_grad_() for x in (q, *keys, *values)]
    groups = len(keys)
    out, lse = function(leaves[0], leaves[1 : groups + 1], leaves[groups + 1 :])
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
    names = ["dq", *(f"dk[{g}]" for g in range(groups)), *(f"dv[{g}]" for g in range(groups))]
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(names, grads, strict=True))


def check_attention(backend, q, keys, values, *, scale=None, grad_layout="contiguous"):
    """Hold out, lse and every gradient of `backend` to float64: float32 and float64 on the CPU by
    assert_close's defaults, the rest by the error rule."""
    dtype = q.dtype
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grad_out = grad_out.to(dtype).to(q.device)
    if grad_layout == "permuted":
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)

    def ours(q, keys, values):
        return shunted_attention(q, keys, values, scale=scale, return_lse=True, backend=backend)

    def double(x):
        return [t.double() for t in x] if isinstance(x, list) else x.double()

    actual = attention_results(ours, q, keys, values, grad_out)
    eager = attention_results(lambda *x: eager_attention(*x, factor), q, keys, values, grad_out)
    oracle = attention_results(
        lambda *x: eager_attention(*x, factor), double(q), double(keys), double(values), grad_out
    )
    for name, expected in oracle.items():
        if q.device.type == "cpu" and dtype in (torch.float32, torch.float64):
            as_dtype = torch.float32 if name == "lse" else dtype
            torch.testing.assert_close(
                actual[name].to(as_dtype),
                expected.to(as_dtype),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        else:
            assert_error_bound(name, actual[name], eager[name], expected, dtype)


def attention_sweep_case(index, dtypes):
    """Random shapes and dtype; the seed is the index of the case."""
    pick = picker(1000 + index)
    groups = pick((1, 2, 2, 3))
    return {
        "batch": pick((1, 1, 2, 3)),
        "group_heads": [pick((1, 2, 3)) for _ in range(groups)],
        "queries": pick((1, 2, 13, 14, 15, 17, 63, 112, 113, 239)),
        "lengths": [pick((1, 2, 31, 33, 63, 113, 147, 224, 225, 257, 513)) for _ in range(groups)],
        "head_dim": pick((1, 7, 8, 16, 24, 32, 40, 64, 96, 128, 160, 256)),
        "dtype": pick(dtypes),
        "layout": pick(ATTENTION_LAYOUTS),
        "seed": index,
    }
