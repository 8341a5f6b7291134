"""What was erased in one frame, found again in the next one along the optical flow."""

from __future__ import annotations

import cv2
import numpy as np

from ..prior.flow import optical_flow
from .erasing import Entries

SIDE = 480  # pixels, the longer side at which the flow is computed
SAME = 0.5  # share of a region that has to come from what was erased, for it to be the same
LEAST = 0.1  # share of what was erased that has to lie in a region, to be cut from it


def back_flow(frame: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Where each pixel of the following frame comes from, (h, w, 2); both (H, W, 3) uint8 RGB."""
    return optical_flow(following, frame, SIDE)


def moved(erased: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Where pixels (H, W) bool of a frame are in the following one; flow: of `back_flow`."""
    height, width = erased.shape
    scale = np.array((width / flow.shape[1], height / flow.shape[0]), np.float32)
    flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) * scale
    y, x = np.mgrid[:height, :width].astype(np.float32)
    came = cv2.remap(erased.astype(np.uint8), x + flow[..., 0], y + flow[..., 1], cv2.INTER_NEAREST)
    return came.astype(bool)


def carried(where: np.ndarray, label: np.ndarray, frame: str, origin: str) -> Entries:
    """Entries of an erase list that erase again what was erased before; none where it is gone.

    A region that lies mostly in `where` is the same one, and goes as a whole; of a larger one, such
    as what it has grown together with, only the part goes.

    Args:
        where: (H, W) bool, from `moved`.
        label: (H, W) bool, of `frame`, before.
        frame, origin: names, `sequence/name`, of this frame and of the one it comes from.
    """
    count, regions, boxes, _ = cv2.connectedComponentsWithStats(label.astype(np.uint8))
    of = {"frame": frame, "carried": origin}
    found: Entries = []
    overlaps = np.bincount(regions[where], minlength=count)
    for region in range(1, count):
        overlap, (left, top, width, height, pixels) = overlaps[region], boxes[region]
        part = np.s_[top : top + height, left : left + width]
        inside = regions[part] == region
        if overlap > SAME * pixels:
            depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L1, 3)
            y, x = np.unravel_index(int(depth.argmax()), depth.shape)
            found.append({**of, "point": [int(x + left), int(y + top)]})
        elif overlap > LEAST * where.sum():
            outlines, _ = cv2.findContours(
                (inside & where[part]).astype(np.uint8),
                cv2.RETR_EXTERNAL,
                cv2.CHAIN_APPROX_SIMPLE,
                offset=(int(left), int(top)),
            )
            for outline in outlines:
                if len(outline) >= 3:
                    polygon = [[int(v) for v in at] for at in outline[:, 0]]
                    found.append({**of, "polygon": polygon})
    return found
