"""What the tests of the operators share: inputs, the float64 oracle, the error rule."""

import contextlib

import pytest
import torch

from vsod_ops import conv_lstm, shunted_attention

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


def assert_error_bound(name, actual, eager, oracle, dtype):
    """err(actual) <= 2 * (err(eager) + eps * max|oracle|), the largest absolute error counting."""
    actual, eager, oracle = (x.detach().double().cpu() for x in (actual, eager, oracle))
    assert actual.shape == oracle.shape, name
    if oracle.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name} is not finite everywhere"
    error = (actual - oracle).abs().max().item()
    bound = (eager - oracle).abs().max().item()
    bound = 2 * (bound + torch.finfo(dtype).eps * oracle.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3e} above the bound {bound:.3e}"


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


@contextlib.contextmanager
def nan_filled_memory():
    """Inside, torch.empty and its kin give memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def attention_sweep_case(index, dtypes):
    """Random shapes and dtype; the seed is the index of the case."""
    generator = torch.Generator().manual_seed(1000 + index)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

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


# ---- conv_lstm

LSTM_NAMES = ("x", "h", "c", "weight_ih", "weight_hh", "bias", "weight_peephole")


def lstm_inputs(
    batch, steps, channels, hidden, height, width, dtype,
    *, kernel=3, peephole=None, bias=True, state=True, seed=0, layout="contiguous", device="cpu",
):  # fmt: skip
    """name -> tensor or None for LSTM_NAMES, drawn from N(0, 1), weights smaller.

    layout "permuted": channels-last memory; "sliced": every second element of every axis of a
    larger buffer that is NaN elsewhere.  c is in the dtype of the cell state.
    """
    generator = torch.Generator().manual_seed(seed)
    frame = (batch, hidden, height, width)
    fan = ((channels + hidden) * kernel * kernel) ** 0.5
    shapes = {
        "x": (batch, steps, channels, height, width),
        "h": frame if state else None,
        "c": frame if state else None,
        "weight_ih": (4 * hidden, channels, kernel, kernel),
        "weight_hh": (4 * hidden, hidden, kernel, kernel),
        "bias": (4 * hidden,) if bias else None,
        "weight_peephole": {None: None, "channel": (3, hidden), "full": (3, *frame[1:])}[peephole],
    }

    def draw(name, shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x / fan if name in ("weight_ih", "weight_hh") else x
        wide = name == "c" and dtype.itemsize == 2
        x = x.to(torch.float32 if wide else dtype).to(device)
        if layout == "permuted" and x.dim() >= 4:
            x = x.movedim(-3, -1).contiguous().movedim(-1, -3)
        elif layout == "sliced":
            size = [2 * n + 1 for n in shape]
            buffer = torch.full(size, float("nan"), dtype=x.dtype, device=device)
            x = buffer[(slice(1, None, 2),) * x.dim()].copy_(x)
        return x

    return {name: None if shape is None else draw(name, shape) for name, shape in shapes.items()}


def eager_conv_lstm(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation=1):
    """The definition in x's own dtype, as a user would write it: (out, c_T)."""
    zeros = x.new_zeros(x.shape[0], weight_hh.shape[1], *x.shape[3:])
    h, c = zeros if h is None else h, zeros if c is None else c.to(x.dtype)
    weight = torch.cat([weight_ih, weight_hh], 1)
    padding = dilation * (weight.shape[-1] // 2)
    p_i = p_f = p_o = 0
    if weight_peephole is not None:
        full = weight_peephole.dim() == 4
        p_i, p_f, p_o = weight_peephole if full else weight_peephole[:, :, None, None]
    out = []
    for x_t in x.unbind(1):
        sums = torch.nn.functional.conv2d(
            torch.cat([x_t, h], 1), weight, bias, padding=padding, dilation=dilation
        )
        i, f, g, o = sums.chunk(4, 1)
        c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        h = (o + p_o * c).sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out, 1), c


def lstm_results(function, inputs, grad_out, grad_c):
    """name -> tensor: out, c_T and the gradient of each input."""
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    out, c_last = function(**leaves)
    there = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(
        (out, c_last), list(there.values()), (grad_out.to(out.dtype), grad_c.to(c_last.dtype))
    )
    names = [f"d{name}" for name in there]
    return {"out": out.detach(), "c_T": c_last.detach()} | dict(zip(names, grads, strict=True))


