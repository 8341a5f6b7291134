"""Synthetic clips: textured objects that move over a moving background, with exact masks.

A clip is a function of (seed, split, index) and the frame size alone, and its frame t of nothing
else, so clips need no disk and a longer clip begins with the shorter one.  Lengths below are in
units of the frame's geometric mean side, speeds in units a frame.

    background layers (pan, zoom, rotation, parallax; distractors are part of them)
    -> for each object: shadow, then its parts (textured polygons that swing about joints)
    -> occluders -> light, blur, noise, JPEG

What moves with the background is not salient, however it looks; what moves on its own is.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np

from ...errors import InputError
from ..records import Record, Records, read_rgb

SPLITS = ("train", "val", "test")
FRAMES = 24

# Pictures inside scikit-image's wheel (no download); nature, things and surfaces, no diagrams.
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SURFACES = ("brick.png", "grass.png", "gravel.png")

Random: TypeAlias = np.random.Generator


def open_synthetic(
    split: str,
    *,
    clips: int = 1000,
    frames: int = FRAMES,
    size: tuple[int, int] = (224, 224),
    seed: int = 0,
    photos: bool = True,
) -> Records:
    """Records of `clips` clips of `frames` frames; pictures are made when they are read."""
    _check(seed, split, size)
    for name, value in (("clips", clips), ("frames", frames)):
        if value < 1:
            raise InputError(f"{name} is {value}; synthetic clips need at least 1")
    records = []
    names = [f"{t:05d}" for t in range(frames)]
    for index in range(clips):
        key = (seed, split, index, tuple(size), photos)
        records += [
            Record(
                sequence=f"{split}-{index:06d}",
                frame=t,
                name=names[t],
                image=partial(_image, key, t),
                mask=partial(_mask, key, t),
                split=split,
            )
            for t in range(frames)
        ]
    return Records("synthetic", split, records)


def synthetic_clip(
    seed: int,
    index: int,
    frames: int = 5,
    size: tuple[int, int] = (224, 224),
    *,
    split: str = "train",
    photos: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip `index`: images (frames, H, W, 3) uint8 RGB and masks (frames, H, W) uint8, 0 or 1.

    photos=False leaves out the pictures of scikit-image: every pixel is procedural then.
    """
    _check(seed, split, size)
    clip = SyntheticClip(seed, split, index, size, photos)
    pairs = [clip.frame(t) for t in range(frames)]
    return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])


def _check(seed: int, split: str, size: tuple[int, int]) -> None:
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; synthetic has {', '.join(SPLITS)}")
    if len(size) != 2 or min(size) < 16:
        raise InputError(f"size is {size}; synthetic clips need (height, width) of at least 16")
    if seed < 0:
        raise InputError(f"seed is {seed}; it has to be 0 or more")


_clip = lru_cache(maxsize=4)(lambda *key: SyntheticClip(*key))


@lru_cache(maxsize=8)
def _frame(key: tuple, t: int) -> tuple[np.ndarray, np.ndarray]:
    return _clip(*key).frame(t)


def _image(key: tuple, t: int) -> np.ndarray:
    return _frame(key, t)[0].copy()


def _mask(key: tuple, t: int) -> np.ndarray:
    return _frame(key, t)[1] * np.uint8(255)


# ---- motion


@dataclass(frozen=True)
class Wave:
    """A smooth bounded function of time: mean + sum of amplitude * sin(rate * t + phase)."""

    mean: float
    terms: tuple[tuple[float, float, float], ...] = ()
    drift: float = 0.0

    def __call__(self, t: float) -> float:
        moved = sum(a * math.sin(rate * t + phase) for a, rate, phase in self.terms)
        return self.mean + self.drift * t + moved


def wave(rng: Random, mean: float, amplitude: float, speed: float) -> Wave:
    """Two sines within +-amplitude, never faster than `speed` a frame."""
    terms = []
    for share in (0.75, 0.25):
        a = share * amplitude
        rate = min(share * speed / max(a, 1e-6), 0.9) * rng.uniform(0.6, 1.0)
        terms.append((a, rate, rng.uniform(0, 2 * math.pi)))
    return Wave(mean, tuple(terms))


