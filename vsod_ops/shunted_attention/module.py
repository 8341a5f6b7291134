"""ShuntedAttention: multi-scale self-attention over video tokens, as a layer."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import schemas, transforms
from . import op
from .function import MAX_HEAD_DIM, PLAIN, shunted_attention

Reduction = int | tuple[int, int, int]

FEW_TOKENS = 2048  # up to here a product reduces them faster on a CPU than a 3-D convolution


class SpatialReduction(nn.Conv3d):
    """3-D convolution over (T, H, W) with kernel = stride = r: one key for each r_t x r_h x r_w.

    Input (B, T, H, W, C), output (B, ceil(T / r_t), ceil(H / r_h), ceil(W / r_w), C), with floor
    for ``padding="floor"``.
    """

    def __init__(self, dim: int, reduction: tuple[int, int, int], padding: str):
        super().__init__(dim, dim, kernel_size=reduction, stride=reduction)
        self.pad_to_ceil = padding == "ceil"

    def forward(self, x: Tensor) -> Tensor:
        rt, rh, rw = self.stride
        if self.pad_to_ceil:
            for axis, r in zip((1, 2, 3), self.stride, strict=True):
                if torch.compiler.is_exporting():  # a branch would hold for this size alone
                    whole = torch.arange((x.shape[axis] + r - 1) // r * r, device=x.device)
                    x = x.index_select(axis, whole.clamp(max=x.shape[axis] - 1))
                elif missing := -x.shape[axis] % r:
                    last = x.narrow(axis, x.shape[axis] - 1, 1)
                    x = torch.cat([x] + [last] * missing, axis)
        else:
            x = x[:, : x.shape[1] // rt * rt, : x.shape[2] // rh * rh, : x.shape[3] // rw * rw]
            if x.numel() == 0:
                raise ValueError(
                    f'padding="floor" leaves no keys: reduction {(rt, rh, rw)} is larger than the '
                    'tokens; use padding="ceil"'
                )
        b, t, h, w, c = x.shape
        few = not torch.compiler.is_compiling() and b * t * h * w <= FEW_TOKENS
        if not x.is_cuda and not few:
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)
        # No overlap, so the convolution is one matrix product.
        x = x.reshape(b, t // rt, rt, h // rh, rh, w // rw, rw, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
        if x.is_cuda:
            return F.linear(x.flatten(4), self.weight.movedim(1, -1).flatten(1), self.bias)
        # Few tokens are sooner put into the order of the weights than weights into theirs.
        return F.linear(x.flatten(4, 6).mT.flatten(4), self.weight.flatten(1), self.bias)


class ShuntedAttention(nn.Module):
    """Multi-head self-attention over video tokens, each share of the heads at its own key rate.

    q comes from every token; for each reduction r an equal share of the heads takes its keys and
    values from tokens reduced by r (a 3-D convolution, kernel = stride = r; nothing for r = 1).
    With ``reductions=(1,)`` this is ordinary multi-head attention.  Source: shunted
    self-attention (Ren et al. 2022), over space and time as in MSSA (2023).

    Args:
        dim: channels C of the tokens.
        num_heads: heads in all; a multiple of ``len(reductions)`` that divides dim.
        reductions: for each head group an int, or a triple (time, height, width).
        padding: for sizes that r does not divide: "ceil" repeats the last frame, row or column,
            "floor" drops the rest, as a plain strided convolution does.
        bias: biases in the projections.
        backend: as in :func:`vsod_ops.shunted_attention`.

    Shape:
        x (B, T, H, W, C) -> (B, T, H, W, C).

    Example:
        >>> layer = ShuntedAttention(64, num_heads=4, reductions=(1, 2))
        >>> layer(torch.randn(1, 5, 14, 14, 64)).shape
        torch.Size([1, 5, 14, 14, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reductions: Sequence[Reduction] = (1, 2),
        *,
        padding: str = "ceil",
        bias: bool = True,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        rates = [_triple(r) for r in reductions]
        if not rates:
            raise ValueError("reductions is empty: at least one is needed")
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if num_heads % len(rates):
            raise ValueError(
                f"num_heads {num_heads} is not a multiple of the {len(rates)} reductions"
            )
        if dim // num_heads > MAX_HEAD_DIM:
            raise ValueError(f"dim / num_heads is {dim // num_heads}, above {MAX_HEAD_DIM}")
        if padding not in ("ceil", "floor"):
            raise ValueError(f'padding must be "ceil" or "floor", got {padding!r}')
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        group_dim = dim // len(rates)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.reduce = nn.ModuleList(
            nn.Identity() if r == (1, 1, 1) else SpatialReduction(dim, r, padding) for r in rates
        )
        self.key_value = nn.ModuleList(nn.Linear(dim, 2 * group_dim, bias=bias) for _ in rates)
        self.out = nn.Linear(dim, dim, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What goes into the op: q (B, H, T*H*W, D), and keys and values of each head group."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 5 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, T, H, W, {self.dim}), got shape {tuple(x.shape)}")
        q = self._heads(self.query(x), 1)[0]
        pairs = [
            self._heads(key_value(reduce(x)), 2)
            for reduce, key_value in zip(self.reduce, self.key_value, strict=True)
        ]
        keys, values = map(list, zip(*pairs, strict=True))
        return q, keys, values

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """`count` tensors (B, heads, T*H*W, D), views of x (B, T, H, W, count * heads * D)."""
        b, t, h, w, channels = x.shape
        head_dim = self.dim // self.num_heads
        heads = channels // (count * head_dim)
        return x.reshape(b, t * h * w, count, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def _is_quick(self, x: Tensor) -> bool:
        """Whether the compiled module can run the whole layer on x, if its parts let it."""
        return (
            transforms.is_eager()  # first: torch.compile looks at no more of this
            and not torch.is_grad_enabled()
            and type(self) is ShuntedAttention
            and self.backend in (None, "cpu")
            and type(x) in PLAIN
            and x.is_cpu
            and x.dtype == torch.float32
            and x.dim() == 5
            and x.shape[-1] == self.dim
            and self.dim % 16 == 0
            and 0 < x.numel() <= FEW_TOKENS * self.dim
            and not transforms.is_watched()
            and not torch.nn.modules.module._has_any_global_hook()
            and schemas.has_cpu_kernels()
        )

    def _plain_linears(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Weight and bias of each projection and of each reduction, None where one is not plain."""
        linears = [self.query, *self.key_value, self.out]
        reductions = [m for m in self.reduce if type(m) is not nn.Identity]
        plain = all(type(m) is nn.Linear for m in linears) and all(
            type(m) is SpatialReduction and m.pad_to_ceil for m in reductions
        )
        parts = [*linears, *self.reduce]
        if not plain or any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in parts
        ):
            return None
        projections, convolutions = (
            [p for m in some for p in (m.weight, m.bias)] for some in (linears, reductions)
        )
        plain = all(
            type(p) in PLAIN and p.is_cpu and p.dtype == torch.float32 and p.is_contiguous()
            for p in (*projections, *convolutions)
        )
        return (projections, convolutions) if plain else None

    def _rates(self) -> list[int]:
        return [r for m in self.reduce for r in getattr(m, "stride", (1, 1, 1))]

    def chosen_backends(self, device_type: str, dtype: torch.dtype) -> set[str]:
        """The backends that run this layer's op on tensors of such a device and dtype."""
        return {op.choose(self.backend, device_type, dtype)}

    def forward(self, x: Tensor) -> Tensor:
        if self._is_quick(x) and (linears := self._plain_linears()):
            with torch._C._AutoDispatchBelowAutograd():
                return op.layer(x, *linears, self.num_heads, self._rates())
        q, keys, values = self.project(x)
        out = cast(Tensor, shunted_attention(q, keys, values, backend=self.backend))
        return self.out(out.transpose(1, 2).reshape(x.shape))  # out lies in memory as q does


def _triple(reduction: Reduction) -> tuple[int, int, int]:
    triple = (reduction,) * 3 if isinstance(reduction, int) else tuple(reduction)
    if len(triple) != 3 or not all(isinstance(r, int) and r >= 1 for r in triple):
        raise ValueError(
            f"a reduction is a positive int or a triple (time, height, width), got {reduction!r}"
        )
    return triple