def check_conv_lstm(backend, inputs, *, dilation=1, recompute=False, grad_layout="contiguous"):
    """Hold out, c_T and every gradient of `backend` to float64 by the error rule; where sums are
    short enough for it, assert_close's defaults do as well."""
    x, hidden = inputs["x"], inputs["weight_hh"].shape[1]
    dtype = x.dtype
    generator = torch.Generator().manual_seed(7)
    shape = (*x.shape[:2], hidden, *x.shape[3:])
    grad_out = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grad_c = torch.randn((shape[0], *shape[2:]), generator=generator, dtype=torch.float64)
    if grad_layout == "permuted":
        grad_out = grad_out.movedim(2, -1).contiguous().movedim(-1, 2)
    grad_out, grad_c = grad_out.to(x.device), grad_c.to(x.device)

    def ours(x, h, c, **others):
        state = None if h is None else (h, c)
        out, (h_last, c_last) = conv_lstm(
            x, state, *others.values(), dilation=dilation, recompute=recompute, backend=backend
        )
        assert torch.equal(h_last, out[:, -1])
        return out, c_last

    def eager(**tensors):
        return eager_conv_lstm(**tensors, dilation=dilation)

    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    actual = lstm_results(ours, inputs, grad_out, grad_c)
    rival = lstm_results(eager, inputs, grad_out, grad_c)
    oracle = lstm_results(eager, wide, grad_out, grad_c)
    for name, expected in oracle.items():
        if dtype.itemsize >= 4 and torch.allclose(
            actual[name].to(dtype),
            expected.to(dtype),
            *((1e-7, 1e-7) if dtype == torch.float64 else (1.3e-6, 1e-5)),
        ):
            continue
        assert_error_bound(name, actual[name], rival[name], expected, dtype)


def lstm_sweep_case(index, dtypes):
    """Random shapes, options and dtype; the seed is the index of the case."""
    generator = torch.Generator().manual_seed(2000 + index)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    inputs = {
        "batch": pick((1, 2, 3)),
        "steps": pick((1, 2, 4)),
        "channels": pick((1, 2, 3, 4, 5, 9, 17)),
        "hidden": pick((1, 2, 3, 4, 7, 8, 12, 20)),
        "height": pick((1, 2, 3, 7, 16, 17, 33)),
        "width": pick((1, 2, 15, 16, 17, 63, 97, 113, 239)),
        "dtype": pick(dtypes),
        "kernel": pick((1, 3, 3, 3, 5)),
        "peephole": pick((None, "channel", "full")),
        "bias": pick((True, False)),
        "state": pick((True, False)),
        "layout": pick(("contiguous", "permuted", "sliced")),
        "seed": index,
    }
    return inputs, {"dilation": pick((1, 1, 2, 3)), "recompute": pick((True, False))}


# ---- the two systems


def system_results(model, loss, *inputs):
    """name -> tensor on the CPU: logits in evaluation, then each gradient of loss(*outputs)."""
    inputs = [x.to(next(model.parameters())) for x in inputs]
    with torch.no_grad():
        logits = model.eval()(*inputs)
    outputs = model.train()(*inputs)
    loss(*(outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    return {"logits": logits.cpu()} | gradients


def assert_same_system(actual, expected, tolerance):
    """Each result within `tolerance` of its largest number and, for those that are 0 but for
    rounding (of a bias before a batch norm), of a thousandth of the largest of all."""
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():
        off = (actual[name] - x).abs().max().item()
        bound = tolerance * (x.abs().max().item() + 1e-3 * largest)
        assert off <= bound, f"{name}: off by {off:.2e}, above {bound:.2e}"


@contextlib.contextmanager
def exact_float32():
    """Inside, cuDNN does not compute float32 in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def full_disk(size):
    """No file of this process can grow beyond `size` bytes, the one that pytest prints to neither:
    around the call that is tested, and nothing else."""
    resource = pytest.importorskip("resource", reason="no limits on files here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
