"""Coarse labels of MSST-ConvLSTM: masks for frames that nobody drew any for.

    several saliency maps of a frame -> weighted sum -> Otsu's threshold -> binary label
      -> a person erases regions that are wrong (a list of points and boxes); or, weaker, regions
         that too few of the maps agree on are erased automatically

Maps are folders of any methods' results, or the three built in that need no training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.optimize import nnls
from skimage.filters import threshold_otsu

from ..data.records import Record, Records, grey, read_as_stored
from ..errors import InputError
from ..files import whole_folder, write_png
from ..prior.flow import FlowMagnitude, frame_prior, naming, neighbour

MANIFEST = "manifest.json"

# ---- saliency without training: (H, W, 3) uint8 RGB -> (H, W) float32 in [0, 1]


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


# ---- the maps of a frame


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
    """A folder of maps has none for a frame."""


SKIP = "--allow-missing skips such frames"


def fit_weights(
    records: Records,
    sources: Sequence[str],
    frames: int = 200,
    *,
    allow_missing: bool = False,
    on_frame: Callable[[], object] = lambda: None,
) -> list[float]:
    """Weights with which the maps come closest to the ground truth, in least squares.

    None is negative, they sum to one.  The mean is left out: Otsu's threshold does not mind it.

    Args:
        frames: how many to fit on, spread evenly over those with ground truth.
        allow_missing: a frame without one of its maps is left out.
    """
    labelled = [
        (sequence, i)
        for sequence in records.sequences.values()
        for i, record in enumerate(sequence)
        if record.mask is not None
    ]
    if not labelled:
        raise InputError(f"{records.dataset} {records.split}: no ground truth to fit weights on")
    chosen = np.linspace(0, len(labelled) - 1, min(frames, len(labelled))).round().astype(int)
    columns, targets = [], []
    for sequence, i in (labelled[n] for n in np.unique(chosen)):
        on_frame()
        try:
            maps = maps_of(sequence, i, sources)
        except MissingMap as error:
            if not allow_missing:
                raise InputError(f"{error} ({SKIP})") from None
            continue
        mask = sequence[i].read_mask()
        assert mask is not None
        small = [cv2.resize(m, (64, 64), interpolation=cv2.INTER_AREA)
                 for m in (*maps, mask.astype(np.float32))]  # fmt: skip
        columns.append(np.stack(small[:-1], -1).reshape(-1, len(sources)))
        targets.append(small[-1].ravel())
    if not columns:
        raise InputError(
            f"{records.dataset} {records.split}: no frame with ground truth has all of its maps"
        )
    x, y = np.concatenate(columns).astype(np.float64), np.concatenate(targets).astype(np.float64)
    weights, _ = nnls(x - x.mean(0), y - y.mean())
    if weights.sum() <= 0:
        raise InputError(f"none of the maps ({', '.join(sources)}) agrees with the ground truth")
    return [float(w) for w in weights / weights.sum()]


# ---- labels


def binary_label(combined: np.ndarray) -> tuple[np.ndarray, float] | None:
    """(H, W) bool and Otsu's threshold; None where the map is the same everywhere."""
    levels = np.rint(255 * np.clip(combined, 0, 1)).astype(np.uint8)
    if levels.min() == levels.max():
        return None
    threshold = int(threshold_otsu(levels))
    return levels > threshold, threshold / 255


def read_erase_list(file: Path) -> dict[str, list[dict[str, Any]]]:
    """`[{"frame": "bear/00012", "point": [x, y]}, {"frame": .., "box": [x0, y0, x1, y1]}, ..]`.

    A point erases the region that it lies in, a box (its last row and column left out) all that
    lies in it.  Pixels of the frame, x to the right, y down.

    Returns:
        frame -> its entries.
    """
    try:
        entries = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file}: no such erase list") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not JSON ({error})") from None
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


