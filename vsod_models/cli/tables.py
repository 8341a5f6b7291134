"""Tables of evaluations, by the name of the method."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluation.evaluator import Evaluation, frame_count, listed
from ..evaluation.measures import MEASURES
from ..evaluation.protocols import PROTOCOLS
from .progress import counted


def show(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Tables of the overall numbers and of each sequence, and what they were made of."""
    first = next(iter(evaluations.values()))
    say = functools.partial(console.print, markup=False, highlight=False)
    say(f"{first.dataset}, protocol {first.protocol}: {PROTOCOLS[first.protocol].summary}.")
    if first.skipped:
        count = frame_count(first.skipped)
        say(f"Skipped by the protocol, {counted(count, 'frame')}: {listed(first.skipped)}.")
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
    if evaluation.makers:
        yield f"Made by vsod predict: {'; '.join(evaluation.makers)}."
    used = counted(sum(evaluation.frames.values()), "frame")
    yield f"Used: {used} of {counted(len(evaluation.frames), 'sequence')}."
    if evaluation.missing:
        missing = evaluation.missing
        count = counted(frame_count(missing), "prediction")
        yield f"Missing and left out, {count}: {listed(missing)}."
    if evaluation.flicker:
        ours, truth = evaluation.flicker.predictions, evaluation.flicker.truth
        factor = f", {ours / truth:.2f} times" if truth else ", with"
        yield f"Flicker: {ours:.4f}{factor} that of the ground truth, {truth:.4f}."
    for change, times in evaluation.resized.items():
        yield f"Resized to the ground truth (bilinear), {times} predictions: {change}."
    if evaluation.strangers:
        yield f"No sequence of the dataset, left aside: {', '.join(evaluation.strangers)}."
