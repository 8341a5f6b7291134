"""Inputs, the definition and the checks of conv_lstm, for the tests of every backend."""

import torch
from checks import assert_error_bound, picker
from torch.nn import functional as F

from vsod_ops import conv_lstm

NAMES = ("x", "h", "c", "weight_ih", "weight_hh", "bias", "weight_peephole")
GRADIENTS = tuple(f"d{name}" for name in NAMES)


# ---- inputs


def lstm_inputs(
    batch=1, steps=2, channels=3, hidden=4, height=9, width=11, dtype=torch.float64,
    *, kernel=3, peephole=None, bias=True, state=True, seed=0, layout="contiguous", device="cpu",
):  # fmt: skip
    """name -> tensor or None for NAMES, drawn from N(0, 1), weights smaller.

    layout "permuted": channels-last memory; "sliced": every second element of every axis of a
    larger buffer that is NaN elsewhere; "expanded": each step of x is the first one, at stride 0.
    c is in the dtype of the cell state.
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
        elif layout == "expanded" and name == "x":
            x = x[:, :1].expand(x.shape)
        return x

    return {name: None if shape is None else draw(name, shape) for name, shape in shapes.items()}


def lstm_gradients(inputs, layout="contiguous"):
    """(grad_out, grad_c) to go with `inputs`, numbers that x's dtype holds; layouts as theirs."""
    x, hidden = inputs["x"], inputs["weight_hh"].shape[1]
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        y = torch.randn(shape, generator=generator, dtype=torch.float64)
        return y.to(x.dtype).to(x.device)

    grad_out = draw(*x.shape[:2], hidden, *x.shape[3:])
    grad_c = draw(x.shape[0], hidden, *x.shape[3:])
    if layout == "permuted":
        grad_out = grad_out.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "expanded":
        grad_out = grad_out[:, :1].expand(grad_out.shape)
    return grad_out, grad_c.float() if x.dtype.itemsize == 2 else grad_c


def moved(tensors, to):
    """`tensors` (a dict, or a sequence) on another device or in another dtype; None stays."""
    if isinstance(tensors, dict):
        return dict(zip(tensors, moved(tensors.values(), to), strict=True))
    return [None if t is None else t.to(to) for t in tensors]


def lstm_sweep_case(index, dtypes):
    """Random shapes, options and dtype; the seed is the index of the case."""
    pick = picker(2000 + index)
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


# ---- cases of the CUDA kernels, on a GPU and on the CPU

# Around the tiles of 32 x 16, 32 x 32 and 32 x 8 pixels, the chunks of 8 channels, the groups of 4
# hidden channels, of 4 or 8 gathered ones and of 16 gate channels.
CUDA_SHAPES = (
    {"channels": 4, "hidden": 4, "height": 17, "width": 33, "steps": 3},
    {"channels": 1, "hidden": 1, "height": 1, "width": 1, "steps": 1, "batch": 8},
    {"channels": 3, "hidden": 5, "height": 33, "width": 31, "batch": 2},
    {"channels": 9, "hidden": 8, "height": 8, "width": 32},
    {"channels": 2, "hidden": 13, "height": 1, "width": 65, "steps": 3},
    {"channels": 17, "hidden": 3, "height": 40, "width": 2, "batch": 2},
)
CUDA_FORMS = (
    {"peephole": "channel"},
    {"peephole": "full", "layout": "permuted"},
    {"state": False, "bias": False, "layout": "expanded"},
)


def cuda_case(layout="contiguous", **shape):
    """Inputs and gradients; all but x and grad_out contiguous, as the kernels want them."""
    inputs = lstm_inputs(**shape, layout=layout)
    inputs |= {k: t.contiguous() for k, t in inputs.items() if k != "x" and t is not None}
    return inputs, lstm_gradients(inputs, layout)


# ---- the definition, written apart from vsod_ops/conv_lstm/reference.py


def lstm_steps(x, gates, h, c, peephole=(0, 0, 0)):
    """A ConvLSTM with any convolution: gates(x_t, h) gives the sums of i, f, g and o.

    x has its steps along the second axis.  h and out stay in x's dtype, c in its own.  Gives
    (out, c_T).
    """
    p_i, p_f, p_o = peephole
    out = []
    for x_t in x.unbind(1):
        i, f, g, o = gates(x_t, h)
        c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        h = ((o + p_o * c).sigmoid() * c.tanh()).to(x.dtype)
        out.append(h)
    return torch.stack(out, 1), c


