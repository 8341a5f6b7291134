"""Saliency maps against ground truth, under a named protocol; the command `vsod eval`.

Every number equals that of `py_sod_metrics`, which computes S and the formulas of precision, recall
and F; the counts of all thresholds come from one histogram a frame.  docs/evaluation.md says what
each protocol does.  Nothing here imports torch: the worker processes start without it.
"""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import py_sod_metrics
from scipy.ndimage import distance_transform_edt

from .data.records import Record, Records, read_rgb
from .errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MEASURES = ("MAE", "maxF", "meanF", "adpF", "S", "maxE", "meanE", "adpE", "wF")
BETA_SQUARED = 0.3  # the weight of precision in the F-measure of all of the field
EPS = np.spacing(1)


@dataclass(frozen=True)
class Protocol:
    """What a table of numbers leaves unsaid.

    skip_ends: the first and the last annotated frame of each sequence do not count.
    mask_above: ground truth is where the grey level, 0..255, is above this.
    normalise: MAE, S and wF see the min-max normalised prediction; F and E always do.
    thresholds: how many, equally spaced from 0 to 1; a prediction is salient at >= threshold.
    by_sequence: mean over the frames of a sequence, then over sequences; else over all frames.
    """

    name: str
    skip_ends: bool
    mask_above: int
    normalise: bool
    thresholds: int
    by_sequence: bool
    summary: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "davsod", True, 128, True, 256, True,
            "first and last annotated frame of each sequence skipped; ground truth > 128; "
            "predictions min-max normalised, for MAE too; 256 thresholds; mean over frames, then "
            "over sequences",
        ),
        Protocol(
            "frame", False, 127, False, 255, False,
            "all annotated frames; ground truth > 127; MAE, S and wF of the raw predictions, F and "
            "E of min-max normalised ones; 255 thresholds; mean over frames",
        ),
    )
}  # fmt: skip


