"""SegTrack-V2 as published.

    JPEGImages/<sequence>/<frame>.png|bmp|jpg
    GroundTruth/<sequence>/<frame>.png|bmp               one object
    GroundTruth/<sequence>/<object>/<frame>.png|bmp      bmx, cheetah, drift, hummingbird,
                                                         monkeydog, penguin: their union counts

A mask's ending may differ from its frame's, and from that of another object's mask.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..records import Picture, Record, Records, grey, read_as_stored
from .folders import (
    Counts,
    OnProblem,
    fail,
    folders,
    gathered,
    need_folder,
    pictures,
    sequence_records,
    unknown_split,
)  # fmt: skip

SPLITS = ("test",)
# Benchmarks leave out penguin: of a whole colony only the front row is annotated.
LEFT_OUT = ("penguin",)
COUNTS = {"test": Counts(13), "all": Counts(14)}
# Masks of the release that belong to no frame.
STRAY = {"worm": ("0000000000",)}


def open_segtrackv2(root: Path, split: str, *, on_problem: OnProblem = fail) -> Records:
    """Split test (or val, the same): the 13 sequences of the benchmarks; all: with penguin."""
    if split not in ("test", "val", "all"):
        raise unknown_split("segtrackv2", split, ("test", "all"))
    images = need_folder(root / "JPEGImages", "<sequence>/<frame>.png")
    truth = need_folder(root / "GroundTruth", "<sequence>/<frame>.png or <sequence>/<object>/")
    records: list[Record] = []
    for folder in folders(images):
        if folder.name in LEFT_OUT and split != "all":
            continue
        if not (truth / folder.name).is_dir():
            on_problem(f"{truth / folder.name}: no such folder; it has to hold the masks")
            continue
        frames = pictures(folder, on_problem=on_problem)
        masks = read_masks(truth / folder.name, on_problem)
        for stem in STRAY.get(folder.name, ()):
            if stem not in frames:
                masks.pop(stem, None)
        records += sequence_records(
            folder.name, split, frames, masks, every_frame=True, on_problem=on_problem
        )
    return gathered("segtrackv2", split, records, images)


def read_masks(folder: Path, on_problem: OnProblem) -> dict[str, Path | Picture]:
    """stem -> mask; with several objects, a function that reads and unites theirs."""
    objects = [pictures(inside, on_problem=on_problem) for inside in folders(folder)]
    if not objects:
        return dict(pictures(folder, on_problem=on_problem))
    stems = list(dict.fromkeys(stem for masks in objects for stem in masks))
    return {
        stem: partial(union, tuple(masks[stem] for masks in objects if stem in masks))
        for stem in stems
    }


def union(paths: tuple[Path, ...]) -> np.ndarray:
    """(H, W) uint8: the largest value of each pixel."""
    result = grey(read_as_stored(paths[0]))
    for path in paths[1:]:
        other = grey(read_as_stored(path))
        if other.shape != result.shape:
            raise InputError(
                f"{path}: the mask is {other.shape[1]}x{other.shape[0]}, another object's of the "
                f"same frame {result.shape[1]}x{result.shape[0]}"
            )
        result = np.maximum(result, other)
    return result.astype(np.uint8)
