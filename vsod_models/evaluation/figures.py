"""Figures of evaluations, by the name of the method: curves, scatter, bars, and a grid of masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.records import Record, Records
from ..errors import InputError
from .evaluator import Evaluation, read_prediction, resized
from .protocols import choose_frames, get_protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """In inches, on paper of its own: no window, nothing shared with other figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def finish(figure: Figure, path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Writes the figure, under the dataset and the protocol of its numbers."""
    for axes in figure.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    first = next(iter(evaluations.values()))
    figure.suptitle(f"{first.dataset}, protocol {first.protocol}", fontsize=10, color="0.35")
    figure.savefig(path)


def draw_curves(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Precision against recall, and F against the threshold; a dot marks max F."""
    figure = new_figure(10, 4.6)
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
    f_measure.legend(loc="lower center", frameon=False)
    finish(figure, path, evaluations)


def draw_scatter(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """S against MAE, a point for each method: the better, the further up and to the left."""
    figure = new_figure(6.6, 4.4)
    axes = figure.subplots()
    for number, (name, evaluation) in enumerate(evaluations.items()):
        x, y = evaluation.overall["MAE"], evaluation.overall["S"]
        marker = "osD^vP*X"[number // 10 % 8]  # the colours repeat after ten
        axes.plot(x, y, marker, markersize=9, label=f"{name}  {x:.3f} / {y:.3f}")
    axes.set(xlabel="MAE, lower is better", ylabel="S, higher is better", title="S against MAE")
    axes.margins(0.15)
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", frameon=False, title="MAE / S")
    finish(figure, path, evaluations)


def draw_bars(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """MAE, a bar for each method."""
    values = [evaluation.overall["MAE"] for evaluation in evaluations.values()]
    figure = new_figure(max(4.0, 1.6 + 0.8 * len(values)), 4.2)
    axes = figure.subplots()
    colours = [f"C{number % 10}" for number in range(len(values))]
    bars = axes.bar(range(len(values)), values, width=0.6, color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=2)
    axes.set_xticks(range(len(values)), list(evaluations))
    if max(map(len, evaluations)) > 9:  # names that would run into one another
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set(ylabel="MAE, lower is better", title="Mean absolute error")
    axes.margins(y=0.12)
    axes.grid(color="0.9", axis="y")
    finish(figure, path, evaluations)


def draw_grid(
    path: Path,
    evaluations: Mapping[str, Evaluation],
    folders: Mapping[str, Path],
    records: Records,
    most: int = 6,
) -> None:
    """A row for each of `most` sequences, spread evenly: frame, ground truth, each method's map.

    The frame is the one in the middle of those that the protocol uses and that all `folders`, by
    the names of `evaluations`, have a map of.

    Raises:
        InputError: there is no such frame.
    """
    protocol = get_protocol(next(iter(evaluations.values())).protocol)
    frames = shared_frames(records, folders, protocol.name)
    if not frames:
        raise InputError("a grid needs a frame that all predictions have")
    chosen = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
    titles = ["frame", "ground truth", *evaluations]
    shape = frames[0].read_image().shape
    figure = new_figure(1.9 * len(titles), 1.9 * len(chosen) * shape[0] / shape[1] + 0.5)
    cells = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, record in zip(cells, (frames[i] for i in chosen), strict=True):
        image, mask = record.read_image(), record.read_mask(protocol.mask_above)
        assert mask is not None
        maps = [
            resized(read_prediction(folders[name] / record.sequence / f"{record.name}.png"),
                    mask.shape)
            for name in evaluations
        ]  # fmt: skip
        for axes, picture in zip(row, [image, 255 * mask, *maps], strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(record.sequence, fontsize=7)
    for axes, title in zip(cells[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    finish(figure, path, evaluations)


def shared_frames(records: Records, folders: Mapping[str, Path], protocol: str) -> list[Record]:
    """Of each sequence the middle one of the frames that count and have a map in every folder."""
    annotated = {
        sequence: {record.name: record for record in frames if record.mask is not None}
        for sequence, frames in records.sequences.items()
    }
    used, _, _ = choose_frames({s: list(f) for s, f in annotated.items()}, get_protocol(protocol))
    shown = []
    for sequence, names in used.items():
        there = [
            annotated[sequence][name]
            for name in names
            if all((folder / sequence / f"{name}.png").is_file() for folder in folders.values())
        ]
        shown += there[len(there) // 2 : len(there) // 2 + 1]
    return shown
