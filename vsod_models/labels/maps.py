"""Saliency maps that labels are made of: folders of any method's results, or three built in.

The built-in ones: (H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from skimage.filters import threshold_otsu

from ..data.records import Record, grey, read_as_stored
from ..errors import InputError
from ..prior.flow import FlowMagnitude, frame_prior, naming
from ..prior.motion import neighbour


def spectral_residual(image: np.ndarray, side: int = 64) -> np.ndarray:
    """What is unlike the usual 1/f spectrum of images (Hou and Zhang 2007)."""
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (side, side)).astype(np.float32)
    spectrum = np.fft.fft2(small)
    log_amplitude = np.log(np.abs(spectrum) + 1e-6).astype(np.float32)
    residual = log_amplitude - cv2.blur(log_amplitude, (3, 3), borderType=cv2.BORDER_REFLECT_101)
    saliency = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    return to_frame(cv2.GaussianBlur(saliency.astype(np.float32), (0, 0), 2.5), image)


def minimum_barrier(image: np.ndarray, side: int = 150, rounds: int = 3) -> np.ndarray:
    """How large a barrier of colour lies on the best path to the frame's border.

    Minimum barrier distance (Zhang et al. 2015), summed over the Lab channels.  Sweeps go down, up,
    right and left, a whole row or column at a time.
    """
    factor = min(1.0, side / max(image.shape[:2]))
    size = tuple(max(3, round(n * factor)) for n in image.shape[1::-1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
    colour: np.ndarray = cv2.GaussianBlur(lab, (0, 0), 1.0)
    distance = np.full_like(colour, np.inf)
    distance[[0, -1]] = distance[:, [0, -1]] = 0
    high, low = colour.copy(), colour.copy()  # along the best path to each pixel
    arrays = (colour, distance, high, low)
    for _ in range(rounds):
        before = distance.copy()
        for turned in (arrays, tuple(a.swapaxes(0, 1) for a in arrays)):
            sweep(*turned)
            sweep(*(a[::-1] for a in turned))
        if np.array_equal(before, distance):
            break
    return to_frame(distance.sum(2), image)


def sweep(colour: np.ndarray, distance: np.ndarray, high: np.ndarray, low: np.ndarray) -> None:
    """Carries paths from each row to the one below it, in place."""
    for row in range(1, len(colour)):
        above, below = high[row - 1], low[row - 1]
        highest, lowest = np.maximum(above, colour[row]), np.minimum(below, colour[row])
        better = highest - lowest < distance[row]
        distance[row] = np.where(better, highest - lowest, distance[row])
        high[row] = np.where(better, highest, high[row])
        low[row] = np.where(better, lowest, low[row])


def to_frame(saliency: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Stretched to [0, 1] and to the size of the image; a constant map becomes zero."""
    low, high = float(saliency.min()), float(saliency.max())
    scale = 1 / (high - low) if high - low > 1e-6 * max(1.0, abs(high)) else 0.0
    size = image.shape[1::-1]
    return cv2.resize(((saliency - low) * scale).astype(np.float32), size)


def flow_contrast(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Speed against the camera's motion."""
    return frame_prior(FlowMagnitude(), frame, other)


BUILT_IN = ("spectral-residual", "minimum-barrier", "flow-contrast")


def check_sources(sources: Sequence[str]) -> None:
    for source in sources:
        if source not in BUILT_IN and not Path(source).is_dir():
            raise InputError(
                f"saliency maps {source!r}: neither a folder nor one of {', '.join(BUILT_IN)}"
            )


def maps_of(frames: Sequence[Record], index: int, sources: Sequence[str]) -> np.ndarray:
    """(K, H, W) float32 in [0, 1], one map for each source, for one frame of a sequence.

    Raises:
        InputError: a map that is missing (`MissingMap`) or unreadable.
    """
    record = frames[index]
    frame, maps = record.read_image(), []
    for source in sources:
        if source == "spectral-residual":
            maps.append(spectral_residual(frame))
        elif source == "minimum-barrier":
            maps.append(minimum_barrier(frame))
        elif source == "flow-contrast":
            other = frames[neighbour(index, len(frames))]
            following = other.read_image()
            with naming(record, other):
                maps.append(flow_contrast(frame, following))
        else:
            path = Path(source) / record.sequence / f"{record.name}.png"
            if not path.is_file():
                raise MissingMap(f"{path}: no saliency map for this frame")
            picture = grey(read_as_stored(path)).astype(np.float32) / 255
            maps.append(cv2.resize(picture, frame.shape[1::-1]))
    return np.stack(maps)


class MissingMap(InputError):
    """A folder of maps lacks the one of a frame."""


SKIP = "allow_missing=True skips such frames"


def binary_label(combined: np.ndarray) -> tuple[np.ndarray, float] | None:
    """(H, W) bool and Otsu's threshold; None where the map is the same everywhere."""
    levels = np.rint(255 * np.clip(combined, 0, 1)).astype(np.uint8)
    if levels.min() == levels.max():
        return None
    threshold = int(threshold_otsu(levels))
    return levels > threshold, threshold / 255
