"""Forward-mode AD and torch.func through the ops: right, or an error, never zeros."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from vsod_ops import conv_lstm, conv_lstm_cell, dense_crf, shunted_attention


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
