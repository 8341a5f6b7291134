"""Datasets by name.  A new one is a file in this folder and a line in DATASETS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import InputError
from .. import synthetic
from ..records import Records
from . import coco, davis16, fbms59, repack, segtrackv2, stills
from .folders import Counts


@dataclass(frozen=True)
class Dataset:
    """A reader, its splits, and the official numbers of each where they are known."""

    open: Callable[..., Records]
    splits: tuple[str, ...]
    counts: Mapping[str, Counts] = field(default_factory=dict)


def _synthetic(root: Path | None, split: str, **options: Any) -> Records:
    if root is not None:
        raise InputError(f"{root}: synthetic clips are not in a folder")
    return synthetic.open_synthetic(split, **options)


DATASETS: dict[str, Dataset] = {
    "davis16": Dataset(davis16.open_davis16, davis16.SPLITS, davis16.COUNTS),
    "folder": Dataset(davis16.open_folder, davis16.SPLITS),
    "fbms59": Dataset(fbms59.open_fbms59, fbms59.SPLITS, fbms59.COUNTS),
    "segtrackv2": Dataset(segtrackv2.open_segtrackv2, segtrackv2.SPLITS, segtrackv2.COUNTS),
    "repack": Dataset(repack.open_repack, repack.SPLITS),
    "duts": Dataset(stills.open_duts, stills.DUTS_SPLITS, stills.DUTS_COUNTS),
    "stills": Dataset(stills.open_stills, stills.SPLITS),
    "coco": Dataset(coco.open_coco, coco.SPLITS),
    "synthetic": Dataset(_synthetic, synthetic.SPLITS),
}


def find_dataset(name: str) -> Dataset:
    """The dataset of that name; InputError lists the names there are."""
    if name not in DATASETS:
        raise InputError(f"dataset is {name!r}; it has to be one of {', '.join(DATASETS)}")
    return DATASETS[name]


def open_dataset(
    name: str, root: str | os.PathLike[str] | None, split: str, **options: Any
) -> Records:
    """The records of one split.

    name: davis16, folder (DAVIS layout, some masks), fbms59, segtrackv2, repack, duts, stills,
    coco or synthetic.  root: its folder; None for synthetic.  options: those of the reader,
    `open_<name>`.  Raises InputError for a folder without the expected structure, a mask without
    its frame, a frame without the mask it needs, an empty split.
    """
    dataset = find_dataset(name)
    if root is None and name != "synthetic":
        raise InputError(f"dataset {name} needs the folder that it lies in")
    if root is not None and not Path(root).is_dir():
        state = "not a folder" if Path(root).exists() else "no such folder"
        raise InputError(f"{root}: {state}; it has to hold {name}, in the layout of docs/data.md")
    try:
        return dataset.open(None if root is None else Path(root), split, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        wrong = str(error).rsplit("argument ", 1)[-1]
        raise InputError(f"dataset {name} has no option {wrong}") from None
