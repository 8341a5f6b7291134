"""What moves beside the camera: an input of MSSA, made from neighbouring frames.

Needs numpy and OpenCV and nothing of this package, so that a copy serves where there is no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

CHANNELS, STRIDE = 4, 4  # of the maps: MOTION_CHANNELS and MOTION_STRIDE of networks.contract
LEAST_SIDE = 32  # of what this preset of DIS can take: eight pixels, a quarter of the size
ROUNDS = 6  # of reweighting
SLOWEST = 0.75  # pixels: what moves less than this looks slow, however still the rest is


def neighbour(index: int, count: int) -> int:
    """Index of the frame, out of `count`, that the flow of frame `index` leads to."""
    return index + 1 if index + 1 < count else max(0, index - 1)


def clip_motion(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Each frame's motion to the next one; of the last frame, to the one before.

    Args:
        frames: (H, W, 3) uint8 RGB, all of one size.

    Returns:
        (T, 4, h, w) float32, see `motion`.
    """
    maps = [motion(f, frames[neighbour(t, len(frames))]) for t, f in enumerate(frames)]
    return np.stack(maps)


def motion(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Flow from `frame` to `other`, (H, W, 3) uint8 RGB, without the camera's part of it.

    Returns:
        (4, h, w) float32 with h = ceil(H / 4): x, y and length relative to the fastest of the
        frame, and log(1 + length in pixels) / 4.  All 0 for two equal frames.
    """
    height, width = frame.shape[:2]
    size = (-(-width // STRIDE), -(-height // STRIDE))
    if np.array_equal(frame, other):
        return np.zeros((CHANNELS, *size[::-1]), np.float32)
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (frame, other)]
    if min(height, width) < LEAST_SIDE:
        more = (0, max(0, LEAST_SIDE - height), 0, max(0, LEAST_SIDE - width))
        grey = [cv2.copyMakeBorder(g, *more, cv2.BORDER_REPLICATE) for g in grey]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    flow = dis.calc(grey[0], grey[1], None)[:height, :width]  # type: ignore[call-overload]
    rest = without_affine(cv2.resize(flow, size, interpolation=cv2.INTER_AREA))
    length = np.sqrt(np.square(rest).sum(2))
    relative = 1 / max(SLOWEST, float(np.percentile(length, 99)))
    return np.stack(
        [rest[..., 0] * relative, rest[..., 1] * relative, length * relative, np.log1p(length) / 4]
    ).clip(-2, 2)


def without_affine(flow: np.ndarray) -> np.ndarray:
    """Flow (h, w, 2) less the affine motion that most of it follows: reweighted least squares."""
    height, width = flow.shape[:2]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None]
    step = max(1, round((height * width / 600) ** 0.5))
    sample = (slice(step // 2, None, step), slice(step // 2, None, step))
    seen = flow[sample].reshape(-1, 2).astype(np.float64)
    places = np.stack(np.broadcast_arrays(np.float32(1), x, y), -1)[sample].reshape(-1, 3)
    fitted = np.median(seen, 0)
    for _ in range(ROUNDS):
        error = np.linalg.norm(seen - fitted, axis=1)
        scale = max(0.3, 1.5 * float(np.median(error)))
        weighted = places * (1 + (error / scale) ** 2)[:, None] ** -2
        affine = np.linalg.solve(weighted.T @ places + 1e-6 * np.eye(3), weighted.T @ seen)
        fitted = places @ affine
    (at, along, down) = affine.astype(np.float32)
    return flow - (at + along * x[..., None] + down * y[..., None])
