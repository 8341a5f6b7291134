"""Flicker: how much masks change from frame to frame beyond what moved.

The mask of frame t + 1 is brought back to frame t along the optical flow of the frames; flicker is
the mean absolute difference to the mask of frame t, in [0, 1], over the pixels whose way stays
inside the picture.  Flow has errors at the edges of objects, so that masks without fault have
some, too: the ground truth's own is what to compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from ..data.records import Records
from ..errors import InputError
from .evaluator import Flicker, read_prediction, resized


def flicker_of_folder(
    predictions: Path,
    records: Records,
    advance: Callable[..., object] = lambda completed, total: None,
) -> Flicker:
    """Over all pairs of neighbouring frames that have predictions and ground truth.

    predictions: a folder of `<sequence>/<frame>.png`.
    Raises InputError where there is no such pair.
    """
    ours: list[float] = []
    truths: list[float] = []
    pairs = 0
    for done, (sequence, frames) in enumerate(records.sequences.items(), start=1):
        changes: list[tuple[float, float]] = []
        for first, second in itertools.pairwise(frames):
            paths = [predictions / sequence / f"{record.name}.png" for record in (first, second)]
            masks = [record.read_mask() for record in (first, second)]
            if masks[0] is None or masks[1] is None or not all(p.is_file() for p in paths):
                continue
            if second.frame != first.frame + 1:
                continue
            maps = [
                resized(read_prediction(path), mask.shape)
                for path, mask in zip(paths, masks, strict=True)
                if mask is not None
            ]
            flow = flow_between(first.read_image(), second.read_image(), masks[0].shape)
            changes.append(
                (change(maps[0] / 255, maps[1] / 255, flow), change(masks[0], masks[1], flow))
            )
        if changes:
            pairs += len(changes)
            ours.append(float(np.mean([a for a, _ in changes])))
            truths.append(float(np.mean([b for _, b in changes])))
        advance(completed=done, total=len(records.sequences))
    if not pairs:
        raise InputError(f"{predictions}: no two neighbouring frames with ground truth to compare")
    return Flicker(float(np.mean(ours)), float(np.mean(truths)), pairs)


def flow_between(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Optical flow (h, w, 2) in pixels of `shape` from one frame (H, W, 3) to the next (DIS)."""
    small = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (shape[1], shape[0]))
        for frame in (first, second)
    ]
    flow = np.zeros((*shape, 2), np.float32)
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(
        small[0], small[1], flow
    )


def change(first: np.ndarray, second: np.ndarray, flow: np.ndarray) -> float:
    """Mean |first - second brought back along the flow|; maps (h, w) in [0, 1]."""
    height, width = first.shape
    x = flow[:, :, 0] + np.arange(width, dtype=np.float32)
    y = flow[:, :, 1] + np.arange(height, dtype=np.float32)[:, None]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = cv2.remap(second.astype(np.float32), x, y, cv2.INTER_LINEAR)
    return float(np.abs(back - first)[inside].mean()) if inside.any() else 0.0
