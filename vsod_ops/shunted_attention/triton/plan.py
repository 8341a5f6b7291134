"""What a launch is made of: order of the groups, splits of the query loop, tile sizes.

Groups cost differently, so the launch order is longest work first: a program's number is mapped to
its group by a few compares on tuples of arguments, and the hardware hands out numbers in order.
A group with few keys has few dK/dV programs, each with the full query loop; where that leaves
multiprocessors idle the loop is split, and partial sums go to a float32 workspace (at most N / N_g
times the size of dK and dV).

Tile sizes are timed once per shape class, batch left out; `makespan` then carries the timings over
to other batches and lengths, since 62 tiles on 132 multiprocessors want another tile size than 620.
"""

import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ...triton_tuning import Device

# Groups that one launch takes; further ones go into further launches.
MAX_GROUPS = 8
# Query loops are split at multiples of this; every walked block divides it.
SPLIT_ROWS = 128
# Rows that a program of the two small kernels handles.
DELTA_ROWS = 16
REDUCE_ROWS = 8

# Which gradients are wanted: of q, of each group's keys, of each group's values.
Needs = tuple[bool, tuple[bool, ...], tuple[bool, ...]]


# triton's own two cost a microsecond a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


class Work(NamedTuple):
    """Programs of one kind and group: ceil(rows / tile) * repeats of cost tile * columns."""

    rows: int
    repeats: int
    columns: int


class Groups(NamedTuple):
    """What the kernels are told about the groups, most keys first."""

    lengths: tuple[int, ...]  # N_g
    heads: tuple[int, ...]  # H_g
    first_heads: tuple[int, ...]  # the group's first head in q
    first_pairs: tuple[int, ...]  # how many (b, h) pairs come before the group's


class Launch(NamedTuple):
    """The groups of one launch.

    Tuples are padded to 2, 4 or 8 groups, so that few variants are compiled; no program number
    falls into the padding.
    """

    order: tuple[int, ...]  # group in the caller's order
    real: int  # groups that are not padding
    groups: Groups
    work: tuple[Work, ...]


class Splits(NamedTuple):
    """What the backward kernels are told about each group beyond Groups."""

    need_keys: tuple[int, ...]  # 1 if dkeys[g] is wanted
    need_values: tuple[int, ...]
    parts: tuple[int, ...]  # of the query loop
    rows: tuple[int, ...]  # queries of a part, a multiple of SPLIT_ROWS unless there is one part
    offsets: tuple[int, ...]  # where the group's workspace (part, dK | dV, b, h, n, D) begins
    sizes: tuple[int, ...]  # B * H_g * N_g * D
    first_reduce: tuple[int, ...]  # the group's first program of the reduce kernel


class Segments(NamedTuple):
    """Programs of the backward kernel, 2 G segments of one kind and group, most work first."""

    kinds: tuple[int, ...]  # 1 for dK and dV, 0 for dQ
    groups: tuple[int, ...]
    rows: tuple[int, ...]  # N_g or N, cut into tiles
    repeats: tuple[int, ...]  # pairs * parts, programs a tile


class Backward(NamedTuple):
    """A backward launch, and the one that adds up its partial sums."""

    splits: Splits
    segments: Segments
    workspace: int  # float32 elements
    reduce_programs: int
    work: tuple[Work, ...]


@functools.lru_cache(maxsize=4096)
def launches(
    batch: int, queries: int, lengths: tuple[int, ...], heads: tuple[int, ...]
) -> tuple[Launch, ...]:
    """The groups of each launch; one launch as long as there are at most MAX_GROUPS."""
    order = sorted(range(len(lengths)), key=lambda g: -lengths[g])
    parts = []
    for start in range(0, len(order), MAX_GROUPS):
        index = order[start : start + MAX_GROUPS]
        real = len(index)
        pairs = [batch * heads[g] for g in index]
        padding = max(2, power_of_2(real)) - real
        index += [index[-1]] * padding
        pairs += [0] * padding
        groups = Groups(
            lengths=tuple(lengths[g] for g in index),
            heads=tuple(heads[g] for g in index),
            first_heads=tuple(sum(heads[:g]) for g in index),
            first_pairs=tuple(sum(pairs[:i]) for i in range(len(index))),
        )
        work = tuple(Work(queries, pairs[i], lengths[index[i]]) for i in range(real))
        parts.append(Launch(tuple(index), real, groups, work))
    return tuple(parts)


