"""Labels corrected: by a list of a person, or where the maps disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import InputError
from ..files import read_json, whole_file
from .maps import binary_label

MARKS = ("all right", "skip", "open")
FORMS = (
    'has to be {"frame": "sequence/name"} with one of "point": [x, y], "box": [x0, y0, x1, y1], '
    '"polygon": [[x, y], ..], "brush": [[x, y], ..] and "radius": r, in whole pixels, or '
    f'"mark": one of {", ".join(MARKS)}'
)
FAR = 100_000  # pixels: no place lies further from a frame
WIDEST = 1000  # pixels: radius of a brush
Entries = list[dict[str, Any]]


def read_erase_list(file: Path) -> dict[str, Entries]:
    """A list of what a person found wrong in labels, in the order in which it was found.

    `[{"frame": "bear/00012", "point": [x, y]}, {"frame": .., "box": [x0, y0, x1, y1]}, ..]`

    Pixels of the frame, x to the right, y down.  An entry erases

    - `point`: the region that it lies in;
    - `box`: all in it, its last row and column left out;
    - `polygon`, `[[x, y], ..]`: all in it, its outline too;
    - `brush`, `[[x, y], ..]` with `radius`: all within so many pixels of the path;

    or, with `"add": true`, adds that to the label; a point then brings back the region that was
    erased there.  `"mark": "skip"` takes the frame out, `"all right"` says that a person looked at
    it, `"open"` that it is to be looked at again; the last mark counts.  `step`, a number that the
    entries of one action share, and `carried`, the frame that an entry was carried on from, say
    how an entry came to be and change nothing.

    Returns:
        frame -> its entries.
    """
    found: dict[str, Entries] = {}
    for entry in as_entries(read_json(file, "erase list"), str(file)):
        found.setdefault(entry["frame"], []).append(entry)
    return found


def as_entries(parsed: Any, name: str) -> Entries:
    """The entries of an erase list, as JSON gives it; InputError naming the file and the entry."""
    entries = parsed if isinstance(parsed, list) else [parsed]
    for n, entry in enumerate(entries):
        if not is_entry(entry):
            raise InputError(f"{name}: entry {n} {FORMS}")
    return entries


def write_entries(file: Path, entries: Entries) -> bytes:
    """Writes an erase list, one entry a line; gives what was written."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    data = f"[\n{lines}\n]\n".encode()
    with whole_file(file) as part:
        part.write_bytes(data)
    return data


def is_entry(entry: Any) -> bool:
    """Whether it has the form of an entry."""
    if not isinstance(entry, dict) or not isinstance(entry.get("frame"), str):
        return False
    if type(entry.get("step", 0)) is not int or not isinstance(entry.get("carried", ""), str):
        return False
    rest = {key: entry[key] for key in entry if key not in ("frame", "step", "carried")}
    if "mark" in rest:
        return len(rest) == 1 and rest["mark"] in MARKS
    if rest.pop("add", True) is not True:
        return False
    if "brush" in rest:
        radius = rest.pop("radius", None)
        if type(radius) is not int or not 1 <= radius <= WIDEST:
            return False
    if len(rest) != 1:
        return False
    ((kind, place),) = rest.items()
    if not isinstance(place, list):
        return False
    if kind in ("point", "box"):
        numbers = len(place) == {"point": 2, "box": 4}[kind]
        return numbers and all(type(v) is int and 0 <= v <= FAR for v in place)
    if kind in ("polygon", "brush"):
        enough = len(place) >= {"polygon": 3, "brush": 1}[kind]
        return (
            enough
            and all(isinstance(at, list) and len(at) == 2 for at in place)
            and all(type(v) is int and abs(v) <= FAR for at in place for v in at)
        )
    return False


def mark_of(entries: Entries) -> str:
    """The last mark of a frame; "open" where there is none."""
    return next((entry["mark"] for entry in reversed(entries) if "mark" in entry), "open")


def looked_over(entries: Entries) -> bool:
    """Whether a person marked or corrected the frame; what was carried on to it does not count."""
    if any("mark" in entry for entry in entries):
        return mark_of(entries) != "open"
    return any("carried" not in entry for entry in entries)


def correct(label: np.ndarray, base: np.ndarray, entry: Mapping[str, Any]) -> int:
    """Does what an entry of an erase list says, in place; gives the number of pixels it changed.

    label: (H, W) bool, as the entries before this one left it.  base: as it was before all.

    Raises:
        InputError: a place outside the frame, or where there is nothing to change.
    """
    if "mark" in entry:
        return 0
    kind = next(key for key in ("point", "box", "polygon", "brush") if key in entry)
    add = "add" in entry
    inside = _place(label, base, entry, kind)
    changed = inside & (label ^ add)
    if not changed.any():
        shown = entry[kind] if kind in ("point", "box") else f"of {len(entry[kind])} points"
        what = "nothing to add at" if add else "no region to erase at"
        raise InputError(f"{entry['frame']}: {what} {kind} {shown}")
    label[changed] = add
    return int(changed.sum())


def _place(label: np.ndarray, base: np.ndarray, entry: Mapping[str, Any], kind: str) -> np.ndarray:
    """(H, W) bool."""
    height, width = label.shape
    if kind == "point":
        x, y = entry["point"]
        if x >= width or y >= height:
            raise InputError(f"{entry['frame']}: point {[x, y]} is outside {width}x{height}")
        parts = base & ~label if "add" in entry else label
        _, regions = cv2.connectedComponents(parts.astype(np.uint8))
        return (regions == regions[y, x]) & parts[y, x]
    inside = np.zeros(label.shape, np.uint8)
    if kind == "box":
        x0, y0, x1, y1 = entry["box"]
        if not (x0 < x1 <= width and y0 < y1 <= height):
            raise InputError(
                f"{entry['frame']}: box {entry['box']} is empty or not inside {width}x{height}"
            )
        inside[y0:y1, x0:x1] = 1
    elif kind == "polygon":
        cv2.fillPoly(inside, [np.array(entry["polygon"], np.int32)], 1)
    else:
        radius, path = entry["radius"], np.array(entry["brush"], np.int32)
        low, high = path.min(0) - radius - 1, path.max(0) + radius + 2
        x0, y0 = np.clip(low, 0, (width, height))
        x1, y1 = np.clip(high, 0, (width, height))
        if x0 < x1 and y0 < y1:
            # Wider by the radius on all sides: the path may lie outside of the frame.
            drawn = np.ones((y1 - y0 + 2 * radius, x1 - x0 + 2 * radius), np.uint8)
            path = path - (x0 - radius, y0 - radius)
            cv2.polylines(drawn, [np.concatenate([path, path[-1:]])], False, 0)  # a dab, too
            far = cv2.distanceTransform(drawn, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            near = far[radius : radius + y1 - y0, radius : radius + x1 - x0] <= radius
            inside[y0:y1, x0:x1] = near
    return inside.astype(bool)


def corrected(base: np.ndarray, entries: Entries) -> np.ndarray:
    """The label (H, W) bool after all entries of its frame; `base` is as it was before."""
    label = base.copy()
    for entry in entries:
        correct(label, base, entry)
    return label


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