def eager_conv_lstm(x, h, c, weight_ih, weight_hh, bias, weight_peephole, dilation=1):
    """The definition in x's own dtype, as a user would write it: (out, c_T)."""
    weight = torch.cat([weight_ih, weight_hh], 1)
    padding = dilation * (weight.shape[-1] // 2)

    def gates(x_t, h):
        read = torch.cat([x_t, h], 1)
        return F.conv2d(read, weight, bias, padding=padding, dilation=dilation).chunk(4, 1)

    zeros = x.new_zeros(x.shape[0], weight_hh.shape[1], *x.shape[3:])
    peephole = (0, 0, 0)
    if weight_peephole is not None:
        full = weight_peephole.dim() == 4
        peephole = weight_peephole if full else weight_peephole[:, :, None, None]
    return lstm_steps(x, gates, zeros if h is None else h, zeros if c is None else c, peephole)


# ---- checks


def lstm_results(function, inputs, grads):
    """name -> tensor: out, c_T and the gradient of each input that is not None, under `grads`."""
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    out, c_last = function(**leaves)
    given = {f"d{name}": x for name, x in leaves.items() if x is not None}
    grad_out, grad_c = grads
    found = torch.autograd.grad(
        (out, c_last), list(given.values()), (grad_out.to(out.dtype), grad_c.to(c_last.dtype))
    )
    return {"out": out.detach(), "c_T": c_last.detach()} | dict(zip(given, found, strict=True))


def through_conv_lstm(backend, *, dilation=1, recompute=False, check_last=True):
    """The public function with a backend, as `lstm_results` takes it."""

    def function(x, h, c, **weights):
        state = None if h is None else (h, c)
        out, (h_last, c_last) = conv_lstm(
            x, state, **weights, dilation=dilation, recompute=recompute, backend=backend
        )
        assert not check_last or torch.equal(h_last, out[:, -1])
        return out, c_last

    return function


def oracle_results(inputs, grads, dilation=1):
    """What `lstm_results` gives for the definition in float64, on the CPU."""

    def definition(**tensors):
        return eager_conv_lstm(**tensors, dilation=dilation)

    inputs, grads = (moved(moved(some, "cpu"), torch.float64) for some in (inputs, grads))
    return lstm_results(definition, inputs, grads)


def assert_like_float64(
    actual, inputs, grads, dilation=1, *, exact=False, narrow_state=False
):  # fmt: skip
    """Hold out, c_T and each gradient in `actual` to float64: by the error rule, or, where sums
    are short enough for it, by assert_close's defaults; `exact` wants those of 32 and 64 bits.
    The rival of the error rule keeps c in float32, or in x's dtype with `narrow_state`."""
    dtype = inputs["x"].dtype
    oracle = oracle_results(inputs, grads, dilation)
    rival = None
    for name, expected in oracle.items():
        value = actual[name].cpu()
        if dtype.itemsize >= 4:
            close = (value.to(dtype), expected.to(dtype))
            if exact:
                message = f"{name}: {{}}".format
                torch.testing.assert_close(*close, msg=message)
                continue
            if torch.allclose(*close, *((1e-7, 1e-7) if dtype.itemsize == 8 else (1.3e-6, 1e-5))):
                continue
        if rival is None:
            rival = lstm_results(
                lambda **tensors: eager_conv_lstm(**tensors, dilation=dilation),
                moved(inputs, dtype) if narrow_state else inputs,
                grads,
            )
        assert_error_bound(name, value, rival[name], expected, dtype)
    for name in actual.keys() - oracle.keys():
        assert actual[name].numel() == 0, name


def check_conv_lstm(backend, inputs, *, dilation=1, recompute=False, grad_layout="contiguous"):
    """Hold out, c_T and every gradient of the public function to float64."""
    grads = lstm_gradients(inputs, grad_layout)
    function = through_conv_lstm(backend, dilation=dilation, recompute=recompute)
    assert_like_float64(lstm_results(function, inputs, grads), inputs, grads, dilation)
