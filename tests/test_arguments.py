"""What people have works though it is off by rounding; what cannot be right names its argument."""

import pytest
import torch

from vsod_ops import ConvLSTM, ShuntedAttention, conv_lstm, dense_crf, shunted_attention
from vsod_ops.conv_lstm.module import from_fused

Q = torch.zeros(1, 1, 2, 4)
X, W = torch.zeros(1, 1, 1, 2, 2), torch.zeros(4, 1, 1, 1)
PROB, IMAGE = torch.full((1, 4, 4), 0.5), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: shunted_attention(Q, [Q], [Q], scale="1"), TypeError, "scale must be"),
        (lambda: shunted_attention(Q, [Q], [Q], scale=True), TypeError, "scale must be"),
        (lambda: dense_crf(PROB, IMAGE, preset=["dss"]), TypeError, "preset must be a string"),
        (lambda: ShuntedAttention(8, 0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: ShuntedAttention(8, -2), ValueError, "num_heads must be at least 1, got -2"),
        (lambda: ShuntedAttention(8, 2.0), TypeError, "num_heads must be an int, got float"),
        (lambda: ShuntedAttention(0, 2), ValueError, "dim must be at least 1, got 0"),
        (lambda: ShuntedAttention(True, 1), TypeError, "dim must be an int, got bool"),
        (lambda: ShuntedAttention(8, 2)(None), TypeError, "x must be a tensor, got NoneType"),
        (lambda: ConvLSTM(1, 1, 1)(None), TypeError, "x must be a tensor, got NoneType"),
        (lambda: conv_lstm(X, None, W, W, recompute="yes"), TypeError, "recompute must be a bool"),
        (
            lambda: from_fused(torch.zeros(8, 3, 3, 3), torch.zeros(7), 1),
            *(ValueError, r"bias must be \(4M,\) = \(8,\), got shape \(7,\)"),
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("first", (torch.float64, torch.float32))
def test_autocast_leaves_float64_alone_and_a_mixture_names_the_argument(first):
    a, b = (first, torch.float32) if first == torch.float64 else (first, torch.float64)
    state = X[:, 0].to(b), X[:, 0].to(b)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=rf"keys\[0\] is {b} but q is {a}"):
            shunted_attention(Q.to(a), [Q.to(b)], [Q.to(a)])
        with pytest.raises(TypeError, match=f"weight_hh is {b} but x is {a}"):
            conv_lstm(X.to(a), None, W.to(a), W.to(b))
        with pytest.raises(TypeError, match=rf"state\[0\] is {b} but x is {a}"):
            conv_lstm(X.to(a), state, W.to(a), W.to(a))
        double = Q.double()
        assert shunted_attention(double, [double], [double]).dtype == torch.float64
        assert shunted_attention(Q, [Q.half()], [Q]).dtype == torch.bfloat16


@pytest.mark.parametrize("low", (0.0, -1e-7, -9e-4))
@pytest.mark.parametrize("high", (1.0, 1 + 1e-6, 1 + 9e-4))
def test_probabilities_that_are_off_by_rounding_are_clamped(low, high):
    prob = torch.rand(1, 6, 7)
    prob[0, 0, :2] = torch.tensor([low, high])
    image = torch.randint(0, 256, (1, 3, 6, 7), dtype=torch.uint8)
    assert torch.equal(dense_crf(prob, image), dense_crf(prob.clamp(0, 1), image))
    classes = torch.stack([1 - prob, prob], 1)
    expected = dense_crf(classes.clamp(0, 1), image)
    assert torch.equal(dense_crf(classes, image), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_images_that_are_off_by_rounding_are_clamped(dtype):
    image = (torch.rand(1, 3, 6, 7) * 255).to(dtype)
    image[0, 0, 0, :2] = torch.tensor([-0.2, 255.00006])
    prob = torch.rand(1, 6, 7)
    assert torch.equal(dense_crf(prob, image), dense_crf(prob, image.clamp(0, 255)))


@pytest.mark.parametrize(
    ("prob", "image", "message"),
    [
        (1.002, 0, r"prob must lie in 0..1 without NaN, got 0.5 to 1.00199997"),
        (-0.0011, 0, r"prob must lie in 0..1 without NaN, got -0.001[01]"),
        (float("nan"), 0, "prob must lie in"),
        (0.5, 255.3, r"image must lie in 0..255 without NaN, got 0 to 255.300003"),
        (0.5, -0.3, r"image must lie in 0..255 without NaN, got -0.300000"),
        (0.5, float("inf"), "image must lie in"),
    ],
)
def test_values_that_are_off_by_more_are_an_error_with_enough_digits(prob, image, message):
    probs, images = PROB.clone(), torch.zeros(1, 3, 4, 4)
    probs[0, 1, 1], images[0, 0, 1, 1] = prob, image
    with pytest.raises(ValueError, match=message):
        dense_crf(probs, images)
