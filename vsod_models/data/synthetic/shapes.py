"""Outlines, and objects built of them.

Outlines are closed, (K, 2) and about one unit in radius; objects are parts that move together, in
object coordinates (y down).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .motion import Random, Wave, rotation, translation, wave


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
