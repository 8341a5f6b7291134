"""Tiles: which ones are worth timing on a device, and how channels are padded.

Tile sizes are timed once per shape class, batch and steps left out; the timing of a wave of
programs then says which tile suits another batch.
"""

from typing import NamedTuple

import torch

from ...triton_tuning import Device

# Channels lie in rows whose length is a multiple of this: whole 16-byte vectors of every dtype,
# and the smallest depth of a product.
PAD = 16


class Tile(NamedTuple):
    """How much a program of a tuned kernel takes on."""

    pixels: int
    channels: int  # of every gate in the forward kernel; gate rows in the weight kernel
    depth: int  # of a block of the product; columns in the weight kernel
    warps: int
    stages: int


# (kernel, architecture, product) -> tiles worth timing.  None spills on its architecture:
# tests/test_conv_lstm_triton.py.
TILES: dict[tuple[str, str, str], list[Tile]] = {
    ("forward", "hopper", "half"): [
        Tile(128, 64, 64, 8, 3),
        Tile(128, 32, 64, 4, 3),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 16, 64, 4, 4),
    ],
    ("forward", "ampere", "half"): [Tile(128, 32, 32, 8, 3), Tile(64, 32, 32, 4, 4)],
    ("forward", "any", "tf32"): [Tile(128, 32, 32, 8, 3), Tile(64, 16, 32, 4, 3)],
    ("forward", "any", "ieee"): [Tile(64, 32, 16, 8, 2), Tile(32, 16, 16, 4, 2)],
    ("backward", "hopper", "half"): [
        Tile(128, 64, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 64, 4, 4),
    ],
    ("backward", "ampere", "half"): [Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 4)],
    ("backward", "any", "tf32"): [Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)],
    ("backward", "any", "ieee"): [Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)],
    ("weight", "hopper", "half"): [
        Tile(64, 256, 128, 8, 3),
        Tile(64, 128, 128, 8, 3),
        Tile(64, 64, 64, 4, 4),
    ],
    ("weight", "ampere", "half"): [Tile(32, 128, 128, 8, 3), Tile(64, 64, 64, 4, 3)],
    ("weight", "any", "tf32"): [Tile(32, 128, 64, 8, 3), Tile(32, 64, 64, 4, 3)],
    ("weight", "any", "ieee"): [Tile(16, 64, 64, 8, 2), Tile(16, 64, 32, 4, 2)],
}
INTERPRETER_TILES = {
    "forward": Tile(64, 16, 32, 4, 1),
    "backward": Tile(64, 16, 64, 4, 1),
    "weight": Tile(64, 64, 64, 4, 1),
}
# For the step of the backward that has no product.
POINTWISE_TILE = Tile(64, 32, 16, 4, 1)
# Tiles of the two memory-bound kernels: (pixels, channels).
PACK_TILE = (64, 32)
SUMS_TILE = (32, 16)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(channels: int) -> int:
    return cdiv(channels, PAD) * PAD


def admitted_tiles(
    kind: str, device: Device, dtype: torch.dtype, precision: str, aligned: bool
) -> list[Tile]:
    """The tiles worth timing for "forward", "backward" or "weight" on a device.

    aligned: frames are whole multiples of 16 pixels.
    """
    architecture, product = "any", precision
    if dtype != torch.float32:
        architecture, product = "hopper" if device.major in (9, 10) else "ampere", "half"
    tiles = TILES[kind, architecture, product]

    def fits(tile: Tile) -> bool:
        gates = 4 if kind == "forward" else 1
        if kind == "weight":
            block = tile.pixels * (tile.channels + tile.depth)
        else:
            block = tile.depth * (tile.pixels + tile.channels * gates)
        # Consumer chips have 99 kB of shared memory where others have 163 or 227.
        if tile.stages * block * dtype.itemsize >= device.shared:
            return False
        # Without wide accesses the forward kernel needs more registers for addresses.
        accumulators = gates * tile.pixels * tile.channels // (32 * tile.warps)
        return kind != "forward" or aligned or accumulators <= 64

    return [tile for tile in tiles if fits(tile)] or tiles[-1:]
