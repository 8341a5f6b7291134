"""What a clip shows: layers of background, and the salient objects before them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from .motion import Random, Wave, rotation, scaling, transformed, translation, wave
from .shapes import BUILDERS, Part, simple_shape
from .textures import (
    PHOTOS,
    SURFACES,
    blend,
    fill,
    mean_colour,
    noise,
    palette,
    photo_crop,
    procedural,
    texture,
)


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
