"""`vsod data check`: every problem of a dataset, with its file.  Nothing is written."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..workers import deaf_to_ctrl_c
from .readers import find_dataset
from .readers.folders import Counts
from .records import Record, Records, reading_picture


@dataclass
class Report:
    """What `check` found in one split."""

    dataset: str
    split: str
    sequences: int = 0
    frames: int = 0
    masks: int = 0
    problems: list[str] = field(default_factory=list)  # each names its file
    warnings: list[str] = field(default_factory=list)  # counts that differ from the official ones
    notes: list[str] = field(default_factory=list)  # legal, good to know


def check(
    name: str,
    root: str | os.PathLike[str],
    split: str,
    *,
    jobs: int = 1,
    track: Callable[[Iterable, int], Iterable] | None = None,
) -> Report:
    """Opens one split, decodes every file of it in `jobs` processes, compares its counts.

    `track(results, total)` passes the results on and may draw a progress bar.  A folder that
    cannot be opened at all is a problem of the report, not an error.
    """
    dataset = find_dataset(name)
    report = Report(name, split)
    try:
        records = dataset.open(Path(root), split, on_problem=report.problems.append)
    except InputError as error:
        report.problems.append(str(error))
        return report
    report.sequences, report.frames, report.masks = count(records)
    results: Iterable = inspected(list(records), jobs)
    if track is not None:
        results = track(results, len(records))
    for problems, notes in results:
        report.problems += problems
        report.notes += notes
    report.warnings += compare(records, dataset.counts.get(split))
    report.notes += without_truth(records)
    return report


def count(records: Records) -> tuple[int, int, int]:
    """(sequences, frames, masks)."""
    masks = sum(record.mask is not None for record in records)
    return len(records.sequences), len(records), masks


def compare(records: Records, official: Counts | None) -> list[str]:
    """One line for each count that is not the official one."""
    if official is None:
        return []
    return [
        f"{records.dataset} {records.split}: {found} {what}, officially {expected}"
        for what, found, expected in zip(Counts._fields, count(records), official, strict=True)
        if expected is not None and found != expected
    ]


def without_truth(records: Records) -> list[str]:
    """Sequences without any ground truth."""
    return [
        f"{name}: no frame of the sequence has ground truth"
        for name, sequence in records.sequences.items()
        if all(record.mask is None for record in sequence)
    ]


def inspected(records: list[Record], jobs: int) -> Iterator[tuple[list[str], list[str]]]:
    """(problems, notes) of each record, in order."""
    if jobs <= 1:
        yield from map(inspect, records)
        return
    # Spawned, since forking a process that has threads (OpenCV's) can hang.
    context = multiprocessing.get_context("spawn")
    jobs = min(jobs, 2 * (os.cpu_count() or 1))
    with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
        with deaf_to_ctrl_c():
            results = pool.map(inspect, records, chunksize=16)
        yield from results


def _start_worker() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is a problem of the report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # goes to all: one line of the first is enough


def inspect(record: Record) -> tuple[list[str], list[str]]:
    """(problems, notes) of one frame, after decoding all of it."""
    problems: list[str] = []
    place = f"{record.sequence}/{record.name}"
    image = attempt(functools.partial(whole_image, record), place, problems)
    if record.mask is None:
        return problems, []
    where = record.mask if isinstance(record.mask, Path) else place
    mask = attempt(record.read_mask, place, problems)
    if mask is None:
        return problems, []
    if image is not None and mask.shape != image.shape[:2]:
        problems.append(
            f"{where}: the mask is {mask.shape[1]}x{mask.shape[0]}, its frame "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    notes = [] if mask.any() else [f"{where}: the mask is empty"]
    return problems, notes


def attempt(
    read: Callable[[], np.ndarray | None], place: str, problems: list[str]
) -> np.ndarray | None:
    try:
        return read()
    except InputError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename or place}: {error.strerror or error}")
    return None


def whole_image(record: Record) -> np.ndarray:
    """The image, by a decoder that rejects truncated files; OpenCV accepts them."""
    if isinstance(record.image, Path):
        with reading_picture(record.image), Image.open(record.image) as picture:
            picture.load()
    return record.read_image()