def programs(work: Iterable[Work], tile: int) -> int:
    return sum(cdiv(rows, tile) * repeats for rows, repeats, _ in work)


def makespan(work: Iterable[Work], tile: int, workers: int) -> float:
    """Time until `workers` are through, each taking the next program as soon as it is free."""
    ends = [0.0] * workers
    for rows, repeats, columns in work:
        rounds, rest = divmod(cdiv(rows, tile) * repeats, workers)
        if rounds:
            ends = [end + rounds * tile * columns for end in ends]
        for _ in range(rest):
            heapq.heapreplace(ends, ends[0] + tile * columns)
    return max(ends)


def _segments(
    launch: Launch, queries: int, needs: Needs, split_rows: Sequence[int]
) -> list[tuple[int, int, Work]]:
    """(kind, group, work) of the backward launch, longest program first; kind 1 is dK and dV."""
    need_q, need_keys, need_values = needs
    # Products a block: S, dV and dP, dK; dK alone still needs S.
    products = 2 * any(need_values) + (2 if any(need_values) else 3) * any(need_keys)
    segments = []
    for g in range(launch.real):
        pairs, length = launch.work[g].repeats, launch.groups.lengths[g]
        if need_keys[g] or need_values[g]:
            parts = cdiv(queries, split_rows[g])
            segments.append((1, g, Work(length, pairs * parts, products * split_rows[g])))
        if need_q:
            segments.append((0, g, Work(queries, pairs, 3 * length)))
    return sorted(segments, key=lambda segment: -segment[2].columns)


