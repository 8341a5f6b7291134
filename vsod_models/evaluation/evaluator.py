"""Averages of the measures over frames and sequences: from arrays as they come, or from folders.

Nothing here imports torch: the worker processes start without it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..data.maps import makers
from ..data.records import Record, Records, read_rgb
from ..errors import InputError
from ..files import natural_order
from ..workers import deaf_to_ctrl_c
from .measures import Scores, score_frame
from .protocols import Protocol, choose_frames, get_protocol


@dataclass(frozen=True)
class Flicker:
    """Means over the sequences; see `flicker.py`."""

    predictions: float
    truth: float  # of the ground truth, over the same pairs of frames
    pairs: int


@dataclass(frozen=True)
class Evaluation:
    """The numbers, and what they were made of.

    `overall` and each of `sequences` hold MEASURES; `curves` is (thresholds,) each of "threshold",
    "precision", "recall", "F", "E", averaged as `overall` is.  `frames` counts the frames used of
    each sequence; `skipped` (by the protocol) and `missing` name frames by sequence.
    """

    protocol: str
    overall: dict[str, float]
    sequences: dict[str, dict[str, float]]
    curves: dict[str, np.ndarray]
    frames: dict[str, int]
    skipped: dict[str, list[str]]
    kept_whole: list[str]  # sequences of fewer than three annotated frames
    dataset: str = ""
    missing: dict[str, list[str]] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)  # folders that are no sequence
    makers: list[str] = field(default_factory=list)  # what made the maps, where they say it
    resized: Counter[str] = field(default_factory=Counter)  # "854x480 to 480x270" -> predictions
    flicker: Flicker | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            "dataset": self.dataset,
            "frames": sum(self.frames.values()),
            "overall": self.overall,
            "sequences": self.sequences,
            **({"flicker": asdict(self.flicker)} if self.flicker else {}),
        }


def summarise(
    scores: Mapping[str, Sequence[Scores]], protocol: Protocol, **about: Any
) -> Evaluation:
    """Averages the scores of the frames used, by sequence, as the protocol says."""
    by_sequence = {sequence: Scores.mean(frames) for sequence, frames in scores.items()}
    if protocol.by_sequence:
        overall = Scores.mean(by_sequence.values())
    else:
        overall = Scores.mean(score for frames in scores.values() for score in frames)
    return Evaluation(
        protocol=protocol.name,
        overall=overall.measures(),
        sequences={sequence: mean.measures() for sequence, mean in by_sequence.items()},
        curves={
            "threshold": np.linspace(0, 1, protocol.thresholds),
            "precision": overall.precision,
            "recall": overall.recall,
            "F": overall.f,
            "E": overall.e,
        },
        frames={sequence: len(frames) for sequence, frames in scores.items()},
        **about,
    )


class SaliencyEvaluator:
    """The same numbers from arrays, as they come.

    Every annotated frame is added, in any order: the protocol's choice is made in `result`, with
    the frames of a sequence in the order of their names.  A frame that is added again replaces
    itself, so padded distributed samplers do no harm.
    """

    def __init__(self, protocol: str = "davsod"):
        self.protocol = get_protocol(protocol)
        self._scores: dict[str, dict[str, Scores]] = {}

    def add(self, sequence: str, frame_name: str, prediction: Any, mask: Any) -> None:
        """`prediction` (H, W): uint8, or floating point in [0, 1], which is rounded to the 256
        levels that a saved map has.  `mask` (h, w): bool or zeros and ones; a prediction of
        another size is resized to it (bilinear).  ValueError for anything else."""
        levels, truth = _as_levels(prediction), np.asarray(mask)
        if truth.ndim != 2 or truth.size == 0:
            raise ValueError(f"mask has to be (H, W), not {truth.shape}")
        if not np.array_equal(truth, truth != 0):
            raise ValueError("mask has to be bool or zeros and ones: threshold it first")
        score = score_frame(resized(levels, truth.shape), truth != 0, self.protocol)
        self._scores.setdefault(sequence, {})[frame_name] = score

    def merge(self, other: SaliencyEvaluator) -> None:
        """Takes over the frames of another process."""
        if other.protocol != self.protocol:
            raise ValueError(f"protocols {self.protocol.name} and {other.protocol.name} differ")
        for sequence, frames in other._scores.items():
            self._scores.setdefault(sequence, {}).update(frames)

    def result(self) -> Evaluation:
        if not self._scores:
            raise ValueError("no frames were added")
        annotated = {name: natural_order(self._scores[name]) for name in self._scores}
        used, skipped, whole = choose_frames(annotated, self.protocol)
        scores = {name: [self._scores[name][frame] for frame in used[name]] for name in used}
        return summarise(scores, self.protocol, skipped=skipped, kept_whole=whole)


def _as_levels(prediction: Any) -> np.ndarray:
    array = np.asarray(prediction)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"prediction has to be (H, W), not {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"prediction has to be uint8 or floating point, not {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
        raise ValueError("prediction has values outside of [0, 1]")
    return (array * 255).round().astype(np.uint8)


def resized(levels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if levels.shape == shape:
        return levels
    return cv2.resize(levels, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def read_prediction(path: Path) -> np.ndarray:
    """(H, W) uint8 of any picture: alpha is dropped, 16 bits become 8, colours their luma."""
    return cv2.cvtColor(read_rgb(path), cv2.COLOR_RGB2GRAY)


def evaluate_folder(
    predictions: Path,
    records: Records,
    protocol: str = "davsod",
    *,
    workers: int = 1,
    allow_missing: bool = False,
    advance: Callable[..., object] = lambda completed, total: None,
) -> Evaluation:
    """Evaluates `<predictions>/<sequence>/<frame>.png` against the annotated frames of `records`.

    Runs in `workers` processes; for 1, in this one.  Missing predictions that the protocol uses
    are an InputError that names them all or, with `allow_missing`, are left out and listed in the
    result.  `advance(completed=..., total=...)` is called after each frame.
    """
    chosen = get_protocol(protocol)
    annotated = {
        sequence: {record.name: record for record in frames if record.mask is not None}
        for sequence, frames in records.sequences.items()
    }
    annotated = {sequence: frames for sequence, frames in annotated.items() if frames}
    if not annotated:
        raise InputError(f"{records.dataset} {records.split}: no frame has ground truth")
    strangers = _check_folder(predictions, records)
    used, skipped, whole = choose_frames({s: list(f) for s, f in annotated.items()}, chosen)

    jobs: list[tuple[Path, Record, Protocol]] = []
    missing: dict[str, list[str]] = {}
    for sequence, frames in used.items():
        for frame in frames:
            path = predictions / sequence / f"{frame}.png"
            if path.is_file():
                jobs.append((path, annotated[sequence][frame], chosen))
            else:
                missing.setdefault(sequence, []).append(frame)
    if missing and not (allow_missing and jobs):
        raise InputError(
            f"{predictions}: {frame_count(missing)} of {frame_count(used)} predictions"
            f" <sequence>/<frame>.png are missing: {listed(missing)}"
        )

    scores: dict[str, list[Scores]] = {}
    changes: Counter[str] = Counter()
    for done, ((_, record, _), (score, change)) in enumerate(
        zip(jobs, _map(jobs, workers), strict=True), start=1
    ):
        scores.setdefault(record.sequence, []).append(score)
        if change is not None:
            changes[change] += 1
        advance(completed=done, total=len(jobs))
    return summarise(
        scores,
        chosen,
        dataset=records.dataset,
        skipped=skipped,
        kept_whole=whole,
        missing=missing,
        strangers=strangers,
        makers=makers(predictions, list(used)),
        resized=changes,
    )


def _map(
    jobs: list[tuple[Path, Record, Protocol]], workers: int
) -> Iterable[tuple[Scores, str | None]]:
    """The scores of the jobs, in order."""
    if workers < 1:
        raise InputError(f"workers is {workers} and has to be 1 or more")
    workers = min(workers, len(jobs), 2 * (os.cpu_count() or 1))
    if workers == 1:
        yield from map(_score_file, jobs)
        return
    # Never a fork of this process, which may have threads; a fork server imports this file once.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        with deaf_to_ctrl_c():
            results = pool.map(_score_file, jobs, chunksize=4)
        yield from results


def _start_worker() -> None:
    cv2.setNumThreads(1)  # workers are as many as the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # goes to all: one line of the first is enough


def _score_file(job: tuple[Path, Record, Protocol]) -> tuple[Scores, str | None]:
    """The scores of a prediction, and "854x480 to 480x270" where it was resized."""
    path, record, protocol = job
    mask = record.read_mask(protocol.mask_above)
    assert mask is not None
    prediction = read_prediction(path)
    change = None
    if prediction.shape != mask.shape:
        (height, width), (to_height, to_width) = prediction.shape, mask.shape
        change = f"{width}x{height} to {to_width}x{to_height}"
    return score_frame(resized(prediction, mask.shape), mask != 0, protocol), change


def _check_folder(predictions: Path, records: Records) -> list[str]:
    """The folders in `predictions` that are not sequences; InputError if none is one."""
    if not predictions.is_dir():
        raise InputError(f"{predictions}: not a folder of predictions")
    entries = sorted(predictions.iterdir())
    folders = [entry.name for entry in entries if entry.is_dir()]
    known = list(records.sequences)
    if any((predictions / sequence).is_dir() for sequence in known):
        return [folder for folder in folders if folder not in records.sequences]
    found = f"the folders {_some(folders)}" if folders else f"no folder and {len(entries)} files"
    raise InputError(
        f"{predictions}: holds {found}, and none of the {len(known)} sequences of"
        f" {records.dataset} {records.split} ({_some(known)})"
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def frame_count(frames: Mapping[str, Sequence[str]]) -> int:
    return sum(map(len, frames.values()))


def listed(frames: Mapping[str, Sequence[str]]) -> str:
    """Every frame by sequence, runs of consecutive numbers as one: `dog 00001-00007, 00009`."""
    return "; ".join(f"{sequence} {_runs(names)}" for sequence, names in frames.items())


def _runs(names: Sequence[str]) -> str:
    runs: list[list[str]] = []
    for name in names:
        last = runs[-1][-1] if runs else ""
        if last.isdecimal() and name.isdecimal() and int(name) == int(last) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
