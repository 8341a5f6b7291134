"""Forward-mode AD and torch.func through the ops: right, or an error, never zeros."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from vsod_ops import conv_lstm, conv_lstm_cell, dense_crf, shunted_attention

RAW = torch.ops.vsod_ops


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).double()


K, V = draw(1, 1, 5, 4), draw(1, 1, 5, 4)
W_IH, W_HH, PEEPHOLE = draw(8, 1, 1, 1), draw(8, 2, 1, 1), draw(3, 2)
X, STATE = draw(1, 2, 1, 2, 3), (draw(1, 2, 2, 3), draw(1, 2, 2, 3))

# name -> (function of one tensor, that tensor)
CALLS = {
    "q": (lambda q: shunted_attention(q, [K, K[:, :, :2]], [V, V[:, :, :2]]), draw(1, 2, 3, 4)),
    "key": (lambda k: shunted_attention(V, [k], [V]), K),
    "value": (lambda v: shunted_attention(K, [K], [v], scale=-0.3), V),
    "x": (lambda x: conv_lstm(x, STATE, W_IH, W_HH, None, PEEPHOLE)[0], X),
    "c": (lambda c: conv_lstm(X, (STATE[0], c), W_IH, W_HH)[1][1], STATE[1]),
    "weight": (lambda w: conv_lstm(X, None, W_IH, w)[0], W_HH),
    "cell": (lambda x: conv_lstm_cell(x, STATE, W_IH, W_HH)[0], draw(1, 1, 2, 3)),
}


def jacobian(function, x):
    """By backward alone, one output after the other."""
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in out.flatten()]
    return torch.stack(rows).view(*out.shape, *x.shape)


@pytest.mark.parametrize("name", CALLS)
def test_transforms_agree_with_the_backward(name):
    function, x = CALLS[name]
    expected = jacobian(function, x)
    assert expected.abs().max() > 1e-3
    tangent = torch.randn_like(x)
    along = torch.tensordot(expected, tangent, x.dim())
    torch.testing.assert_close(jvp(function, (x,), (tangent,))[1], along)
    torch.testing.assert_close(jacfwd(function)(x), expected)
    torch.testing.assert_close(jacrev(function)(x), expected)
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, along)
    several = torch.stack([x, -2 * x, 0 * x])
    torch.testing.assert_close(vmap(function)(several), torch.stack(list(map(function, several))))

    def loss(x):
        return function(x).square().sum()

    by_sample = torch.stack([grad(loss)(one) for one in several])
    torch.testing.assert_close(vmap(grad(loss))(several), by_sample)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("name", CALLS)
def test_without_a_tangent_nothing_changes(name):
    function, x = CALLS[name]
    with forward_ad.dual_level():
        inside = function(x)
    assert torch.equal(inside, function(x))


def test_a_named_backend_is_not_replaced():
    q = draw(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="'cpu' has no rule for forward-mode AD"):
        jvp(lambda q: shunted_attention(q, [q], [q], backend="cpu"), (q,), (q,))
    x = draw(1, 1, 1, 2, 2)
    with pytest.raises(NotImplementedError, match="'cpu' has no rule for forward-mode AD"):
        vmap(lambda x: conv_lstm(x, None, W_IH, W_HH, backend="cpu")[0])(x[None])


def test_dense_crf_has_no_gradient_in_any_mode():
    prob = torch.rand(1, 3, 3)

    def crf(prob):
        return dense_crf(prob, torch.zeros(1, 3, 3, 3, dtype=torch.uint8))

    with pytest.raises(NotImplementedError, match="no gradient"):
        jvp(crf, (prob,), (prob,))
    with pytest.raises(NotImplementedError, match="no gradient"):
        grad(lambda prob: crf(prob).sum())(prob)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no gradient"):
        crf(forward_ad.make_dual(prob, prob))


NONE = None, None
OUT, LSE = RAW.shunted_attention(K, [K], [V], 0.3, None)
KEPT = RAW.conv_lstm(X, *NONE, W_IH, W_HH, *NONE, 1, 2, None)
NUMBERS = 1, 3.0, 3.0, 60.0, 5.0, 5.0
RAW_CALLS = {
    "shunted_attention": lambda k: RAW.shunted_attention(K, [k], [V], 0.3, None),
    "shunted_attention_cpu": lambda k: RAW.shunted_attention_cpu(K, [k], [V], 0.3),
    "shunted_attention_backward": lambda k: RAW.shunted_attention_backward(
        *(OUT, K, [k], [V], OUT, LSE, 0.3, True, [True], [True], None)
    ),
    "conv_lstm": lambda w: RAW.conv_lstm(X, *NONE, W_IH, w, *NONE, 1, 0, None),
    "conv_lstm_cpu": lambda w: RAW.conv_lstm_cpu(X, *NONE, W_IH, w, *NONE, 1, 0),
    "conv_lstm_backward": lambda w: RAW.conv_lstm_backward(
        *(KEPT[0], None, X, *NONE, W_IH, w, *NONE, *KEPT, 1, [True] * 7, None)
    ),
    "dense_crf": lambda prob: RAW.dense_crf(prob, torch.zeros(1, 3, 2, 2), *NUMBERS, None),
    "dense_crf_cpu": lambda prob: RAW.dense_crf_cpu(prob, torch.zeros(1, 3, 2, 2), *NUMBERS, 0),
}


@pytest.mark.parametrize("name", RAW_CALLS)
def test_a_raw_op_does_not_drop_a_tangent(name):
    primal = W_HH if "lstm" in name else torch.rand(1, 2, 2) if "crf" in name else K
    message = f"vsod_ops::{name} has no rule for forward-mode AD"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        RAW_CALLS[name](forward_ad.make_dual(primal, primal))
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda x: RAW_CALLS[name](x)[0], (primal,), (primal,))


def test_vmap_over_attention_is_a_larger_batch():
    """The kernels run: a backend can be named, and no scores are in memory."""

    def attend(q, key, value, backend="cpu"):
        out, lse = shunted_attention(
            q, [key, K], [value, V], scale=0.3, return_lse=True, backend=backend
        )
        return out, lse

    q, key, value = draw(3, 1, 2, 4, 4), draw(1, 1, 6, 3, 4), draw(1, 1, 6, 4)
    expected = [attend(q[i], key.select(3, i), value, "reference") for i in range(3)]
    out, lse = vmap(attend, in_dims=(0, 3, None))(q, key, value)
    torch.testing.assert_close(out, torch.stack([out for out, _ in expected]))
    torch.testing.assert_close(lse, torch.stack([lse for _, lse in expected]))
    twice = vmap(vmap(attend, in_dims=(0, 3, None)), in_dims=(None, None, 0))
    several = torch.stack([value, -value])
    torch.testing.assert_close(twice(q, key, several)[0][0], out)
    torch.testing.assert_close(twice(q, key, several)[1], lse.expand(2, *lse.shape))

    leaf = key.clone().requires_grad_()
    mapped, _ = vmap(attend, in_dims=(0, 3, None))(q, leaf, value)
    one_by_one = [attend(q[i], leaf.select(3, i), value)[0].square().sum() for i in range(3)]
    torch.testing.assert_close(
        *torch.autograd.grad(mapped.square().sum(), leaf),
        *torch.autograd.grad(sum(one_by_one), leaf),
    )


def test_batched_gradients_of_attention():
    k = K.clone().requires_grad_()
    v = V.clone().requires_grad_()
    out = shunted_attention(K, [k], [v], backend="cpu")
    grads = draw(3, *out.shape)
    batched = vmap(lambda g: torch.autograd.grad(out, (k, v), g, retain_graph=True))(grads)
    for i in range(3):
        one = torch.autograd.grad(out, (k, v), grads[i], retain_graph=True)
        torch.testing.assert_close([b[i] for b in batched], list(one))
