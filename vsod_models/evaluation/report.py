"""Evaluations in files, by the name of the method: JSON, CSV, curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from .evaluator import Evaluation
from .measures import MEASURES


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
