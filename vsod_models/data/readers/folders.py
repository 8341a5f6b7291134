"""What the readers share: pictures of a folder, and frames paired with their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ...files import PICTURE_ENDINGS, is_plain, natural_order
from ..records import Picture, Record, Records

# What a reader does with a problem that leaves the rest readable: raise, or collect (`check`).
OnProblem = Callable[[str], None]


class Counts(NamedTuple):
    """Official numbers of a split; None: not known, or differing between releases."""

    sequences: int
    frames: int | None = None
    masks: int | None = None


def fail(problem: str) -> None:
    raise InputError(problem)


def need_folder(path: Path, purpose: str) -> Path:
    if not path.is_dir():
        state = "not a folder" if path.exists() else "no such folder"
        raise InputError(f"{path}: {state}; it has to hold {purpose}")
    return path


def folders(path: Path) -> list[Path]:
    """Folders inside `path`, in natural order, hidden ones left out."""
    inside = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return natural_order(inside)


def pictures(
    folder: Path, suffixes: tuple[str, ...] = PICTURE_ENDINGS, on_problem: OnProblem = fail
) -> dict[str, Path]:
    """stem -> picture of `folder`, in natural order; other files and hidden ones are left out."""
    found: dict[str, Path] = {}
    for path in natural_order(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            on_problem(
                f"{path}: a second picture of the name {path.stem}, after {found[path.stem]}"
            )
            continue
        found[path.stem] = path
    return found


def sequence_records(
    sequence: str,
    split: str,
    frames: Mapping[str, Path],
    masks: Mapping[str, Path | Picture],
    *,
    every_frame: bool = False,
    foreground: Callable[[np.ndarray], np.ndarray] | None = None,
    on_problem: OnProblem = fail,
) -> list[Record]:
    """One sequence: frames and masks by stem.  Each mask needs its frame; each frame its mask only
    with every_frame=True."""
    for stem, mask in masks.items():
        if stem not in frames:
            file = mask if isinstance(mask, Path) else f"{sequence}/{stem}"
            on_problem(f"{file}: a mask without its frame")
    if every_frame:
        for stem, image in frames.items():
            if stem not in masks:
                on_problem(f"{image}: a frame without its mask")
    return [
        Record(sequence, t, stem, image, masks.get(stem), split, foreground)
        for t, (stem, image) in enumerate(frames.items())
    ]


def gathered(dataset: str, split: str, records: Iterable[Record], root: Path) -> Records:
    """Records of a split that has to hold something."""
    collected = Records(dataset, split, list(records))
    if not collected:
        raise InputError(f"{root}: no frame of {dataset} {split} in it")
    return collected


# Lists of this package, for splits that a paper has and the release of the dataset has not.
LISTS = Path(__file__).parent.parent / "splits"


def shipped_list(dataset: str, split: str) -> Path | None:
    """The package's list of sequences for a split of a dataset; None where it has none."""
    file = LISTS / f"{dataset}-{split}.txt"
    return file if is_plain(file.name) and file.is_file() else None


def unknown_split(dataset: str, split: str, splits: Iterable[str]) -> InputError:
    return InputError(f"split is {split!r}; {dataset} has {', '.join(splits)}")