def rotation(angle: float, scale: float = 1.0) -> np.ndarray:
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def translation(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:2, :2].T + matrix[:2, 2]


# ---- shapes: closed outlines (K, 2), about one unit in radius


def superellipse(aspect: float, power: float = 2.0, points: int = 48) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    x = np.sign(c) * np.abs(c) ** (2 / power)
    y = np.sign(s) * np.abs(s) ** (2 / power)
    return np.stack([x, y * aspect], 1)


def blob(rng: Random, roughness: float, points: int = 72) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    radius = np.ones(points)
    for k in range(2, 8):
        swell = rng.normal(0, roughness / k)
        radius += swell * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    radius = np.clip(radius, 0.3, 1.9)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) * rng.uniform(0.5, 1)], 1)


def star(rng: Random) -> np.ndarray:
    arms = int(rng.integers(3, 8))
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    depth = rng.uniform(0.15, 0.5)
    radius = 1 - depth + depth * np.cos(arms * angle + rng.uniform(0, 6))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def polygon(rng: Random) -> np.ndarray:
    corners = int(rng.integers(3, 9))
    angle = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    radius = rng.uniform(0.6, 1.1, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) * rng.uniform(0.5, 1)], 1)


def limb(length: float, top: float, bottom: float) -> np.ndarray:
    """A tapered bone from the origin down to (0, length), with round ends."""
    angle = np.linspace(0, np.pi, 8)
    upper = np.stack([-top * np.cos(angle), -top * np.sin(angle)], 1)
    lower = np.stack([bottom * np.cos(angle), length + bottom * np.sin(angle)], 1)
    return np.concatenate([upper, lower])


def simple_shape(rng: Random) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:
        return superellipse(rng.uniform(0.4, 1.0))
    if kind == 1:
        return superellipse(rng.uniform(0.4, 1.0), rng.uniform(2.5, 8))
    if kind == 2:
        return star(rng)
    if kind == 3:
        return polygon(rng)
    return blob(rng, rng.uniform(0.15, 0.6))


# ---- objects: parts that move together, in object coordinates (y down)


@dataclass(frozen=True)
class Part:
    outline: np.ndarray  # (K, 2), about its joint
    joint: tuple[float, float]
    angle: Wave
    texture: int
    gain: float  # brightness, so that parts of one texture can be told apart
    depth: float = 0.0  # more is nearer

    def matrix(self, t: float) -> np.ndarray:
        return translation(*self.joint) @ rotation(self.angle(t))


def build_thing(rng: Random) -> list[Part]:
    """One shape, or a few overlapping ones that wobble."""
    count = int(rng.choice([1, 1, 2, 3, 4]))
    parts = []
    for i in range(count):
        size = 1.0 if i == 0 else rng.uniform(0.3, 0.75)
        joint = (0.0, 0.0) if i == 0 else tuple(rng.uniform(-0.9, 0.9, 2))
        still = Wave(rng.uniform(-math.pi, math.pi)) if count == 1 else None
        turn = still or wave(rng, rng.uniform(-3, 3), rng.uniform(0, 0.5), 0.15)
        parts.append(
            Part(size * simple_shape(rng), joint, turn, i % 2, rng.uniform(0.75, 1.2), i)
        )  # fmt: skip
    return parts


