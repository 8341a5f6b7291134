"""Optical flow, and the motion prior that is its magnitude: a substitute without training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from ..data.records import Record
from ..errors import InputError

FLOW_MAGNITUDE = "flow-magnitude"

VERSION = 1  # part of every cache key: raised when the same settings come to give other maps
LEAST_SIDE = 16  # DIS needs 12 pixels


class PriorSource(Protocol):
    """A source of motion priors."""

    side: int  # longer side of the frames that it works on

    def to(self, device: torch.device | str) -> PriorSource:
        """Moves its computation there; returns itself."""

    def key(self) -> str:
        """Of the cache: differs wherever the maps could differ."""

    def from_flow(self, flow: np.ndarray) -> np.ndarray:
        """flow (h, w, 2) float32, pixels per frame -> float32 in [0, 1], that size or smaller."""


def optical_flow(frame: np.ndarray, other: np.ndarray, side: int) -> np.ndarray:
    """DIS flow (Kroeger et al. 2016) from `frame` to `other`, (H, W, 3) uint8 of one size.

    Returns:
        (h, w, 2) float32, x and y in pixels of the size it is computed at: longer side at most
        `side`, no side below 16.

    Raises:
        InputError: frames of two sizes.
    """
    if frame.shape != other.shape:
        sizes = [f"{f.shape[1]}x{f.shape[0]}" for f in (frame, other)]
        raise InputError(
            f"optical flow needs two frames of one size, got {sizes[0]} and {sizes[1]}"
        )
    size = working_size(frame.shape[:2], side)
    first, second = (
        cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), size[::-1], interpolation=cv2.INTER_AREA)
        for f in (frame, other)
    )
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return dis.calc(first, second, None)  # type: ignore[call-overload]


def working_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """(H, W) scaled down to a longer side of `side`, but no side below 16."""
    factor = min(1.0, side / max(size))
    height, width = (max(LEAST_SIDE, round(n * factor)) for n in size)
    return height, width


def without_camera(flow: np.ndarray) -> np.ndarray:
    """Flow less the shift, turn and zoom that most of the frame follows (RANSAC), (h, w, 2)."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    places = np.stack([x, y], -1)
    step = max(1, round((height * width / 1500) ** 0.5))
    sample = (slice(step // 2, None, step), slice(step // 2, None, step))
    matrix, _ = cv2.estimateAffinePartial2D(
        places[sample].reshape(-1, 2), (places + flow)[sample].reshape(-1, 2),
        method=cv2.RANSAC, ransacReprojThreshold=1.0,
    )  # fmt: skip
    if matrix is None or not np.isfinite(matrix).all():
        return flow - np.median(flow, axis=(0, 1))
    camera = places @ matrix[:, :2].T + matrix[:, 2] - places
    return (flow - camera).astype(np.float32)


def top_speed(speed: np.ndarray) -> float:
    """The 99th percentile, at least a pixel: the noise of a still clip stays dark."""
    return max(1.0, float(np.percentile(speed, 99)))


def flow_image(flow: np.ndarray) -> np.ndarray:
    """(h, w, 2) -> (h, w, 3) uint8 RGB: hue is the direction, saturation the speed."""
    speed, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
    hsv = np.full((*speed.shape, 3), 255, np.uint8)
    hsv[..., 0] = angle * (90 / np.pi)  # OpenCV's hues are 0..179
    hsv[..., 1] = np.clip(255 * speed / top_speed(speed), 0, 255)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class FlowMagnitude:
    """A substitute for the paper's prior that needs no training: speed beside the camera's motion.

    The flow's magnitude less the camera's shift, turn and zoom, over its 99th percentile.
    """

    def __init__(self, side: int = 480):
        self.side = side

    def to(self, device: torch.device | str) -> FlowMagnitude:
        """Returns itself: it computes on the CPU alone."""
        return self

    def key(self) -> str:
        return hash_of({"prior": FLOW_MAGNITUDE, "side": self.side}, ())

    def from_flow(self, flow: np.ndarray) -> np.ndarray:
        speed = np.linalg.norm(without_camera(flow), axis=2)
        return np.clip(speed / top_speed(speed), 0, 1)


def hash_of(settings: dict, tensors: Iterable[Tensor]) -> str:
    text = json.dumps({"version": VERSION, **settings}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def frame_prior(source: PriorSource, frame: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """Prior of a frame, from its flow to the next one; of the last frame, to the one before.

    A single frame is its own neighbour: nothing moves.  `partial(frame_prior, source)` is
    what :class:`vsod_models.prediction.VideoPredictor` takes.

    Args:
        frame, neighbour: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float32 in [0, 1].
    """
    small = source.from_flow(optical_flow(frame, neighbour, source.side))
    return cv2.resize(small, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR).clip(0, 1)


@contextlib.contextmanager
def naming(record: Record, other: Record) -> Iterator[None]:
    """Prefixes the message of an InputError with the two frames."""
    try:
        yield
    except InputError as error:
        both = f"{record.name} and {other.name}"
        raise InputError(f"sequence {record.sequence}, frames {both}: {error}") from None
