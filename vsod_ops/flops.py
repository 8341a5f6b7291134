"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: import this module before it.

Products of matrices and convolutions, forward and backward, and nothing for gradients that nobody
asked for.  A module of its own because torch's counter imports triton.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import conv_lstm, shunted_attention  # noqa: F401  define the ops

# Formulas get shapes in the place of tensors, and the other arguments as they are.


def _product(q, k):
    """The scores of a group: 2 N N_g D a head."""
    return 2 * q[0] * k[1] * q[2] * k[2] * q[3]


@register_flop_formula(torch.ops.vsod_ops.shunted_attention)
def _attention(q, keys, *_, **__):
    return 2 * sum(_product(q, k) for k in keys)


@register_flop_formula(torch.ops.vsod_ops.shunted_attention_backward)
def _attention_backward(
    grad_out, q, keys, values, out, lse, scale, need_q, need_keys, need_values, *_, **__
):
    total = 0
    for k, need_key, need_value in zip(keys, need_keys, need_values, strict=True):
        probabilities = need_q or need_key or need_value
        their_gradients = need_q or need_key
        products = probabilities + their_gradients + need_q + need_key + need_value
        total += products * _product(q, k)
    return total


def _convolutions(x, weight_ih, weight_hh):
    """Those of x and of h over all steps, the zero state included."""
    batch, steps, _, height, width = x
    pixels = 2 * batch * steps * height * width
    return pixels * math.prod(weight_ih), pixels * math.prod(weight_hh)


@register_flop_formula(torch.ops.vsod_ops.conv_lstm)
def _conv_lstm(x, h, c, weight_ih, weight_hh, *_, **__):
    return sum(_convolutions(x, weight_ih, weight_hh))


@register_flop_formula(torch.ops.vsod_ops.conv_lstm_backward)
def _conv_lstm_backward(
    grad_out, grad_c, x, h, c, weight_ih, weight_hh, bias, weight_peephole,
    out, c_last, cells, gates, dilation, needs, *_, **__,
):  # fmt: skip
    of_x, of_h = _convolutions(x, weight_ih, weight_hh)
    # The gradient of h runs from step to step whatever is asked for.
    return (needs[0] + needs[3]) * of_x + (any(needs) + needs[4]) * of_h
