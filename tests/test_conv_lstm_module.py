"""ConvLSTM and the converters, against small plain implementations of what they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks_conv_lstm import lstm_steps
from torch import nn

from vsod_ops import ConvLSTM, conv_lstm
from vsod_ops.conv_lstm.module import from_fused, from_keras, from_separate, load_layer


def plain_fused(x, weight, bias):
    """One convolution over cat(x, h), gate order i, f, o, g, as most implementations have it."""
    hidden = weight.shape[0] // 4

    def gates(x_t, h):
        combined = F.conv2d(torch.cat([x_t, h], 1), weight, bias, padding=weight.shape[-1] // 2)
        i, f, o, g = combined.split(hidden, 1)
        return i, f, g, o

    zeros = x.new_zeros(x.shape[0], hidden, *x.shape[3:])
    return lstm_steps(x, gates, zeros, zeros)


def plain_separate(x, from_x, from_h, biases, peepholes):
    """Eight convolutions and peepholes that broadcast over (B, M, H, W)."""

    def gates(x_t, h):
        return [
            F.conv2d(x_t, from_x[gate], biases[gate], padding="same")
            + F.conv2d(h, from_h[gate], padding="same")
            for gate in "ifgo"
        ]

    zeros = x.new_zeros(x.shape[0], from_h["i"].shape[0], *x.shape[3:])
    return lstm_steps(x, gates, zeros, zeros, [peepholes[gate] for gate in "ifo"])


def plain_keras(x, kernel, recurrent, bias):
    """Channels last: x (B, T, H, W, C), kernel (k, k, C, 4M), gates i, f, c, o."""

    def convolution(y, weight):
        y = F.conv2d(y.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding="same")
        return y.permute(0, 2, 3, 1)

    def gates(x_t, h):
        return (convolution(x_t, kernel) + bias + convolution(h, recurrent)).chunk(4, -1)

    zeros = x.new_zeros(x.shape[0], *x.shape[2:4], recurrent.shape[2])
    return lstm_steps(x, gates, zeros, zeros)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64) / 3


def test_from_fused():
    weight, bias, x = draw(12, 5, 3, 3), draw(12), draw(2, 4, 2, 6, 7)
    lstm = ConvLSTM(2, 3, 3).double()
    load_layer(lstm, from_fused(weight, bias, input_channels=2))
    out, (h, c) = lstm(x)
    expected, expected_c = plain_fused(x, weight, bias)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(h[0], expected[:, -1])
    torch.testing.assert_close(c[0], expected_c)
    lstm = ConvLSTM(2, 3, 3, bias=False).double()
    load_layer(lstm, from_fused(weight, None, input_channels=2))
    torch.testing.assert_close(lstm(x)[0], plain_fused(x, weight, None)[0])


@pytest.mark.parametrize("form", ("channel", "broadcast", "full", "full with a batch axis"))
def test_from_separate(form):
    shape = {"channel": (3,), "broadcast": (1, 3, 1, 1), "full": (3, 6, 7)}.get(form, (1, 3, 6, 7))
    from_x = {gate: draw(3, 2, 5, 5) for gate in "ifgo"}
    from_h = {gate: draw(3, 3, 5, 5) for gate in "ifgo"}
    biases = {gate: draw(3) for gate in "ifgo"}
    peepholes = {gate: draw(*shape) for gate in "ifo"}
    full = form.startswith("full")
    lstm = ConvLSTM(
        2, 3, 5, peephole="full" if full else "channel", size=(6, 7) if full else None
    ).double()
    load_layer(lstm, from_separate(from_x, from_h, biases, peepholes))
    x = draw(2, 3, 2, 6, 7)
    as_planes = {k: p[:, None, None] if p.dim() == 1 else p for k, p in peepholes.items()}
    expected, expected_c = plain_separate(x, from_x, from_h, biases, as_planes)
    out, (_, c) = lstm(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(c[0], expected_c)


def test_from_keras():
    weights = [draw(3, 3, 2, 12), draw(3, 3, 3, 12), draw(12)]
    lstm = ConvLSTM(2, 3, 3).double()
    load_layer(lstm, from_keras([w.numpy() for w in weights[:2]] + weights[2:]))
    x = draw(2, 3, 6, 7, 2)
    expected, expected_c = plain_keras(x, *weights)
    out, (_, c) = lstm(x.movedim(-1, 2))
    torch.testing.assert_close(out.movedim(2, -1), expected)
    torch.testing.assert_close(c[0].movedim(1, -1), expected_c)


def test_initial_values():
    lstm = ConvLSTM(2, 3, 3, peephole="channel")
    assert torch.equal(lstm.bias_l0, torch.tensor([0.0] * 3 + [1.0] * 3 + [0.0] * 6))
    bound = (3 * 9) ** -0.5
    for weight in (lstm.weight_ih_l0, lstm.weight_hh_l0):
        assert 0.8 * bound < weight.abs().max() <= bound
    assert not lstm.weight_peephole_l0.any()
    names = {name for name, _ in lstm.named_parameters()}
    assert names == {"weight_ih_l0", "weight_hh_l0", "bias_l0", "weight_peephole_l0"}


@pytest.mark.parametrize("peephole, size", [(None, None), ("channel", None), ("full", (5, 6))])
def test_every_parameter_learns(peephole, size):
    lstm = ConvLSTM(2, 3, 3, 2, peephole, bidirectional=True, size=size)
    out, (h, c) = lstm(torch.randn(2, 3, 2, 5, 6))
    assert out.shape == (2, 3, 6, 5, 6) and h.shape == c.shape == (4, 2, 3, 5, 6)
    out.square().sum().backward()
    for name, parameter in lstm.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_layers_and_directions_are_calls_of_the_op():
    lstm = ConvLSTM(2, 3, 3, num_layers=2, bidirectional=True, dilation=2).double()
    x, h, c = draw(2, 4, 2, 7, 8), draw(4, 2, 3, 7, 8), draw(4, 2, 3, 7, 8)
    out, (h_last, c_last) = lstm(x, (h, c))
    below = x
    for layer in range(2):
        outs = []
        for direction, suffix in enumerate((f"_l{layer}", f"_l{layer}_reverse")):
            i = 2 * layer + direction
            flip = (lambda t: t.flip(1)) if direction else (lambda t: t)
            one, (h_i, c_i) = conv_lstm(
                flip(below), (h[i], c[i]), getattr(lstm, "weight_ih" + suffix),
                getattr(lstm, "weight_hh" + suffix), getattr(lstm, "bias" + suffix), dilation=2,
            )  # fmt: skip
            torch.testing.assert_close(h_last[i], h_i)
            torch.testing.assert_close(c_last[i], c_i)
            outs.append(flip(one))
        below = torch.cat(outs, 2)
    torch.testing.assert_close(out, below)


def test_batch_first_false_is_time_first():
    lstm = ConvLSTM(2, 3, 3)
    other = ConvLSTM(2, 3, 3, batch_first=False)
    other.load_state_dict(lstm.state_dict())
    x = torch.randn(2, 5, 2, 6, 7)
    out, state = lstm(x)
    time_first, other_state = other(x.transpose(0, 1))
    assert time_first.shape == (5, 2, 3, 6, 7)
    assert torch.equal(time_first.transpose(0, 1), out)
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_chunks_with_the_state_carried_equal_the_whole(dtype):
    lstm = ConvLSTM(2, 3, 3, num_layers=2, peephole="channel").to(dtype)
    x = torch.randn(2, 5, 2, 6, 7).to(dtype)
    out, state = lstm(x)
    first, carried = lstm(x[:, :3])
    second, carried = lstm(x[:, 3:], carried)
    assert torch.equal(torch.cat([first, second], 1), out)
    assert all(torch.equal(a, b) for a, b in zip(state, carried, strict=True))


def test_any_size_at_run_time_and_in_one_graph():
    torch._dynamo.reset()
    lstm = ConvLSTM(2, 3, 3, num_layers=2, bidirectional=True)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    for size in ((5, 6), (9, 4)):
        x = torch.randn(1, 3, 2, *size)
        torch.testing.assert_close(compiled(x), lstm(x))


def test_converges_like_the_reference():
    torch.manual_seed(3)
    x, target = torch.rand(2, 4, 1, 8, 9), torch.rand(2, 8, 9)
    losses = []
    lstm = ConvLSTM(1, 4, 3, peephole="channel")
    first = nn.ModuleDict({"lstm": lstm, "head": nn.Conv2d(4, 1, 1)})
    second = copy.deepcopy(first)
    second["lstm"].backend = "reference"
    for model in (first, second):
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(20):
            _, (h, _) = model["lstm"](x)
            loss = F.mse_loss(model["head"](h[-1])[:, 0], target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(hidden_channels=0), "hidden_channels must be a positive int"),
        (dict(num_layers=0), "num_layers must be a positive int"),
        (dict(peephole="all"), "peephole must be one of"),
        (dict(peephole="full"), r"size=\(H, W\) goes with"),
        (dict(size=(4, 4)), r"size=\(H, W\) goes with"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvLSTM(**(dict(input_channels=2, hidden_channels=3, kernel_size=3) | arguments))


def test_bad_inputs():
    lstm = ConvLSTM(2, 3, 3, peephole="full", size=(5, 6))
    with pytest.raises(ValueError, match="with C = 2"):
        lstm(torch.zeros(1, 2, 3, 5, 6))
    with pytest.raises(ValueError, match=r"x is \(5, 7\) but the peepholes are \(5, 6\)"):
        lstm(torch.zeros(1, 2, 2, 5, 7))
    with pytest.raises(ValueError, match=r"state h must be \(1, 1, 3, 5, 6\)"):
        lstm(torch.zeros(1, 2, 2, 5, 6), (torch.zeros(1, 3, 5, 6), torch.zeros(1, 3, 5, 6)))
    with pytest.raises(ValueError, match="only one of the ConvLSTM and the parameters"):
        load_layer(lstm, from_fused(draw(12, 5, 3, 3), None, 2))
    with pytest.raises(ValueError, match="has no layer 1"):
        load_layer(lstm, {}, layer=1)
    with pytest.raises(ValueError, match="order of the letters"):
        from_fused(draw(12, 5, 3, 3), None, 2, order="ifgx")