def build_animal(rng: Random) -> list[Part]:
    """A body with neck, head, tail and swinging legs, seen from the side."""
    body = rng.uniform(0.35, 0.6)  # half of the body's height
    leg, thick = rng.uniform(0.2, 1.1), rng.uniform(0.06, 0.16)
    speed, swing = rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.6)
    parts = [Part(superellipse(body, rng.uniform(1.8, 2.8)), (0, 0), Wave(0), 0, 1.0, 1)]
    for i, x in enumerate((-0.75, -0.6, 0.6, 0.75)):
        turn = Wave(0, ((swing, speed, i * math.pi / 2 + rng.uniform(-0.4, 0.4)),))
        gain = 0.7 if i % 2 else 0.95
        outline = limb(leg, thick * 1.5, thick)
        parts.append(Part(outline, (x, body * 0.5), turn, 0, gain, 2 * (i % 2 == 0)))
    lift = rng.uniform(0.3, 2.2)  # neck from level to upright
    reach = rng.uniform(0.3, 1.0)
    nod = wave(rng, math.pi + lift, 0.2, 0.08)
    parts.append(Part(limb(reach, body * 0.6, body * 0.35), (0.8, -0.1), nod, 0, 1.0, 1.5))
    head = superellipse(rng.uniform(0.5, 0.9)) * rng.uniform(0.25, 0.45)
    # The head sits at the end of the neck at rest; its own outline reaches beyond the joint.
    tip = (0.8 - reach * math.sin(nod.mean), -0.1 + reach * math.cos(nod.mean))
    parts.append(Part(head, tip, wave(rng, 0.3, 0.3, 0.1), 1, 1.05, 2.5))
    tail = limb(rng.uniform(0.2, 1.0), 0.09, 0.04)
    wag = wave(rng, rng.uniform(0.6, 2.4), 0.5, 0.3)
    parts.append(Part(tail, (-0.9, -0.1), wag, 0, 0.9, 0))
    return parts


def build_person(rng: Random) -> list[Part]:
    """Torso, head, arms and legs."""
    wide, speed, swing = rng.uniform(0.22, 0.42), rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.9)
    parts = [Part(superellipse(1.0, 3.0) * (wide, 0.55), (0, 0), Wave(0), 0, 1.0, 1)]
    for i, side in enumerate((-1, 1)):
        phase = i * math.pi
        turn = Wave(rng.uniform(-0.2, 0.2), ((swing, speed, phase),))
        leg = limb(rng.uniform(0.9, 1.2), 0.19, 0.11)
        parts.append(Part(leg, (side * wide * 0.5, 0.45), turn, 1, 0.85 + 0.2 * i, 0))
        turn = Wave(-side * rng.uniform(0.0, 1.6), ((swing, speed, phase + math.pi),))
        arm = limb(rng.uniform(0.7, 0.95), 0.13, 0.08)
        parts.append(Part(arm, (side * wide * 0.85, -0.4), turn, i, 0.9, 2 * i))
    head = superellipse(1.2) * rng.uniform(0.2, 0.27)
    parts.append(Part(head, (0, -0.78), wave(rng, 0, 0.2, 0.05), 2, 1.0, 1.5))
    return parts


def build_vehicle(rng: Random) -> list[Part]:
    """A hull with a cabin and turning wheels."""
    high, wheel = rng.uniform(0.2, 0.5), rng.uniform(0.16, 0.32)
    parts = [Part(superellipse(high, rng.uniform(3, 8)), (0, 0), Wave(0), 0, 1.0, 1)]
    if rng.random() < 0.7:
        shape = superellipse(rng.uniform(0.5, 0.9), rng.uniform(2.5, 6)) * rng.uniform(0.3, 0.7)
        parts.append(Part(shape, (rng.uniform(-0.3, 0.2), -high), Wave(0), 0, 0.9, 0.5))
        pane = superellipse(0.5, 4) * rng.uniform(0.15, 0.35)
        parts.append(Part(pane, (rng.uniform(-0.3, 0.2), -high * 1.1), Wave(0), 1, 1.1, 0.8))
    turning = rng.uniform(0.1, 0.6)
    for x in np.linspace(-0.65, 0.65, int(rng.integers(2, 4))):
        spin = Wave(rng.uniform(0, 6), drift=turning)
        parts.append(Part(superellipse(1.0) * wheel, (float(x), high), spin, 2, 0.6, 2))
    return parts


BUILDERS: tuple[Callable[[Random], list[Part]], ...] = (
    build_thing, build_animal, build_person, build_vehicle,
)  # fmt: skip


# ---- textures


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


# ---- backgrounds


@dataclass(frozen=True)
class Layer:
    picture: np.ndarray  # (H, W, 3) uint8, larger than the frame
    cover: np.ndarray | None  # (H, W) uint8; None: everywhere
    nearness: float  # camera motion counts this much


