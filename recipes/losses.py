"""Draws the loss of trainings: python recipes/losses.py FILE.png RUN...

A run is a folder of `vsod train`; the losses of steps that are near one another are averaged.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vsod_models.files import whole_file


def losses(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and losses, smoothed by a mean over a twentieth of the run."""
    events = EventAccumulator(str(run / "curves"), {"scalars": 0})
    events.Reload()
    points = events.Scalars("loss") if "loss" in events.Tags()["scalars"] else []
    steps, values = np.array([(p.step, p.value) for p in points]).reshape(-1, 2).T
    width = max(1, len(values) // 20)
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid")


def main(file: Path, runs: list[Path]) -> None:
    figure = Figure(figsize=(9, 0.16 * len(runs) + 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        style = ("-", "--", ":", "-.")[number // 10 % 4]  # the colours repeat after ten
        axes.plot(*losses(run), style, linewidth=1.3, label=run.name)
    axes.set(xlabel="iteration", ylabel="loss, smoothed")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    with whole_file(file) as part:
        figure.savefig(part)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
