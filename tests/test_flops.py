"""FLOPs that FlopCounterMode counts: those of the benchmarks, none for what nobody asked for."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import vsod_ops.flops  # noqa: F401  registers the formulas
from benchmarks.attention_rivals import Case, Inputs
from benchmarks.conv_lstm import Case as ConvLSTMCase
from benchmarks.measure import BACKWARD, FORWARD
from vsod_ops import conv_lstm, shunted_attention

CPU = torch.device("cpu")


def counted(call, *arguments):
    with FlopCounterMode(display=False) as counter:
        result = call(*arguments)
    return counter.get_total_flops(), result


def backward_of(out, leaves):
    return counted(lambda: torch.autograd.grad(out.sum(), leaves, retain_graph=True))[0]


def test_attention():
    case = Case((2, 2, 3, 4), 4, 8, ((1, 1, 1), (2, 2, 2)), torch.float32, CPU)
    inputs = Inputs.random(case, 0)
    leaves = [x.requires_grad_() for x in inputs.leaves]
    forward, out = counted(shunted_attention, inputs.q, inputs.keys, inputs.values)
    assert forward == case.flops(FORWARD)
    assert backward_of(out, leaves) == case.flops(BACKWARD)
    for x in leaves[1:]:
        x.requires_grad_(False)
    out = shunted_attention(inputs.q, inputs.keys, inputs.values)
    assert backward_of(out, inputs.q) == case.flops(BACKWARD) * 3 / 5


def test_conv_lstm():
    case = ConvLSTMCase((2, 3, 4, 5, 6, 7), torch.float32, CPU)
    x, *weights = case.inputs(0)
    forward, (out, _) = counted(lambda: conv_lstm(x, None, *weights))
    assert forward == case.flops(FORWARD)
    assert backward_of(out, [x, *weights]) == case.flops(BACKWARD)
    out, _ = conv_lstm(x, None, *(weight.detach() for weight in weights))
    assert backward_of(out, x) == forward
