"""Attention problems, what a user could call to solve them, and the check that they are right."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vsod_ops.shunted_attention import reference, shunted_attention

from .measure import BACKWARD, BOTH, FORWARD, dtype_name

Attention = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]  # (q, keys, values) -> out
Triple = tuple[int, int, int]

CHECKED_ROWS = 1024  # queries compared with the float64 reference, spread over the sequence,
CHECKED_SCORES = 2**26  # and the largest number of scores of one group that this may take


# ---- cases


@dataclass(frozen=True)
class Case:
    """One problem: video tokens (B, T, H, W), heads in groups by reduction, dtype, device."""

    shape: tuple[int, int, int, int]
    heads: int
    head_dim: int
    reductions: tuple[Triple, ...]
    dtype: torch.dtype
    device: torch.device
    source: str = "random"  # or the name of a clip and its level

    @property
    def queries(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def group_heads(self) -> int:
        return self.heads // len(self.reductions)

    @property
    def key_counts(self) -> list[int]:
        """N_g of each group, for padding="ceil"."""
        return [
            math.prod(-(-size // r) for size, r in zip(self.shape[1:], reduction, strict=True))
            for reduction in self.reductions
        ]

    @property
    def scores(self) -> list[int]:
        """Elements of the score matrices of each group, B * H_g * N * N_g."""
        return [self.shape[0] * self.group_heads * self.queries * n for n in self.key_counts]

    def flops(self, direction: str) -> float:
        """4 N N_g D a head for the forward, 2.5 times that for the backward."""
        factor = {FORWARD: 1, BACKWARD: 2.5, BOTH: 3.5}[direction]
        return factor * 4 * self.head_dim * sum(self.scores)

    @property
    def label(self) -> str:
        tokens = "x".join(map(str, self.shape[1:] if self.shape[0] == 1 else self.shape))
        heads = f"{self.heads} x {self.head_dim}"
        return f"{tokens} = {self.queries:,}, {heads}, {dtype_name(self.dtype)}"


@dataclass
class Inputs:
    """q (B, H, N, D), keys[g] and values[g] (B, H_g, N_g, D), grad_out like q."""

    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    grad_out: Tensor

    @classmethod
    def random(cls, case: Case, seed: int) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)

        def randn(heads: int, length: int) -> Tensor:
            shape = (case.shape[0], heads, length, case.head_dim)
            return torch.randn(shape, generator=generator).to(case.device, case.dtype)

        q, grad_out = (randn(case.heads, case.queries) for _ in range(2))
        keys, values = ([randn(case.group_heads, n) for n in case.key_counts] for _ in range(2))
        return cls(q, keys, values, grad_out)

    @classmethod
    def of(cls, case: Case, projected: tuple[Tensor, list[Tensor], list[Tensor]]) -> "Inputs":
        def move(x: Tensor) -> Tensor:
            return x.to(case.device, case.dtype)

        q, keys, values = projected
        grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
        return cls(move(q), [move(k) for k in keys], [move(v) for v in values], move(grad_out))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, *self.keys, *self.values]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in [*self.leaves, self.grad_out])

    def copy(self) -> "Inputs":
        """A copy in memory of its own, with the same strides."""

        def clone(x: Tensor) -> Tensor:
            return x.clone(memory_format=torch.preserve_format)

        return Inputs(
            clone(self.q), [clone(k) for k in self.keys], [clone(v) for v in self.values],
            clone(self.grad_out),
        )  # fmt: skip

    def call(self, attention: Attention, direction: str) -> Callable[[], list[Tensor]]:
        """A call that returns [out] (FORWARD) or [out, dq, *dkeys, *dvalues] (BOTH)."""
        groups = len(self.keys)
        if direction == FORWARD:
            q, keys, values = self.q, self.keys, self.values

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [attention(q, keys, values)]

            return forward

        leaves = [x.detach().requires_grad_() for x in self.leaves]
        grad_out = self.grad_out

        def both() -> list[Tensor]:
            out = attention(leaves[0], leaves[1 : groups + 1], leaves[groups + 1 :])
            return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

        return both


# ---- rivals: build(case) prepares what a user would prepare once and returns the call


@dataclass(frozen=True)
class Rival:
    label: str
    build: Callable[[Case], Attention]
    compiled: bool = False  # the first call compiles
    materialises: bool = False  # score matrices are, or may be, in memory
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward_devices: tuple[str, ...] = ("cpu", "cuda")


def _split(q: Tensor, keys: Sequence[Tensor]) -> Sequence[Tensor]:
    return q.split([k.shape[1] for k in keys], dim=1)


def _eager(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return torch.cat(
        [
            (q_g @ k.mT * scale).softmax(-1) @ v
            for q_g, k, v in zip(_split(q, keys), keys, values, strict=True)
        ],
        dim=1,
    )


def _sdpa(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    groups = zip(_split(q, keys), keys, values, strict=True)
    return torch.cat([F.scaled_dot_product_attention(*group) for group in groups], dim=1)


def _sdpa_backend(name: str) -> Callable[[Case], Attention]:
    def build(case: Case) -> Attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, name)

        def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(q, keys, values)

        return attention

    return build


def _pad(groups: Sequence[Tensor]) -> Tensor:
    """Groups (B, H_g, N_g, D) as one (B, H, max N_g, D), zeros where a group is shorter."""
    longest = max(x.shape[2] for x in groups)
    return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in groups], dim=1)


def _head_lengths(case: Case) -> Tensor:
    """N_g of each head, (H,)."""
    return torch.tensor(case.key_counts, device=case.device).repeat_interleave(case.group_heads)


def _padded(case: Case) -> Attention:
    positions = torch.arange(max(case.key_counts), device=case.device)
    mask = (positions < _head_lengths(case)[:, None])[None, :, None]  # (1, H, 1, max N_g)

    def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(q, _pad(keys), _pad(values), attn_mask=mask)

    return attention


def _flex(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    lengths = _head_lengths(case)
    block = 128
    rows = -(-case.queries // block)
    # Key blocks that a head sees whole, then the one that it sees in part, for each row of blocks.
    # (1, H, rows), (1, H, rows, blocks): create_block_mask() would make an N x N mask first.
    blocks = torch.arange(-(-max(case.key_counts) // block), device=case.device, dtype=torch.int32)
    full = (lengths // block).int()[None, :, None].repeat(1, 1, rows)
    partial = (lengths % block > 0).int()[None, :, None].repeat(1, 1, rows)
    full_indices = blocks.repeat(1, case.heads, rows, 1)
    partial_indices = torch.cat([full[..., None], full_indices[..., 1:]], dim=-1)
    mask = BlockMask.from_kv_blocks(
        partial, partial_indices, full, full_indices,
        BLOCK_SIZE=block, mask_mod=lambda b, h, i, j: j < lengths[h],
        seq_lengths=(case.queries, max(case.key_counts)),
    )  # fmt: skip

    def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return flex_attention(q, _pad(keys), _pad(values), block_mask=mask)

    # On the CPU one compilation for all lengths is as fast as one for each and saves minutes.
    return _compile(attention, dynamic=case.device.type == "cpu")


def _varlen(case: Case) -> Attention:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise RuntimeError("this torch has no torch.nn.attention.varlen") from None

    batch, heads = case.shape[0], case.heads
    lengths = F.pad(_head_lengths(case).repeat(batch).cumsum(0), (1, 0)).int()
    starts = torch.arange(batch * heads + 1, device=case.device, dtype=torch.int32) * case.queries

    def pack(groups: list[Tensor]) -> Tensor:
        """Groups (B, H_g, N_g, D) as sequences of one head each, (sum of lengths, 1, D)."""
        parts = [x[b].reshape(-1, 1, case.head_dim) for b in range(batch) for x in groups]
        return torch.cat(parts)

    def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        out = varlen_attn(
            q.reshape(-1, 1, case.head_dim), pack(keys), pack(values),
            starts, lengths, case.queries, max(case.key_counts),
        )  # fmt: skip
        return out.reshape(q.shape)

    return attention


def _compile(attention: Attention, dynamic: bool) -> Attention:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime"
    return torch.compile(attention, dynamic=dynamic, fullgraph=True)


def ours(backend: str | None) -> Rival:
    def build(case: Case) -> Attention:
        return lambda q, keys, values: shunted_attention(q, keys, values, backend=backend)

    return Rival("shunted_attention", build)


OURS = "ours"
RIVALS: dict[str, Rival] = {
    "reference": Rival("reference (eager)", lambda case: _eager, materialises=True),
    "sdpa": Rival("SDPA a group + cat", lambda case: _sdpa),
    "sdpa-flash": Rival("SDPA flash + cat", _sdpa_backend("FLASH_ATTENTION"), devices=("cuda",)),
    "sdpa-efficient": Rival(
        "SDPA efficient + cat", _sdpa_backend("EFFICIENT_ATTENTION"), devices=("cuda",)
    ),
    "sdpa-cudnn": Rival("SDPA cuDNN + cat", _sdpa_backend("CUDNN_ATTENTION"), devices=("cuda",)),
    "sdpa-math": Rival(
        "SDPA math + cat", _sdpa_backend("MATH"), materialises=True, devices=("cuda",)
    ),
    "padded": Rival("SDPA padded + mask", _padded),
    "flex": Rival("FlexAttention", _flex, compiled=True, backward_devices=("cuda",)),
    "varlen": Rival("varlen_attn", _varlen, devices=("cuda",)),
    "compile": Rival(
        "torch.compile(reference)", lambda case: _compile(_eager, dynamic=False),
        compiled=True, materialises=True,
    ),
}  # fmt: skip


# ---- correctness


class Wrong(Exception):
    """A rival whose result is not the reference's."""


