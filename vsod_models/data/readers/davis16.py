"""DAVIS-2016 in its official layout, and any folder in the same layout.

JPEGImages/480p/<sequence>/<frame>.jpg
Annotations/480p/<sequence>/<frame>.png
ImageSets/480p/<split>.txt     "/JPEGImages/... /Annotations/..." a line, or sequence names

The splits msst-train and msst-val of DAVIS-2016 are lists of this package.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import InputError
from ...files import is_plain, need_file
from ..records import Records, grey
from .folders import (
    Counts,
    OnProblem,
    fail,
    folders,
    gathered,
    need_folder,
    pictures,
    sequence_records,
    shipped_list,
)  # fmt: skip

SPLITS = ("train", "val")
COUNTS = {"train": Counts(30, 2079, 2079), "val": Counts(20, 1376, 1376)}


def foreground(picture: np.ndarray) -> np.ndarray:
    """Object ids of a palette (DAVIS-2017) or {0, 255}; alpha (bear/00077) is dropped."""
    return grey(picture) > 0


def open_davis16(
    root: Path, split: str, *, resolution: str = "480p", on_problem: OnProblem = fail
) -> Records:
    """A split by its list file; "all" is every sequence.  Each frame needs its mask.

    msst-train, msst-val: the halves, 25 sequences each, that stand for those of MSST-ConvLSTM's
    training and evaluation, which the paper does not name; see docs/reproduction.md.
    """
    return _open("davis16", root, split, resolution, True, on_problem)


def open_folder(
    root: Path, split: str, *, resolution: str = "480p", on_problem: OnProblem = fail
) -> Records:
    """The same layout, with masks for some frames only."""
    return _open("folder", root, split, resolution, False, on_problem)


def _open(
    dataset: str,
    root: Path,
    split: str,
    resolution: str,
    every_frame: bool,
    on_problem: OnProblem,
) -> Records:
    images = need_folder(root / "JPEGImages" / resolution, "<sequence>/<frame>.jpg")
    annotations = need_folder(root / "Annotations" / resolution, "<sequence>/<frame>.png")
    if split == "all":
        listed = {folder.name: set[str]() for folder in folders(images)}
        source = images
    else:
        if not is_plain(split):
            raise InputError(f"split is {split!r}; it has to be the plain name of a list")
        source = root / "ImageSets" / resolution / f"{split}.txt"
        if not source.exists():
            source = shipped_list(dataset, split) or source
        if not source.exists() and (root / "ImageSets" / "2017").is_dir():
            raise InputError(
                f"{root}: DAVIS-2017, whose lists are in ImageSets/2017; this reads DAVIS-2016, "
                f"which has {source.relative_to(root)}"
            )
        listed = read_list(source)
    records = []
    for sequence, stems in listed.items():
        if not (images / sequence).is_dir():
            on_problem(f"{images / sequence}: no such folder, but {source} lists it")
            continue
        frames = pictures(images / sequence, on_problem=on_problem)
        for stem in sorted(stems - set(frames)):
            on_problem(f"{images / sequence / stem}.jpg: no such frame, but {source} lists it")
        # The list decides where it names frames; a sequence's name stands for all of them.
        frames = {stem: path for stem, path in frames.items() if not stems or stem in stems}
        masks = {}
        if (annotations / sequence).is_dir():
            masks = pictures(annotations / sequence, on_problem=on_problem)
            if stems:
                masks = {stem: path for stem, path in masks.items() if stem in stems}
        elif every_frame:
            on_problem(f"{annotations / sequence}: no such folder; it has to hold the masks")
            continue
        records += sequence_records(
            sequence,
            split,
            frames,
            masks,
            every_frame=every_frame,
            foreground=foreground,
            on_problem=on_problem,
        )
    return gathered(dataset, split, records, source)


def read_list(path: Path) -> dict[str, set[str]]:
    """sequence -> stems of its frames, or an empty set for all; in the order of the file."""
    need_file(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such list of a split") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    listed: dict[str, set[str]] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split() if "/" in line else [line.strip()]  # a sequence may have spaces
        if not fields[0]:
            continue
        place = Path(fields[0])
        if len(place.parts) == 1 and not place.suffix:
            sequence, stems = place.name, set[str]()
        else:
            sequence, stems = place.parent.name, {place.stem}
        if ".." in place.parts or not all(map(is_plain, (sequence, *stems))):
            raise InputError(
                f"{path}: line {number} is neither a sequence nor <sequence>/<frame>.jpg"
            )
        listed.setdefault(sequence, set()).update(stems)
    if not listed:
        raise InputError(f"{path}: the list of the split is empty")
    return listed
