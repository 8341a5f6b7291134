"""The layer ShuntedAttention: against torch's own attention, sizes that do not divide, paths."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from vsod_ops import ShuntedAttention
from vsod_ops.shunted_attention.module import SpatialReduction


def test_one_reduction_of_1_is_multi_head_attention():
    layer = ShuntedAttention(24, 3, reductions=(1,)).double()
    torch_layer = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    with torch.no_grad():
        torch_layer.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key_value[0].weight]))
        torch_layer.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key_value[0].bias]))
        torch_layer.out_proj.load_state_dict(layer.out.state_dict())
    x = torch.randn(2, 3, 4, 5, 24, dtype=torch.float64)
    tokens = x.flatten(1, 3)
    expected, _ = torch_layer(tokens, tokens, tokens, need_weights=False)
    torch.testing.assert_close(layer(x), expected.view_as(x))


@pytest.mark.parametrize(
    "size, reduction, padding, keys",
    [
        ((5, 14, 14), 2, "ceil", 147),
        ((5, 14, 14), 2, "floor", 98),
        ((5, 28, 28), 2, "ceil", 588),
        ((1, 7, 7), 2, "ceil", 16),
        ((4, 6, 9), (1, 2, 3), "ceil", 4 * 3 * 3),
        ((4, 7, 10), (1, 2, 3), "floor", 4 * 3 * 3),
    ],
)
def test_key_counts(size, reduction, padding, keys):
    layer = ShuntedAttention(8, 2, (1, reduction), padding=padding)
    x = torch.randn(1, *size, 8)
    q, k, v = layer.project(x)
    assert q.shape == (1, 2, x[0, ..., 0].numel(), 4)
    assert [t.shape[2] for t in k] == [t.shape[2] for t in v] == [q.shape[2], keys]
    assert layer(x).shape == x.shape


def test_ceil_padding_repeats_the_border():
    layer = SpatialReduction(4, (2, 2, 2), "ceil")
    x = torch.randn(2, 3, 5, 4, 4)
    padded = F.pad(x.movedim(-1, 1), (0, 0, 0, 1, 0, 1), mode="replicate")
    expected = F.conv3d(padded, layer.weight, layer.bias, stride=2).movedim(1, -1)
    torch.testing.assert_close(layer(x), expected)


def test_reduction_as_a_product_equals_the_convolution():
    layer = SpatialReduction(4, (2, 1, 3), "ceil").double()
    x = torch.randn(2, 4, 5, 6, 4, dtype=torch.float64)
    blocks = rearrange(x, "b (t rt) h (w rw) c -> b t h w (rt rw c)", rt=2, rw=3)
    weight = rearrange(layer.weight, "o c t 1 w -> o (t w c)")
    torch.testing.assert_close(layer(x), F.linear(blocks, weight, layer.bias))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_backends_agree_and_every_parameter_learns(dtype):
    layer = ShuntedAttention(32, 4, (1, 2)).to(dtype)
    other = copy.deepcopy(layer)
    other.backend = "reference"
    x = torch.randn(2, 5, 7, 7, 32, dtype=dtype)
    for m in (layer, other):
        m(x).float().square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert a.grad.abs().sum() > 0 or name.endswith("bias"), name
        error = (a.grad - b.grad).float().abs().max()
        # The key bias has gradient zero up to rounding (it shifts every score of a row alike).
        assert error <= (1e-4 if dtype == torch.float32 else 5e-2) * b.grad.abs().max() + 1e-3, name


def test_compiles_as_a_whole():
    torch._dynamo.reset()
    layer = ShuntedAttention(16, 2, (1, 2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 5, 5, 16)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(dim=10, num_heads=4), "dim 10 is not a multiple of num_heads 4"),
        (dict(dim=9, num_heads=3), "num_heads 3 is not a multiple of the 2 reductions"),
        (dict(dim=1024, num_heads=2), "above 256"),
        (dict(dim=8, num_heads=2, padding="same"), 'padding must be "ceil" or "floor"'),
        (dict(dim=8, num_heads=2, reductions=(1, 0)), "a reduction is a positive int"),
        (dict(dim=8, num_heads=2, reductions=(1, (2, 2))), "a reduction is a positive int"),
        (dict(dim=8, num_heads=2, reductions=()), "reductions is empty"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShuntedAttention(**arguments)


def test_bad_inputs():
    layer = ShuntedAttention(8, 2, padding="floor")
    with pytest.raises(ValueError, match=r"x must be \(B, T, H, W, 8\)"):
        layer(torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match='padding="floor" leaves no keys'):
        layer(torch.randn(2, 1, 4, 4, 8))