def get_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name!r}: there is {' and '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


class Scores(NamedTuple):
    """Of one frame, or averages of several.  Curves are (thresholds,), from 0 upwards."""

    mae: float
    s: float
    weighted_f: float
    adaptive_f: float
    adaptive_e: float
    precision: np.ndarray
    recall: np.ndarray
    f: np.ndarray
    e: np.ndarray

    @classmethod
    def mean(cls, scores: Iterable[Scores]) -> Scores:
        return cls(*(np.mean(values, axis=0) for values in zip(*scores, strict=True)))

    def measures(self) -> dict[str, float]:
        """The nine numbers of a table; the maxima and means are those of the averaged curves."""
        values = (
            self.mae,
            *(self.f.max(), self.f.mean(), self.adaptive_f),
            self.s,
            *(self.e.max(), self.e.mean(), self.adaptive_e),
            self.weighted_f,
        )
        return dict(zip(MEASURES, map(float, values), strict=True))


class _Smeasure(py_sod_metrics.Smeasure):
    """A quadrant without pixels has no weight; the library's 0 * NaN would be the whole score.

    It occurs where the foreground lies in the last rows or columns only: an object that leaves.
    """

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        return super().ssim(pred, gt) if pred.size else 0.0


_S = _Smeasure()
_GAUSSIAN = py_sod_metrics.WeightedFmeasure().matlab_style_gauss2D((7, 7), sigma=5)
_PRECISION = py_sod_metrics.PrecisionHandler(with_dynamic=False, with_adaptive=False)
_RECALL = py_sod_metrics.RecallHandler(with_dynamic=False, with_adaptive=False)
_F = py_sod_metrics.FmeasureHandler(with_dynamic=False, with_adaptive=False, beta=BETA_SQUARED)


def score_frame(prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> Scores:
    """`prediction` (H, W) uint8 and `mask` (H, W) bool of the same size.

    No score is NaN.  Without foreground F, precision, recall and wF are 0, S is 1 - the mean of
    the prediction, E is the share of pixels that are not called salient.  A prediction of one
    level has no range to normalise by and stays as it is.
    """
    values = np.arange(256) / 255  # of each grey level, first raw, then normalised
    raw = values
    low, high = values[prediction.min()], values[prediction.max()]
    if high > low:
        values = (values - low) / (high - low)
    normalised = values[prediction]
    saliency = normalised if protocol.normalise else raw[prediction]

    foreground = np.bincount(prediction[mask], minlength=256)
    background = np.bincount(prediction[~mask], minlength=256)
    # Levels outside of the range of the prediction have values outside of [0, 1] and no pixels.
    steps = (values.clip(0, 1) * (protocol.thresholds - 1)).astype(int)  # thresholds below, less 1

    def at_least_each_threshold(histogram: np.ndarray) -> np.ndarray:
        counts = np.bincount(steps, histogram, protocol.thresholds)
        return counts[::-1].cumsum()[::-1]

    curve = _confusion(at_least_each_threshold, foreground, background)
    chosen = values >= min(2 * normalised.mean(), 1)
    adaptive = _confusion(lambda histogram: histogram[chosen].sum(), foreground, background)
    return Scores(
        mae=np.abs(saliency - mask).mean(),
        s=_S.cal_sm(saliency, mask),
        weighted_f=weighted_f_measure(saliency, mask),
        adaptive_f=_F(**adaptive),
        adaptive_e=enhanced_alignment(**adaptive),
        precision=_PRECISION(**curve),
        recall=_RECALL(**curve),
        f=_F(**curve),
        e=enhanced_alignment(**curve),
    )


def _confusion(
    salient: Callable[[np.ndarray], Any], foreground: np.ndarray, background: np.ndarray
) -> dict[str, Any]:
    tp, fp = salient(foreground), salient(background)
    return dict(tp=tp, fp=fp, fn=foreground.sum() - tp, tn=background.sum() - fp)


def enhanced_alignment(tp: Any, fp: Any, fn: Any, tn: Any) -> Any:
    """E-measure (Fan et al., IJCAI 2018) of a binary map from its four pixel counts.

    Every pixel of one of the four kinds has the same alignment, so the sum over pixels is one over
    kinds.  Numbers or arrays; divided by the pixels less one, as its authors do.
    """
    size = tp + fp + fn + tn
    p, g = (tp + fp) / size, (tp + fn) / size
    if np.all(g == 0):
        total = tn + fn
    elif np.all(g == 1):
        total = tp + fp
    else:
        total = 0
        for count, a, b in ((tp, 1 - p, 1 - g), (fp, 1 - p, -g), (fn, -p, 1 - g), (tn, -p, -g)):
            total = total + count * (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return total / np.maximum(size - 1, 1)


def weighted_f_measure(saliency: np.ndarray, mask: np.ndarray) -> float:
    """Weighted F-measure (Margolin et al., CVPR 2014), 0 without foreground.

    `saliency` (H, W) float64 in [0, 1], `mask` (H, W) bool.  Equal to the library's to 1e-6 in a
    third of its time, of which it is two thirds: only errors in the foreground are smoothed, so
    the nearest foreground pixel is looked for no farther from it than the Gaussian reaches.
    """
    if not mask.any():
        return 0.0
    error = np.abs(saliency - mask)
    near = tuple(
        slice(max(np.flatnonzero(there)[0] - 3, 0), np.flatnonzero(there)[-1] + 4)
        for there in (mask.any(1), mask.any(0))
    )
    nearest = distance_transform_edt(~mask[near], return_distances=False, return_indices=True)
    smooth = cv2.filter2D(
        error[near][tuple(nearest)], -1, _GAUSSIAN, borderType=cv2.BORDER_CONSTANT
    )
    missed = np.minimum(error[near], smooth)[mask[near]]
    background = ~mask
    distance = cv2.distanceTransform(background.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squares are whole numbers; without this the last bit varies with the alignment of memory.
    distance = np.sqrt(np.rint(distance * distance))
    weight = 2 - np.exp(np.log(0.5, dtype=np.float32) / 5 * distance)  # 1 at the object, 2 far off
    false = (error * weight).sum(where=background)
    hits = missed.size - missed.sum()
    precision, recall = hits / (hits + false + EPS), 1 - missed.mean()
    return 2 * precision * recall / (precision + recall + EPS)


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
    resized: Counter[str] = field(default_factory=Counter)  # "854x480 to 480x270" -> predictions

    def to_json(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            "dataset": self.dataset,
            "frames": sum(self.frames.values()),
            "overall": self.overall,
            "sequences": self.sequences,
        }


def choose_frames(
    annotated: Mapping[str, Sequence[str]], protocol: Protocol
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Annotated frames in order, by sequence -> (used, skipped, sequences kept whole)."""
    used, skipped, whole = {}, {}, []
    for sequence, frames in annotated.items():
        used[sequence] = list(frames)
        if protocol.skip_ends and len(frames) < 3:
            whole.append(sequence)
        elif protocol.skip_ends:
            used[sequence] = list(frames[1:-1])
            skipped[sequence] = [frames[0], frames[-1]]
    return used, skipped, whole


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
        score = score_frame(_resized(levels, truth.shape), truth != 0, self.protocol)
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
        annotated = {name: sorted(self._scores[name], key=_natural) for name in self._scores}
        used, skipped, whole = choose_frames(annotated, self.protocol)
        scores = {name: [self._scores[name][frame] for frame in used[name]] for name in used}
        return summarise(scores, self.protocol, skipped=skipped, kept_whole=whole)


def _natural(name: str) -> list[str | int]:
    """frame2 before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


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


def _resized(levels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if levels.shape == shape:
        return levels
    return cv2.resize(levels, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def read_prediction(path: Path) -> np.ndarray:
    """(H, W) uint8 of any picture: alpha is dropped, 16 bits become 8, colours their luma."""
    return cv2.cvtColor(read_rgb(path), cv2.COLOR_RGB2GRAY)


# ---- folders


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

    Runs in `workers` processes, in this one for 1.  A prediction that the protocol uses and that
    is not there is an InputError naming all such, or with `allow_missing` left out and listed in
    the result.  `advance(completed=..., total=...)` is called after each frame.
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
            f"{predictions}: {_count(missing)} of {_count(used)} predictions"
            f" <sequence>/<frame>.png are missing: {listed(missing)}"
        )

    scores: dict[str, list[Scores]] = {}
    resized: Counter[str] = Counter()
    for done, ((_, record, _), (score, change)) in enumerate(
        zip(jobs, _map(jobs, workers), strict=True), start=1
    ):
        scores.setdefault(record.sequence, []).append(score)
        if change is not None:
            resized[change] += 1
        advance(completed=done, total=len(jobs))
    return summarise(
        scores,
        chosen,
        dataset=records.dataset,
        skipped=skipped,
        kept_whole=whole,
        missing=missing,
        strangers=strangers,
        resized=resized,
    )


def available_cores() -> int:
    """What this process may use, which can be less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _map(
    jobs: list[tuple[Path, Record, Protocol]], workers: int
) -> Iterable[tuple[Scores, str | None]]:
    """The scores of the jobs, in order."""
    if workers < 1:
        raise InputError(f"workers is {workers} and has to be 1 or more")
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from map(_score_file, jobs)
        return
    # Never a fork of this process, which may have threads; a fork server imports this file once.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    # OpenCV in one thread a worker: they are as many as the cores already.
    with ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
        yield from pool.map(_score_file, jobs, chunksize=4)


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
    return score_frame(_resized(prediction, mask.shape), mask != 0, protocol), change


def _check_folder(predictions: Path, records: Records) -> list[str]:
    """The folders in `predictions` that are no sequence of the dataset."""
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


def _count(frames: Mapping[str, Sequence[str]]) -> int:
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


# ---- what is shown and written: evaluations by the name of the method


def show(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Tables of the overall numbers and of each sequence, and what they were made of."""
    first = next(iter(evaluations.values()))
    say = functools.partial(console.print, markup=False, highlight=False)
    say(f"{first.dataset}, protocol {first.protocol}: {PROTOCOLS[first.protocol].summary}.")
    if first.skipped:
        say(f"Skipped by the protocol, {_count(first.skipped)} frames: {listed(first.skipped)}.")
    if first.kept_whole:
        names = ", ".join(first.kept_whole)
        say(f"Kept whole, having fewer than 3 annotated frames: {names}.")
    for name, evaluation in evaluations.items():
        table = _table("sequence", title=name if len(evaluations) > 1 else None)
        for sequence, measures in evaluation.sequences.items():
            _row(table, sequence, evaluation.frames[sequence], measures)
        table.add_section()
        total = sum(evaluation.frames.values())
        _row(table, "overall", total, evaluation.overall, style="bold")
        console.print(table)
        for line in _notes(evaluation):
            say(line)
    if len(evaluations) > 1:
        table = _table("predictions", title="overall")
        for name, evaluation in evaluations.items():
            _row(table, name, sum(evaluation.frames.values()), evaluation.overall)
        console.print(table)


def _table(first: str, title: str | None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in ("frames", *MEASURES):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(
    table: Table, name: str, frames: int, measures: Mapping[str, float], style: str | None = None
) -> None:
    # Without the zero before the point, as tables of papers: eleven columns fit 80 characters.
    numbers = (f"{measures[measure]:.3f}".removeprefix("0") for measure in MEASURES)
    table.add_row(name, str(frames), *numbers, style=style)


def _notes(evaluation: Evaluation) -> Iterable[str]:
    yield f"Used: {sum(evaluation.frames.values())} frames of {len(evaluation.frames)} sequences."
    if evaluation.missing:
        missing = evaluation.missing
        yield f"Missing and left out, {_count(missing)} predictions: {listed(missing)}."
    for change, times in evaluation.resized.items():
        yield f"Resized to the ground truth (bilinear), {times} predictions: {change}."
    if evaluation.strangers:
        yield f"No sequence of the dataset, left aside: {', '.join(evaluation.strangers)}."


def write_json(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """One evaluation as it is, several by name."""
    contents = {name: evaluation.to_json() for name, evaluation in evaluations.items()}
    document = contents if len(contents) > 1 else next(iter(contents.values()))
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """A row for each sequence and one, of sequence "overall", for all, of each evaluation."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["predictions", "dataset", "protocol", "sequence", "frames", *MEASURES])
        for name, evaluation in evaluations.items():
            about = [name, evaluation.dataset, evaluation.protocol]
            total = sum(evaluation.frames.values())
            writer.writerow([*about, "overall", total, *evaluation.overall.values()])
            for sequence, measures in evaluation.sequences.items():
                frames = evaluation.frames[sequence]
                writer.writerow([*about, sequence, frames, *measures.values()])


def draw_curves(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Precision against recall, and F against the threshold; a dot marks max F."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    precision_recall, f_measure = figure.subplots(1, 2)
    for name, evaluation in evaluations.items():
        curves, best = evaluation.curves, int(evaluation.curves["F"].argmax())
        label = f"{name}  max F {curves['F'][best]:.3f}"
        for axes, x, y in (
            (precision_recall, "recall", "precision"),
            (f_measure, "threshold", "F"),
        ):
            (line,) = axes.plot(curves[x], curves[y], linewidth=1.8, label=label)
            axes.plot(curves[x][best], curves[y][best], "o", color=line.get_color(), markersize=5)
    precision_recall.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    f_measure.set(xlabel="threshold", ylabel="F-measure", title="F-measure, $\\beta^2 = 0.3$")
    for axes in (precision_recall, f_measure):
        axes.set(xlim=(0, 1.01), ylim=(0, 1.01))
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    f_measure.legend(loc="lower center", frameon=False)
    first = next(iter(evaluations.values()))
    figure.suptitle(f"{first.dataset}, protocol {first.protocol}", fontsize=10, color="0.35")
    figure.savefig(path)
