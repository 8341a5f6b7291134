"""Synthetic clips: textured objects that move over a moving background, with exact masks.

A clip is a function of (seed, split, index) and the frame size alone, and its frame t of nothing
else, so clips need no disk and a longer clip begins with the shorter one.  Lengths below are in
units of the frame's geometric mean side, speeds in units per frame.

    background layers (pan, zoom, rotation, parallax; distractors are part of them)
    -> for each object: shadow, then its parts (textured polygons that swing about joints)
    -> occluders -> light, blur, noise, JPEG

What moves with the background is not salient, however it looks; what moves on its own is.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import cv2
import numpy as np

from ...errors import InputError
from ..records import Record, Records
from .motion import Random, rotation, scaling, transformed, translation, wave
from .scenes import Layer, Thing, build_background, build_thing_in
from .shapes import superellipse
from .textures import blend, fill, mean_colour, palette, texture, warp

SPLITS = ("train", "val", "test")
FRAMES = 24


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
