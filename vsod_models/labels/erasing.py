"""Regions of a label that are wrong, erased: by a list of a person, or where the maps disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import InputError
from ..files import read_json
from .maps import binary_label


def read_erase_list(file: Path) -> dict[str, list[dict[str, Any]]]:
    """`[{"frame": "bear/00012", "point": [x, y]}, {"frame": .., "box": [x0, y0, x1, y1]}, ..]`.

    A point erases the region that it lies in, a box (its last row and column left out) all that
    lies in it.  Pixels of the frame, x to the right, y down.

    Returns:
        frame -> its entries.
    """
    entries = read_json(file, "erase list")
    found: dict[str, list[dict[str, Any]]] = {}
    for n, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        keys = set(entry) if isinstance(entry, dict) else set()
        shape = {"point": 2, "box": 4}.get(next(iter(keys - {"frame"}), ""))
        place = next((entry[k] for k in keys - {"frame"}), None) if shape else None
        if (
            len(keys) != 2 or not isinstance(entry.get("frame"), str) or not isinstance(place, list)
            or len(place) != shape or not all(type(v) is int and v >= 0 for v in place)
        ):  # fmt: skip
            raise InputError(
                f'{file}: entry {n} has to be {{"frame": "sequence/name", "point": [x, y]}} or '
                f'{{"frame": .., "box": [x0, y0, x1, y1]}} in whole pixels'
            )
        found.setdefault(entry["frame"], []).append(entry)
    return found


def erase(label: np.ndarray, entry: Mapping[str, Any]) -> int:
    """Erases what an entry of an erase list names, in place; gives the number of pixels.

    Raises:
        InputError: a place outside the frame, or without any region.
    """
    height, width = label.shape
    if "point" in entry:
        x, y = entry["point"]
        if x >= width or y >= height:
            raise InputError(f"{entry['frame']}: point {[x, y]} is outside {width}x{height}")
        _, regions = cv2.connectedComponents(label.astype(np.uint8))
        wrong = (regions == regions[y, x]) & label[y, x]
    else:
        x0, y0, x1, y1 = entry["box"]
        wrong = np.zeros_like(label)
        wrong[y0:y1, x0:x1] = label[y0:y1, x0:x1]
    if not wrong.any():
        place = next(k for k in ("point", "box") if k in entry)
        raise InputError(f"{entry['frame']}: no region to erase at {place} {entry[place]}")
    label[wrong] = False
    return int(wrong.sum())


def erase_disputed(label: np.ndarray, maps: np.ndarray, agree: int) -> list[dict[str, Any]]:
    """Erases, in place, regions that fewer than `agree` maps find salient; says which.

    A map finds a region salient when its mean there is above its own Otsu threshold.
    """
    own = [binary_label(m) for m in maps]
    thresholds = [np.inf if found is None else found[1] for found in own]
    count, regions, boxes, _ = cv2.connectedComponentsWithStats(label.astype(np.uint8))
    erased = []
    for region in range(1, count):
        inside = regions == region
        votes = sum(bool(m[inside].mean() > t) for m, t in zip(maps, thresholds, strict=True))
        if votes < agree:
            x, y, width, height, pixels = (int(v) for v in boxes[region])
            label[inside] = False
            box = [x, y, x + width, y + height]
            erased.append({"by": "automatic", "box": box, "maps": votes, "pixels": pixels})
    return erased