def make_labels(
    records: Records,
    out: str | Path,
    sources: Sequence[str] = BUILT_IN,
    weights: Sequence[float] | None = None,
    *,
    unlabelled: bool = False,
    erase_list: str | Path | None = None,
    auto_erase: bool = False,
    agree: int | None = None,
    allow_missing: bool = False,
    on_frame: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Writes `out/<sequence>/<name>.png` (0 and 255) for each frame, and `out/manifest.json`.

    A frame gets no label, and a reason in the manifest, when its maps say nothing (a constant sum
    has no Otsu threshold) or all of it was erased.

    Args:
        records: frames to label; their ground truth is not looked at.
        out: folder, new or empty; written whole or not at all.
        sources: folders with `<sequence>/<name>.png`, or names of the built-in maps.
        weights: one for each source, none negative; None: all the same.
        unlabelled: only frames without ground truth.
        erase_list: JSON file, see `read_erase_list`.
        auto_erase: erase regions that fewer than `agree` maps find salient; None: at most half.
        allow_missing: a frame without one of its maps is skipped.
        on_frame: called after each frame.

    Returns:
        The manifest.

    Raises:
        InputError: sources, weights or an erase list that do not fit; a missing map; no frame of
            all with anything salient.
    """
    check_sources(sources)
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources) or min(weights) < 0 or not 0 < sum(weights) < np.inf:
        raise InputError(
            f"weights {weights} have to be {len(sources)} numbers, one for each source, none "
            "negative and not all zero"
        )
    share = np.asarray(weights, np.float32) / sum(weights)
    if agree is not None and not auto_erase:
        raise InputError("agree is for auto_erase, which is off")
    agree = len(sources) // 2 + 1 if agree is None else agree
    if not 1 <= agree <= len(sources):
        raise InputError(f"agree is {agree}; there are 1 to {len(sources)} maps to agree")
    to_erase = read_erase_list(Path(erase_list)) if erase_list is not None else {}
    wanted = {f"{r.sequence}/{r.name}" for r in records if not (unlabelled and r.mask is not None)}
    if unknown := sorted(set(to_erase) - wanted):
        raise InputError(
            f"{erase_list}: no frame {unknown[0]} to label here ({len(unknown)} such entries)"
        )
    if unlabelled and not wanted:
        raise InputError(f"{records.dataset} {records.split}: every frame has ground truth")

    labelled: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with _new_folder(out) as part:
        for name, frames, i in _frames(records):
            if name not in wanted:
                on_frame()
                continue
            try:
                maps = maps_of(frames, i, sources)
            except MissingMap as error:
                if not allow_missing:
                    raise InputError(f"{error} ({SKIP})") from None
                skipped[name] = f"map missing: {error}"
                on_frame()
                continue
            found = binary_label(np.tensordot(share, maps, 1))
            if found is None:
                if name in to_erase:
                    raise InputError(f"{erase_list}: frame {name} has no label to erase from")
                skipped[name] = "the maps are the same everywhere"
                on_frame()
                continue
            label, threshold = found
            erased: list[dict[str, Any]] = []
            for entry in to_erase.get(name, []):
                place = {k: v for k, v in entry.items() if k != "frame"}
                try:
                    pixels = erase(label, entry)
                except InputError as error:
                    raise InputError(f"{erase_list}: {error}") from None
                erased.append({"by": "person", **place, "pixels": pixels})
            if auto_erase:
                erased += erase_disputed(label, maps, agree)
            if label.any():
                write_png(part / f"{name}.png", 255 * label.astype(np.uint8))
                salient = round(float(label.mean()), 4)
                labelled[name] = {"threshold": threshold, "salient": salient, "erased": erased}
            else:
                skipped[name] = "all of it was erased"
            on_frame()
        if not labelled:
            reason = next(iter(skipped.values()), "there are no frames")
            raise InputError(f"{out}: no frame gets a label; of the first: {reason}")
        manifest = {
            "dataset": records.dataset,
            "split": records.split,
            "sources": list(sources),
            "weights": [round(float(w), 4) for w in share],
            "auto_erase": agree if auto_erase else None,
            "frames": labelled,
            "skipped": skipped,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _new_folder(out: str | Path) -> Any:
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder")
    return whole_folder(path)


def _frames(records: Records) -> Iterator[tuple[str, Sequence[Record], int]]:
    for sequence, frames in records.sequences.items():
        for i, record in enumerate(frames):
            yield f"{sequence}/{record.name}", frames, i


def with_coarse_labels(records: Records, folder: str | Path) -> Records:
    """The records with the labels of `make_labels` in place of their ground truth, marked coarse.

    Frames that its manifest skips have no mask then; frames that it does not name keep theirs.

    Raises:
        InputError: no manifest in the folder, or one that names none of the frames.
    """
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        labelled, skipped = set(manifest["frames"]), set(manifest["skipped"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"{file}: no manifest of `vsod label coarse`") from None
    done, used = [], 0
    for record in records:
        name = f"{record.sequence}/{record.name}"
        if name in labelled:
            path = Path(folder) / f"{name}.png"
            record = replace(record, mask=path, foreground=None, label="coarse")
            used += 1
        elif name in skipped:
            record = replace(record, mask=None, foreground=None, label="coarse")
        done.append(record)
    if not used:
        raise InputError(f"{file}: has no label for any frame of {records.dataset} {records.split}")
    return Records(records.dataset, records.split, done)
