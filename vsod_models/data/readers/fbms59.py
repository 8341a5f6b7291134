"""FBMS-59 as published: a few annotated frames a sequence, object ids as grey levels or colours.

    Trainingset/<sequence>/<sequence>_<number>.jpg       (29 sequences)
    Testset/<sequence>/<sequence>_<number>.jpg           (30 sequences)
    .../<sequence>/GroundTruth/*.pgm                     grey level = object, 0 = background
    .../<sequence>/GroundTruth/*_<number>_gt.ppm         colour = object, white = background

Masks and frames share their number, but not always its leading zeros.  Where there are .ppm files
they are the ground truth and .pgm files beside them are not; *PROB* files are neither.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np

from ..records import Record, Records, grey
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
    unknown_split,
)  # fmt: skip

SPLITS = ("train", "test")
PARTS = {"train": ("Trainingset",), "test": ("Testset",), "all": ("Trainingset", "Testset"),
         "msst-train": ("Trainingset",)}  # fmt: skip
COUNTS = {"train": Counts(29), "test": Counts(30), "all": Counts(59, None, 720)}

# Background regions of these have grey levels of their own; shares of 255.
THRESHOLDS = {"marple2": 0.4, "marple7": 0.05}


def foreground(picture: np.ndarray, white_background: bool, threshold: float) -> np.ndarray:
    share = grey(picture) / 255
    return share <= 0.99 if white_background else share > threshold


def open_fbms59(root: Path, split: str, *, on_problem: OnProblem = fail) -> Records:
    """Split train, test (or val, the same), all or msst-train.

    msst-train: the 12 sequences of train that stand for those of MSST-ConvLSTM's training, which
    the paper does not name; see docs/reproduction.md.
    `tennis` of the test set is also in DAVIS-2016 train: a model trained there has seen it.
    """
    parts = PARTS.get("test" if split == "val" else split)
    if parts is None:
        raise unknown_split("fbms59", split, PARTS)
    records: list[Record] = []
    for part in parts:
        for folder in folders(need_folder(root / part, "<sequence>/*.jpg and GroundTruth")):
            records += read_sequence(folder, split, on_problem)
    found = gathered("fbms59", split, records, root)
    file = shipped_list("fbms59", split)
    return found if file is None else found.of_sequences(file.read_text().split())


def read_sequence(folder: Path, split: str, on_problem: OnProblem) -> list[Record]:
    frames = pictures(folder, (".jpg", ".jpeg", ".png"), on_problem)
    truth = folder / "GroundTruth"
    if not truth.is_dir():
        on_problem(f"{truth}: no such folder; it has to hold the sequence's .pgm or .ppm masks")
        return []
    files = [path for path in pictures_by_kind(truth) if "PROB" not in path.name]
    if not files:
        on_problem(f"{truth}: no .pgm or .ppm mask in it")
    by_number: dict[int | None, str] = {}
    for stem in frames:
        by_number.setdefault(number(stem), stem)
    masks: dict[str, Path] = {}
    for path in files:
        stem = path.stem.removesuffix("_gt")
        stem = stem if stem in frames else by_number.get(number(stem), path.stem)
        if stem in masks:
            on_problem(f"{path}: a second mask of the frame {stem}, after {masks[stem]}")
        masks[stem] = path
    rule = partial(
        foreground,
        white_background=any(path.suffix.lower() == ".ppm" for path in files),
        threshold=THRESHOLDS.get(folder.name, 0.0),
    )
    return sequence_records(
        folder.name, split, frames, masks, foreground=rule, on_problem=on_problem
    )


def pictures_by_kind(truth: Path) -> list[Path]:
    """All .ppm files where there is one, else all .pgm files."""
    files = sorted(path for path in truth.iterdir() if not path.name.startswith("."))
    colour = [path for path in files if path.suffix.lower() == ".ppm"]
    return colour or [path for path in files if path.suffix.lower() == ".pgm"]


def number(stem: str) -> int | None:
    """The frame's number: the last one in the name."""
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else None
