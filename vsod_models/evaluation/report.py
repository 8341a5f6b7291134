"""Evaluations in files, by the name of the method: JSON, CSV, curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

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
