"""Smooth motion and the 3x3 matrices of the plane."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Random: TypeAlias = np.random.Generator


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
    """Two sines within +-amplitude, never faster than `speed` per frame."""
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