class Skipped(Exception):
    """A rival that is not run here, and why."""


@dataclass(frozen=True)
class Oracle:
    """What out and the gradients must be on some rows of q, and how far each may be off."""

    rows: Tensor  # (R,) indices of queries
    inputs: Inputs  # grad_out is zero outside `rows`, so that gradients depend on them alone
    expected: list[Tensor]  # out, dq on `rows`; dkeys, dvalues whole; float64
    tolerances: list[float]  # largest absolute error allowed, one a tensor

    @classmethod
    def of(cls, inputs: Inputs) -> "Oracle":
        """Tolerance: 4 * (error of plain eager in the same dtype + eps * largest value)."""
        queries = inputs.q.shape[2]
        scores_per_row = max(k.numel() // k.shape[3] for k in inputs.keys)
        count = min(queries, CHECKED_ROWS, max(1, CHECKED_SCORES // scores_per_row))
        rows = torch.linspace(0, queries - 1, count, device=inputs.q.device).round().long()
        masked = inputs.copy()
        masked.grad_out = torch.zeros_like(inputs.grad_out)
        masked.grad_out[:, :, rows] = inputs.grad_out[:, :, rows]

        few = Inputs(inputs.q[:, :, rows], inputs.keys, inputs.values, inputs.grad_out[:, :, rows])
        q, grad_out = few.q.double(), few.grad_out.double()
        keys, values = ([x.double() for x in group] for group in (few.keys, few.values))
        scale = q.shape[-1] ** -0.5
        out, lse = reference.forward(q, keys, values, scale)
        dq, dkeys, dvalues = reference.backward(grad_out, q, keys, values, out, lse, scale)
        expected = [out, dq, *dkeys, *dvalues]
        eager = few.call(_eager, BOTH)()
        eps = torch.finfo(inputs.q.dtype).eps
        tolerances = [
            4 * (_largest(x.double() - e) + eps * _largest(e))
            for x, e in zip(eager, expected, strict=True)
        ]
        return cls(rows, masked, expected, tolerances)

    def check(self, results: list[Tensor]) -> None:
        """Raise Wrong unless `results` (of Inputs.call) are right."""
        groups = (len(self.expected) - 2) // 2
        names = ["out", "dq", *(f"d{x}[{g}]" for x in ("keys", "values") for g in range(groups))]
        for i, (name, x) in enumerate(zip(names, results, strict=False)):
            if not x.isfinite().all():
                raise Wrong(f"wrong: {name} has values that are not finite")
            rows = x[:, :, self.rows] if i < 2 else x  # dkeys and dvalues are compared whole
            error = _largest(rows.double() - self.expected[i])
            if error > self.tolerances[i]:
                allowed = self.tolerances[i]
                raise Wrong(f"wrong: {name} is off by {error:.2g}, allowed {allowed:.2g}")


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
