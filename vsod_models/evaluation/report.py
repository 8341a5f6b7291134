"""What is shown and written of evaluations, by the name of the method."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
from .evaluator import Evaluation, frame_count, listed
from .measures import MEASURES
from .protocols import PROTOCOLS


def show(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Tables of the overall numbers and of each sequence, and what they were made of."""
    first = next(iter(evaluations.values()))
    say = functools.partial(console.print, markup=False, highlight=False)
    say(f"{first.dataset}, protocol {first.protocol}: {PROTOCOLS[first.protocol].summary}.")
    if first.skipped:
        count = frame_count(first.skipped)
        say(f"Skipped by the protocol, {count} frames: {listed(first.skipped)}.")
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
        yield f"Missing and left out, {frame_count(missing)} predictions: {listed(missing)}."
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
