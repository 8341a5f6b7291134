"""What surfaces look like, and how a surface is drawn into a picture."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ...errors import InputError
from ..records import read_rgb
from .motion import Random, rotation, scaling, translation

# Pictures inside scikit-image's wheel (no download); nature, things and surfaces, no diagrams.
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SURFACES = ("brick.png", "grass.png", "gravel.png")


def noise(rng: Random, height: int, width: int, cell: float, stretch: float = 1.0) -> np.ndarray:
    """(height, width) float32 in [0, 1]: value noise of five octaves, largest cell in pixels."""
    total = np.zeros((height, width), np.float32)
    weight = 1.0
    for _ in range(5):
        rows = max(int(height * stretch / cell), 1) + 2
        columns = max(int(width / cell), 1) + 2
        grid = rng.random((min(rows, height), min(columns, width)), np.float32)
        grid *= np.float32(weight)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight *= 0.55
        cell = max(cell / 2.1, 1.0)
    low = total.min()
    return (total - low) / np.maximum(total.max() - low, np.float32(1e-6))


def palette(rng: Random, colours: int) -> np.ndarray:
    """(colours, 3) float in [0, 255], RGB: neighbours of one hue, now and then a stranger."""
    hue, spread = rng.uniform(0, 180), rng.choice([6.0, 20.0, 60.0])
    saturation = rng.choice([0.1, 0.25, 0.4, 0.8]) * rng.uniform(0.7, 1.1)
    value, contrast = rng.uniform(0.2, 0.95), rng.uniform(0.05, 0.35)
    hsv = np.stack(
        [
            (hue + rng.normal(0, spread, colours)) % 180,
            np.clip(255 * (saturation + rng.normal(0, 0.1, colours)), 0, 255),
            np.clip(255 * (value + rng.normal(0, contrast, colours)), 15, 250),
        ],
        axis=1,
    )
    return cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0].astype(float)


def procedural(rng: Random, height: int, width: int, colours: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8: noise, stripes, tiles, spots, a gradient or a plain surface."""
    kind = rng.choice(["noise", "fibres", "stripes", "tiles", "spots", "gradient", "plain"])
    side = math.sqrt(height * width)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    angle = rng.uniform(0, np.pi)
    along = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y
    if kind == "noise":
        field = noise(rng, height, width, side * rng.uniform(0.05, 0.6))
    elif kind == "fibres":
        field = noise(rng, height, width, side * rng.uniform(0.05, 0.4), rng.choice([0.15, 6.0]))
    elif kind == "stripes":
        period = side * rng.uniform(0.03, 0.3)
        bend = noise(rng, height, width, side * 0.4) * np.float32(rng.uniform(0, 6))
        field = 0.5 + 0.5 * np.sin(along * np.float32(2 * np.pi / period) + bend)
        if rng.random() < 0.5:
            field = (field > 0.5).astype(np.float32)
    elif kind == "tiles":
        tile = side * rng.uniform(0.04, 0.25)
        row = np.floor(y / tile * rng.choice([1.0, 2.0]))
        column = np.floor(x / tile + rng.choice([0.0, 0.5]) * row)
        shade = rng.random(256, np.float32)[((17 * row + column) % 256).astype(np.uint8)]
        share = np.float32(rng.uniform(0, 1))
        field = share * ((row + column) % 2) + (1 - share) * shade
    elif kind == "spots":
        field = np.full((height, width), 0.1, np.float32)
        for _ in range(int(rng.integers(10, 90))):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            radius = max(int(side * rng.uniform(0.01, 0.07)), 1)
            cv2.circle(field, centre, radius, rng.uniform(0.3, 1), -1, cv2.LINE_AA)
    elif kind == "gradient":
        field = along - along.min()
        field /= max(float(field.max()), 1.0)
    else:
        field = np.full((height, width), 0.5, np.float32)
    field = field + np.float32(rng.uniform(0, 0.25)) * (noise(rng, height, width, side * 0.1) - 0.5)
    steps = np.linspace(0, len(colours) - 1, 256)
    table = np.stack([np.interp(steps, np.arange(len(colours)), c) for c in colours.T], 1)
    index = cv2.convertScaleAbs(np.maximum(field, 0), alpha=255)
    return cv2.LUT(cv2.merge([index] * 3), table.astype(np.uint8)[None])


@lru_cache(maxsize=len(PHOTOS))
def photo(name: str) -> np.ndarray:
    """A picture of scikit-image's wheel, (H, W, 3) uint8, at most 512 pixels a side."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("synthetic clips need scikit-image: pip install scikit-image")
    path = Path(spec.submodule_search_locations[0], "data", name)
    picture = read_rgb(path)
    shrink = 512 / max(picture.shape[:2])
    if shrink < 1:
        picture = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    return picture


def photo_crop(rng: Random, height: int, width: int, name: str, share: float) -> np.ndarray:
    """A turned crop of about `share` of the picture's side, in changed colours."""
    picture = photo(name)
    rows, columns = picture.shape[:2]
    zoom = share * min(rows, columns) / max(height, width)
    centre = (rng.uniform(0.3, 0.7) * columns, rng.uniform(0.3, 0.7) * rows)
    flip = scaling(rng.choice([-1.0, 1.0]), 1.0)
    matrix = translation(*centre) @ rotation(rng.normal(0, 0.4), zoom) @ flip
    matrix = matrix @ translation(-width / 2, -height / 2)
    crop = warp(picture, np.linalg.inv(matrix), height, width)
    if rng.random() < 0.4:
        hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV)
        shift = int(rng.choice([rng.normal(0, 8), rng.uniform(0, 180)]))
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + shift) % 180
        crop = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    tint = rng.uniform(0.7, 1.15) * rng.uniform(0.85, 1.15, 3)
    return cv2.convertScaleAbs(cv2.transform(crop, np.diag(tint)))


def texture(rng: Random, height: int, width: int, colours: np.ndarray, photos: bool) -> np.ndarray:
    if photos and rng.random() < 0.35:
        return photo_crop(rng, height, width, str(rng.choice(PHOTOS)), rng.uniform(0.25, 0.7))
    return procedural(rng, height, width, colours)


def warp(picture: np.ndarray, matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """`matrix` (3, 3) takes the picture's pixels to the output's; outside the picture mirrors."""
    return cv2.warpAffine(
        picture,
        matrix[:2],
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def mean_colour(picture: np.ndarray) -> np.ndarray:
    return np.array(cv2.mean(picture)[:3], np.float32)


def fill(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 coverage of an outline (K, 2) in pixels."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    return canvas


def blend(base: np.ndarray, over: np.ndarray, cover: np.ndarray) -> None:
    """Lay `over` on `base` (H, W, 3), in place, where `cover` (H, W) uint8 says."""
    share = cover.astype(np.float32)[..., None] * np.float32(1 / 255)
    base[...] = base + (over - base.astype(np.float32)) * share
