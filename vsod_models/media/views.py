"""What a prediction is shown as.

Each view is made of a frame (H, W, 3) uint8, its saliency (H, W) in [0, 1] and a background colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..errors import InputError
from .planes import Planes
from .reading import PathLike


def mask(frame: np.ndarray, saliency: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """(H, W): the saliency itself, 0 to 255."""
    return np.rint(saliency * 255).astype(np.uint8)


def overlay(frame: np.ndarray, saliency: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """(H, W, 3): the frame, tinted by half where it is salient, with the contour at 0.5."""
    made = frame.copy()
    x, y, wide, high = _seen(saliency)
    part = np.s_[y : y + high, x : x + wide]
    if wide:
        made[part] = _over(frame[part], TINT, 1 - saliency[part] / 2)
    width = _contour_width(frame.shape)
    return cv2.drawContours(made, _contours(saliency), -1, TINT, width, cv2.LINE_AA)


def overlay_on(planes: Planes, saliency: np.ndarray) -> None:
    """Draws the overlay on the planes of a frame, of even sides."""
    x, y, wide, high = _seen(saliency)
    if not wide:
        return
    width = _contour_width(saliency.shape)
    left, top = (max(0, n - width - 2) // 2 for n in (x, y))  # with what the line needs, in pairs
    right, bottom = (
        min(n + width + 3, most) // 2
        for n, most in zip((x + wide, y + high), saliency.shape[::-1], strict=True)
    )
    part = saliency[2 * top : 2 * bottom, 2 * left : 2 * right]
    line = np.zeros(part.shape, np.uint8)
    cv2.drawContours(line, _contours(part), -1, 255, width, cv2.LINE_AA)
    share = cv2.multiply(1 - part / 2, cv2.bitwise_not(line), scale=1 / 255, dtype=cv2.CV_32F)
    shares = [share] + [
        cv2.resize(share, (right - left, bottom - top), None, 0, 0, cv2.INTER_AREA)
    ] * 2
    for plane, level, kept in zip(planes.arrays, planes.colour(TINT), shares, strict=True):
        size = plane.shape[0] // (saliency.shape[0] // 2)  # 2 of the brightness, 1 of the colours
        box = plane[size * top : size * bottom, size * left : size * right]
        box[:] = cv2.blendLinear(box, np.full_like(box, level), kept, 1 - kept)


def _seen(saliency: np.ndarray) -> Sequence[int]:
    """x, y, width and height of what is seen of a tint by half: less changes no grey level."""
    return cv2.boundingRect((saliency > 1 / 512).view(np.uint8))


def _contours(saliency: np.ndarray) -> Sequence[np.ndarray]:
    inside = (saliency >= 0.5).view(np.uint8)
    return cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]


def _contour_width(shape: Sequence[int]) -> int:
    return max(1, round(min(shape[:2]) / 240))


def matte(frame: np.ndarray, saliency: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """(H, W, 4): the frame with the saliency as its (straight) alpha."""
    return np.dstack([frame, mask(frame, saliency, background)])


def cutout(frame: np.ndarray, saliency: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """(H, W, 3): the frame over a plain colour, mixed by the saliency."""
    return _over(frame, background, saliency)


def _over(frame: np.ndarray, colour: Sequence[int], share: np.ndarray) -> np.ndarray:
    """The frame with its share (H, W), over a plain colour with the rest."""
    plain = np.empty_like(frame)
    plain[:] = np.tile(np.array(colour, np.uint8), (frame.shape[1], 1))  # rows, not pixels
    return cv2.blendLinear(frame, plain, share, 1 - share)


def side_by_side(frame: np.ndarray, saliency: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """(H, 2 W, 3): the frame, and right of it the mask."""
    return np.hstack([frame, cv2.cvtColor(mask(frame, saliency, background), cv2.COLOR_GRAY2RGB)])


TINT = (255, 64, 64)
VIEWS = {
    "mask": mask,
    "overlay": overlay,
    "matte": matte,
    "cutout": cutout,
    "side-by-side": side_by_side,
}


def default_view(output: PathLike | None) -> str:
    """overlay for .mp4, .gif, "-" and None (a window), matte for .webm and .mov, else mask."""
    if output is None or output == "-":
        return "overlay"
    ending = Path(output).suffix.lower()
    return {".mp4": "overlay", ".gif": "overlay", ".webm": "matte", ".mov": "matte"}.get(
        ending, "mask"
    )


def check_view(view: str | None, output: PathLike | None) -> str:
    """The view to write; raises InputError for an unknown one and for alpha that cannot be."""
    view = view or default_view(output)
    if view not in VIEWS:
        raise InputError(f"view must be one of {', '.join(VIEWS)}, got {view}")
    if view == "matte" and output is not None:
        kind = "MPEG-TS" if output == "-" else Path(output).suffix.lower()
        if kind in ("MPEG-TS", ".mp4"):
            raise InputError(
                f"{output}: {kind} has no alpha; write a .mov or .webm, or take view='cutout'"
            )
    return view