def _split_rows(
    launch: Launch, queries: int, head_dim: int, needs: Needs, workers: int
) -> list[int]:
    """How many queries a dK/dV program of each group walks over.

    A group is split into at most N / N_g parts, which keeps the workspace below 2 B H N D floats.
    """
    best: list[int] = []
    best_span = math.inf
    for limit in (1, 2, 4, 8, 16):
        rows = []
        for length in launch.groups.lengths[: launch.real]:
            part = cdiv(queries, max(1, min(limit, queries // length)))
            rows.append(min(queries, cdiv(part, SPLIT_ROWS) * SPLIT_ROWS))
        work = [segment[2] for segment in _segments(launch, queries, needs, rows)]
        span = min(makespan(work, tile, workers) for tile in (64, 128))
        if min(rows) < queries:
            # One more launch: 4 us, in which a multiprocessor does 6 TFLOP/s.
            span += 12e6 / head_dim
        if span < 0.95 * best_span:
            best, best_span = rows, span
    return best


@functools.lru_cache(maxsize=4096)
def backward(launch: Launch, queries: int, head_dim: int, needs: Needs, workers: int) -> Backward:
    """The backward launch of the groups of `launch`."""
    _, need_keys, need_values = needs
    split_rows = _split_rows(launch, queries, head_dim, needs, workers)
    segments = _segments(launch, queries, needs, split_rows)
    parts, offsets, sizes, first_reduce = [], [], [], []
    workspace = reduce_programs = 0
    for g in range(launch.real):
        parts.append(cdiv(queries, split_rows[g]))
        sizes.append(launch.work[g].repeats * launch.groups.lengths[g] * head_dim)
        offsets.append(workspace)
        first_reduce.append(reduce_programs)
        if parts[g] > 1 and (need_keys[g] or need_values[g]):
            workspace += 2 * parts[g] * sizes[g]
            reduce_programs += cdiv(sizes[g] // head_dim, REDUCE_ROWS)

    size = len(launch.order)

    def padded(values: Iterable[int], length: int = size, filler: int = 0) -> tuple[int, ...]:
        values = list(values)
        return tuple(values + [filler] * (length - len(values)))

    return Backward(
        splits=Splits(
            need_keys=padded(map(int, need_keys)),
            need_values=padded(map(int, need_values)),
            parts=padded(parts),
            rows=padded(split_rows),
            offsets=padded(offsets),
            sizes=padded(sizes),
            first_reduce=padded(first_reduce, filler=reduce_programs),
        ),
        segments=Segments(
            kinds=padded((s[0] for s in segments), 2 * size),
            groups=padded((s[1] for s in segments), 2 * size),
            rows=padded((s[2].rows for s in segments), 2 * size),
            repeats=padded((s[2].repeats for s in segments), 2 * size),
        ),
        workspace=workspace,
        reduce_programs=reduce_programs,
        work=tuple(s[2] for s in segments),
    )


class Tile(NamedTuple):
    """How much a program of a tuned kernel takes on."""

    owned: int  # BO, rows of the tile that it owns
    walked: int  # BI, rows of a block that it walks over
    warps: int
    stages: int


# (kind, architecture, product, padded head_dim) -> tiles worth timing.  All compile for their
# architecture and spill next to nothing: tests/test_shunted_attention_triton.py.
TILES: dict[tuple[str, str, str, int], list[Tile]] = {
    key: [Tile(*tile) for tile in tiles]
    for key, tiles in {
        ("forward", "ampere", "half", 64): [(128, 64, 4, 3), (64, 64, 4, 3)],
        ("forward", "ampere", "half", 128): [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)],
        ("forward", "ampere", "half", 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
        ("forward", "hopper", "half", 64): [(128, 128, 8, 3), (64, 64, 4, 3)],
        ("forward", "hopper", "half", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
        ("forward", "hopper", "half", 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
        ("forward", "blackwell", "half", 64): [(128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        ("forward", "blackwell", "half", 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
        ("forward", "blackwell", "half", 256): [(128, 32, 8, 2), (64, 64, 8, 2)],
        ("backward", "ampere", "half", 64): [(128, 64, 8, 2), (64, 64, 4, 2)],
        ("backward", "ampere", "half", 128): [(64, 64, 8, 2), (64, 32, 4, 2)],
        ("backward", "ampere", "half", 256): [(64, 32, 8, 2), (32, 32, 8, 2)],
        ("backward", "hopper", "half", 64): [(128, 64, 8, 2), (64, 64, 4, 2)],
        ("backward", "hopper", "half", 128): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
        ("backward", "hopper", "half", 256): [(32, 64, 8, 2), (32, 32, 8, 2)],
        ("backward", "blackwell", "half", 64): [(128, 64, 8, 2), (64, 64, 4, 2)],
        ("backward", "blackwell", "half", 128): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
        ("backward", "blackwell", "half", 256): [(64, 32, 8, 2), (32, 32, 8, 2)],
        ("forward", "any", "tf32", 64): [(64, 64, 4, 2), (64, 32, 4, 2)],
        ("forward", "any", "tf32", 128): [(64, 32, 4, 2), (32, 32, 4, 2)],
        ("forward", "any", "tf32", 256): [(32, 32, 8, 2)],
        ("backward", "any", "tf32", 64): [(64, 32, 8, 2), (32, 32, 8, 2)],
        ("backward", "any", "tf32", 128): [(32, 32, 8, 2)],
        ("backward", "any", "tf32", 256): [(32, 16, 8, 2)],
        ("forward", "any", "ieee", 64): [(64, 32, 8, 2)],
        ("forward", "any", "ieee", 128): [(64, 32, 8, 1), (32, 32, 8, 2)],
        ("forward", "any", "ieee", 256): [(64, 32, 8, 2)],
        ("backward", "any", "ieee", 64): [(32, 16, 8, 2), (32, 16, 8, 1)],
        ("backward", "any", "ieee", 128): [(32, 16, 8, 1)],
        ("backward", "any", "ieee", 256): [(16, 16, 8, 1)],
    }.items()
}
INTERPRETER_TILE = Tile(32, 32, 4, 1)


def admitted_tiles(
    kind: str, device: Device, dtype: torch.dtype, precision: str, head_dim: int
) -> list[Tile]:
    """The tiles worth timing for "forward" or "backward" on a device."""
    padded = max(64, power_of_2(head_dim))
    architecture, product = "any", precision
    if dtype != torch.float32:
        architecture, product = {9: "hopper", 10: "blackwell"}.get(device.major, "ampere"), "half"
    tiles = TILES[kind, architecture, product, padded]
    # Tiles that are held and tiles in flight: consumer chips have 99 kB where others have 227.
    row = max(16, power_of_2(head_dim)) * dtype.itemsize
    held = 1 if kind == "forward" else 2
    fitting = [t for t in tiles if row * (held * t.owned + 2 * t.walked * t.stages) < device.shared]
    return fitting or tiles[-1:]