def build_background(rng: Random, height: int, width: int, photos: bool) -> list[Layer]:
    """One to three layers from far to near, things that belong to the background among them."""
    kind = rng.choice(["surface", "photo", "landscape", "boxes"], p=[0.25, 0.3, 0.25, 0.2])
    colours = palette(rng, 4)
    if kind == "photo" and photos:
        # Of a picture of something, only a part: whole, it would be a thing to look at.
        name, share = str(rng.choice(SURFACES)), rng.uniform(0.5, 1.2)
        if rng.random() < 0.6:
            name, share = str(rng.choice(PHOTOS)), rng.uniform(0.3, 0.7)
        layers = [Layer(photo_crop(rng, height, width, name, share), None, 1.0)]
    elif kind == "landscape":
        layers = landscape(rng, height, width, photos)
    elif kind == "boxes":
        layers = [Layer(boxes(rng, height, width), None, 1.0)]
    else:
        layers = [Layer(texture(rng, height, width, colours, photos), None, 1.0)]
    if rng.random() < 0.45:
        scatter(rng, layers[-1].picture, int(rng.integers(1, 12)), photos)
    if rng.random() < 0.4:  # out of focus
        sigma = rng.uniform(0.004, 0.02) * math.sqrt(height * width)
        layers = [
            Layer(cv2.GaussianBlur(layer.picture, (0, 0), sigma), layer.cover, layer.nearness)
            for layer in layers
        ]
    return layers


def landscape(rng: Random, height: int, width: int, photos: bool) -> list[Layer]:
    """A sky, and one or two wavy grounds before it, the nearer the faster."""
    sky = noise(rng, height, width, 0.3 * width, 2.0)[..., None] * np.float32(rng.uniform(0, 0.4))
    fade = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    upper, lower = palette(rng, 2).astype(np.float32)
    bright = np.clip((upper * (1 - fade) + lower * fade) * (1 - sky) + 255 * sky, 0, 255)
    layers = [Layer(bright.astype(np.uint8), None, 0.6)]
    x = np.linspace(0, 1, 60)
    level = rng.uniform(0.3, 0.6)
    for nearness in (1.0, 1.3)[: int(rng.integers(1, 3))]:
        line = np.full(60, level)
        for k in range(1, 6):
            line += rng.normal(0, 0.05 / k) * np.sin(2 * np.pi * (k * x + rng.random()))
        outline = np.stack([x * width, line * height], 1)
        outline = np.concatenate([outline, [[width, height + 9], [0, height + 9]]])
        ground = texture(rng, height, width, palette(rng, 4), photos)
        layers.append(Layer(ground, fill(outline, height, width), nearness))
        level += rng.uniform(0.1, 0.25)
    return layers


def boxes(rng: Random, height: int, width: int) -> np.ndarray:
    """Walls, windows, shelves: upright rectangles of a few related colours."""
    colours = palette(rng, 6)
    canvas = procedural(rng, height, width, colours[:3])
    for _ in range(int(rng.integers(8, 45))):
        x, y = rng.uniform(-0.1, 1.0, 2) * (width, height)
        w, h = rng.uniform(0.02, 0.3, 2) * (width, height)
        colour = colours[rng.integers(6)] * rng.uniform(0.7, 1.2)
        corners = (int(x), int(y)), (int(x + w), int(y + h))
        cv2.rectangle(canvas, *corners, np.clip(colour, 0, 255).tolist(), -1)
    shade = 0.75 + 0.5 * noise(rng, height, width, 0.5 * width)
    return cv2.multiply(canvas, cv2.merge([shade] * 3), dtype=cv2.CV_8U)


