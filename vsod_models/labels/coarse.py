"""Coarse labels of MSST-ConvLSTM: masks for frames that nobody drew any for.

    several saliency maps of a frame -> weighted sum -> Otsu's threshold -> binary label
      -> a person erases regions that are wrong (a list, see `read_erase_list`); or, weaker,
         regions that too few of the maps agree on are erased automatically

Maps are folders of any methods' results, or the three built in that need no training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.optimize import nnls

from ..data.records import Record, Records
from ..errors import InputError
from ..files import inside, read_json, whole_folder, write_png
from .erasing import correct, erase_disputed, looked_over, mark_of, read_erase_list
from .maps import BUILT_IN, SKIP, MissingMap, binary_label, check_sources, maps_of

MANIFEST = "manifest.json"


def fit_weights(
    records: Records,
    sources: Sequence[str],
    frames: int = 200,
    *,
    allow_missing: bool = False,
    on_frame: Callable[[], object] = lambda: None,
) -> list[float]:
    """Weights that bring the maps closest to the ground truth, in least squares.

    None is negative and they sum to one.  Means are removed, since Otsu's threshold ignores them.

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


def make_labels(
    records: Records,
    out: str | Path,
    sources: Sequence[str] = BUILT_IN,
    weights: Sequence[float] | None = None,
    *,
    unlabelled: bool = False,
    count: int | None = None,
    erase_list: str | Path | None = None,
    only_looked_over: bool = False,
    auto_erase: bool = False,
    agree: int | None = None,
    allow_missing: bool = False,
    on_frame: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Writes `out/<sequence>/<name>.png` (0 and 255) for each frame, and `out/manifest.json`.

    A frame gets no label, and a reason in the manifest, when its maps say nothing (a constant sum
    has no Otsu threshold) or all of it was erased.

    Args:
        records: frames to label; their ground truth is ignored.
        out: folder, new or empty; written whole or not at all.
        sources: folders with `<sequence>/<name>.png`, or names of the built-in maps.
        weights: one for each source, none negative; None: all the same.
        unlabelled: only frames without ground truth.
        count: only so many of the frames, spread evenly over them; all where there are fewer.
        erase_list: JSON file, see `read_erase_list`.
        only_looked_over: label only frames that it marks or corrects.
        auto_erase: erase regions that fewer than `agree` maps find salient; None: at most half.
        allow_missing: a frame without one of its maps is skipped.
        on_frame: called after each frame.

    Returns:
        The manifest.

    Raises:
        InputError: sources, weights or an erase list that do not fit; a missing map; nothing
            salient in any frame.
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
    names = [f"{r.sequence}/{r.name}" for r in records if not (unlabelled and r.mask is not None)]
    if count is not None and count < 1:
        raise InputError(f"count is {count}; it has to be at least 1")
    if count is not None and names:
        spread = np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)
        names = [names[i] for i in spread]
    wanted = set(names)
    if unknown := sorted(set(to_erase) - wanted):
        raise InputError(
            f"{erase_list}: no frame {unknown[0]} to label here ({len(unknown)} such entries)"
        )
    if only_looked_over:
        if erase_list is None:
            raise InputError("only_looked_over needs an erase list, which says what was")
        wanted = {name for name in wanted if looked_over(to_erase.get(name, []))}
        if not wanted:
            raise InputError(f"{erase_list}: no frame was looked over")
    if unlabelled and not wanted:
        raise InputError(f"{records.dataset} {records.split}: every frame has ground truth")

    labelled: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with _new_folder(out) as part:
        for name, frames, i in _frames(records):
            if name not in wanted:
                on_frame()
                continue
            entries = to_erase.get(name, [])
            if mark_of(entries) == "skip":
                skipped[name] = "skipped by a person"
                on_frame()
                continue
            try:
                maps = maps_of(frames, i, sources)
            except MissingMap as error:
                if not allow_missing:
                    raise InputError(f"{error} ({SKIP})") from None
                if any("mark" not in entry for entry in entries):
                    raise InputError(f"{erase_list}: frame {name} has no label: {error}") from None
                skipped[name] = f"map missing: {error}"
                on_frame()
                continue
            found = binary_label(np.tensordot(share, maps, 1))
            base: np.ndarray = np.zeros(maps.shape[1:], bool)
            threshold: float | None = None
            if found is not None:
                base, threshold = found
            elif not any("add" in entry for entry in entries):
                if any("mark" not in entry for entry in entries):
                    raise InputError(f"{erase_list}: frame {name} has no label to erase from")
                skipped[name] = "the maps are the same everywhere"
                on_frame()
                continue
            label = base.copy()
            erased: list[dict[str, Any]] = []
            for entry in entries:
                try:
                    pixels = correct(label, base, entry)
                except InputError as error:
                    raise InputError(f"{erase_list}: {error}") from None
                if "mark" not in entry:
                    place = {k: v for k, v in entry.items() if k not in ("frame", "step")}
                    erased.append({"by": "person", **place, "pixels": pixels})
            if auto_erase:
                erased += erase_disputed(label, maps, agree)
            if label.any():
                file = inside(part, frames[i].sequence, f"{frames[i].name}.png")
                write_png(file, 255 * label.astype(np.uint8))
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
    manifest = read_json(file, "manifest of `vsod label coarse`")
    try:
        labelled, skipped = set(manifest["frames"]), set(manifest["skipped"])
    except (KeyError, TypeError):
        raise InputError(f"{file}: not a manifest of `vsod label coarse`") from None
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