def scatter(rng: Random, canvas: np.ndarray, count: int, photos: bool) -> None:
    """Draw distractors into a background: they look like objects and move with the ground."""
    height, width = canvas.shape[:2]
    side = math.sqrt(height * width)
    ground = mean_colour(canvas)
    kinds = [texture(rng, height // 2, width // 2, palette(rng, 3), photos) for _ in range(2)]
    for i in range(count):
        size = side * rng.uniform(0.015, 0.1)
        centre = rng.uniform(0, 1, 2) * (width, height)
        turn = rotation(rng.uniform(-math.pi, math.pi), size)
        outline = transformed(translation(*centre) @ turn, simple_shape(rng))
        low = np.maximum(np.floor(outline.min(0)).astype(int), 0)
        high = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, (width, height))
        w, h = np.minimum(high - low, (width // 2, height // 2))
        if w < 1 or h < 1:
            continue
        cover = fill(outline - low, h, w)
        # Mixed with the ground's colour: distractors stand out less than objects, mostly.
        look = kinds[i % 2][:h, :w] * np.float32(rng.uniform(0.4, 1.0))
        look += (ground - look) * np.float32(rng.uniform(0.0, 0.6))
        blend(canvas[low[1] : low[1] + h, low[0] : low[0] + w], look, cover)


# ---- clips


@dataclass(frozen=True)
class Thing:
    """A salient object."""

    parts: list[Part]  # far to near
    textures: list[np.ndarray]  # square, (S, S, 3) uint8; [-1.6, 1.6] of object coordinates
    x: Wave
    y: Wave
    angle: Wave
    size: Wave  # logarithm of units a unit of object coordinates
    mirror: float
    fade: float  # mixed with the background's colour by this share
    shadow: tuple[float, float, float]  # shift x, shift y, darkness

    def matrix(self, t: float, height: int, width: int) -> np.ndarray:
        """Object coordinates to pixels."""
        scale = math.exp(self.size(t)) * math.sqrt(height * width)
        place = translation(self.x(t) * width, self.y(t) * height)
        return place @ rotation(self.angle(t), scale) @ scaling(self.mirror, 1.0)


def unit_area(parts: list[Part]) -> tuple[float, float]:
    """(area, largest half side) of the union of parts at t=0, in object coordinates."""
    outlines = [transformed(part.matrix(0), part.outline) for part in parts]
    canvas = np.zeros((200, 200), np.uint8)
    for outline in outlines:
        cv2.fillPoly(canvas, [np.round(100 + outline * 25).astype(np.int32)], 1)
    reach = float(np.abs(np.concatenate(outlines)).max())
    return max(int(canvas.sum()), 1) / 25**2, reach


def build_thing_in(
    rng: Random, share: float, ground: np.ndarray, height: int, width: int, photos: bool
) -> Thing:
    """An object that covers about `share` of the frame, before a ground of colour `ground`."""
    parts = BUILDERS[rng.choice(4, p=[0.4, 0.25, 0.2, 0.15])](rng)
    parts = sorted(parts, key=lambda part: part.depth)
    area, reach = unit_area(parts)
    size = min(math.sqrt(share / area), 0.9 / reach)
    side = int(np.clip(3.2 * size * math.sqrt(height * width), 24, 320))
    apart = rng.choice([10.0, 60.0, 110.0], p=[0.15, 0.4, 0.45])  # a camouflaged one at times
    textures = []
    for _ in range(1 + max(part.texture for part in parts)):
        colours = palette(rng, 3)
        for _ in range(6):
            if np.linalg.norm(colours.mean(0) - ground) > apart:
                break
            colours = palette(rng, 3)
        textures.append(texture(rng, side, side, colours, photos))
    speed = rng.choice([0.004, 0.015, 0.04]) * rng.uniform(0.5, 1.5)
    spins = len(parts) == 1 and rng.random() < 0.4
    turn = rng.uniform(0.3, 2.5) if spins else rng.uniform(0, 0.35)
    roam = rng.uniform(0.05, 0.3)
    x, y = np.clip(rng.normal((0.5, 0.52), (0.17, 0.13)), 0.1, 0.9)
    dark = rng.uniform(0.2, 0.6) if rng.random() < 0.5 else 0.0
    return Thing(
        parts,
        textures,
        x=wave(rng, x, roam, speed),
        y=wave(rng, y, roam * rng.uniform(0.2, 0.8), speed),
        angle=wave(rng, 0.0, turn, 0.1 if spins else 0.03),
        size=wave(rng, math.log(size), rng.uniform(0, 0.35), 0.03),
        mirror=rng.choice([-1.0, 1.0]),
        fade=rng.choice([0.0, rng.uniform(0, 0.35)]),
        shadow=(rng.uniform(-0.3, 0.3), rng.uniform(0.05, 0.4), dark),
    )


class SyntheticClip:
    """The scene of one clip; `frame(t)` draws any of its frames, in any order."""

    def __init__(self, seed: int, split: str, index: int, size: tuple[int, int], photos: bool):
        self.key = [seed, SPLITS.index(split), index]
        self.photos = photos
        self.height, self.width = height, width = size
        rng = np.random.default_rng(self.key)
        canvas = int(1.35 * height), int(1.35 * width)
        self.layers = build_background(rng, *canvas, photos)
        still = rng.random() < 0.25
        pace = 0.0 if still else rng.choice([0.005, 0.02, 0.04])
        self.pan = [wave(rng, 0.0, rng.uniform(0.05, 0.35), pace * f) for f in (1.0, 0.4)]
        self.zoom = wave(rng, rng.uniform(0.0, 0.2), 0.0 if still else rng.uniform(0, 0.2), 0.01)
        self.turn = wave(rng, 0.0, 0.0 if still else rng.uniform(0, 0.12), 0.01)

        ground = mean_colour(self.layers[-1].picture)
        count = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
        low = 0.005 if rng.random() < 0.15 else 0.02
        shares = np.sort(np.exp(rng.uniform(math.log(low), math.log(0.4), count)))
        if count > 1:
            shares = np.minimum(shares, 0.15)
        self.things = [
            build_thing_in(rng, share, ground, height, width, photos) for share in shares[::-1]
        ]
        self.ground = ground

        self.occluder = self.build_occluder(rng, *canvas) if rng.random() < 0.1 else None
        self.light = wave(rng, rng.uniform(0.8, 1.15), rng.choice([0.0, 0.12]), 0.02)
        self.vignette = self.build_vignette(rng)
        self.blur = rng.uniform(0.4, 1.1) if rng.random() < 0.35 else 0.0
        field = (height + 32, width + 32, 3 if rng.random() < 0.5 else 1)
        grain = np.float32(rng.choice([0.0, 2.0, 6.0]) * rng.uniform(0.5, 1.5))
        self.grain = rng.standard_normal(field, np.float32) * grain if grain > 0 else None
        self.quality = int(rng.integers(25, 90)) if rng.random() < 0.5 else None

    def build_occluder(self, rng: Random, height: int, width: int) -> Layer:
        """Posts or leaves between the camera and the objects."""
        cover = np.zeros((height, width), np.uint8)
        posts = rng.random() < 0.5
        for _ in range(int(rng.integers(1, 3 if posts else 7))):
            x = rng.uniform(0, width)
            if posts:
                half = rng.uniform(0.01, 0.04) * width
                lean = rng.normal(0, 0.1) * width
                outline = np.array(
                    [(x - half, 0), (x + half, 0), (x + half + lean, height),
                     (x - half + lean, height)]
                )  # fmt: skip
            else:
                leaf = superellipse(rng.uniform(0.15, 0.5)) * rng.uniform(0.02, 0.09) * width
                place = translation(x, rng.uniform(0, height)) @ rotation(rng.uniform(0, 3))
                outline = transformed(place, leaf)
            cover = np.maximum(cover, fill(outline, height, width))
        look = texture(rng, height, width, palette(rng, 3) * 0.6, self.photos)
        return Layer(look, cover, 1.6)

    def build_vignette(self, rng: Random) -> np.ndarray:
        """(H, W, 1) float32 about 1: light that falls off over the frame."""
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        slope = rng.normal(0, 0.12, 2)
        across = slope[0] * (x / self.width - 0.5) + slope[1] * (y / self.height - 0.5)
        return (1 + across)[..., None].astype(np.float32)

    def camera(self, t: float, layer: Layer) -> np.ndarray:
        """A layer's pixels to the frame's."""
        rows, columns = layer.picture.shape[:2]
        side = math.sqrt(self.height * self.width)
        x, y = (layer.nearness * pan(t) * side for pan in self.pan)
        zoom = math.exp(layer.nearness * self.zoom(t))
        centre = translation(self.width / 2 + x, self.height / 2 + y)
        return centre @ rotation(self.turn(t), zoom) @ translation(-columns / 2, -rows / 2)

    def frame(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 RGB and mask (H, W) uint8, 0 or 1."""
        height, width = self.height, self.width
        drawn = np.zeros((height, width, 3), np.float32)
        for layer in self.layers:
            self.lay(drawn, layer, t)
        mask = np.zeros((height, width), np.uint8)
        for thing in self.things:
            mask = np.maximum(mask, self.draw(drawn, thing, t))
        if self.occluder is not None:
            mask[self.lay(drawn, self.occluder, t) >= 128] = 0
        return self.expose(drawn, t), (mask >= 128).astype(np.uint8)

    def lay(self, drawn: np.ndarray, layer: Layer, t: float) -> np.ndarray:
        """Draw a layer; gives its coverage (H, W) uint8."""
        matrix = self.camera(t, layer)
        look = warp(layer.picture, matrix, self.height, self.width)
        if layer.cover is None:
            drawn[...] = look
            return np.full((self.height, self.width), 255, np.uint8)
        cover = warp(layer.cover, matrix, self.height, self.width)
        blend(drawn, look, cover)
        return cover

    def draw(self, drawn: np.ndarray, thing: Thing, t: float) -> np.ndarray:
        """Draw an object with its shadow; gives its coverage (H, W) uint8."""
        height, width = self.height, self.width
        to_pixels = thing.matrix(t, height, width)
        matrices = [to_pixels @ part.matrix(t) for part in thing.parts]
        outlines = [transformed(m, p.outline) for m, p in zip(matrices, thing.parts, strict=True)]
        covers = [fill(outline, height, width) for outline in outlines]
        union = np.maximum.reduce(covers)
        self.shade(drawn, union, thing.shadow, float(to_pixels[1, 1]))
        for part, matrix, outline, cover in zip(
            thing.parts, matrices, outlines, covers, strict=True
        ):
            low = np.clip(np.floor(outline.min(0)).astype(int) - 1, 0, (width, height))
            high = np.clip(np.ceil(outline.max(0)).astype(int) + 2, 0, (width, height))
            w, h = high - low
            if w < 1 or h < 1:
                continue
            picture = thing.textures[part.texture]
            side = picture.shape[0]
            spread = scaling(3.2 / side, 3.2 / side) @ translation(-side / 2, -side / 2)
            look = warp(picture, translation(*-low) @ matrix @ spread, h, w).astype(np.float32)
            look += np.float32(thing.fade) * (self.ground - look)
            region = slice(low[1], high[1]), slice(low[0], high[0])
            # Rounder than flat: darker towards the outline, by how little of it is around.
            near = max(int(0.06 * math.hypot(w, h)), 1)
            rim = cv2.blur(cover[region], (2 * near + 1, 2 * near + 1)).astype(np.float32)
            look *= np.float32(part.gain) * (0.6 + rim * np.float32(0.4 / 255))[..., None]
            blend(drawn[region], look, cover[region])
        return union

    def shade(
        self, drawn: np.ndarray, union: np.ndarray, shadow: tuple[float, float, float], size: float
    ) -> None:
        x, y, dark = shadow
        if dark == 0.0:
            return
        moved = translation(x * size, y * size)[:2]
        cast = cv2.warpAffine(union, moved, (self.width, self.height))
        soft = 2 * max(int(0.15 * size), 1) + 1
        drawn *= 1 - cv2.blur(cast, (soft, soft)).astype(np.float32)[..., None] * (dark / 255)

    def expose(self, drawn: np.ndarray, t: int) -> np.ndarray:
        """Light, blur, grain and compression: what a camera does to the scene."""
        rng = np.random.default_rng([*self.key, t + 1])
        drawn = drawn * (self.vignette * np.float32(self.light(t)))
        if self.blur > 0:
            drawn = cv2.GaussianBlur(drawn, (0, 0), self.blur)
        if self.grain is not None:
            top, left = rng.integers(0, 32, 2)
            drawn += self.grain[top : top + self.height, left : left + self.width]
        image = np.clip(drawn, 0, 255).astype(np.uint8)
        if self.quality is not None:
            options = [cv2.IMWRITE_JPEG_QUALITY, self.quality]
            _, coded = cv2.imencode(".jpg", image[..., ::-1], options)
            image = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB))
        return image
