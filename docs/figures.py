"""Draws the figures of the documentation: ``python docs/figures.py`` writes docs/*.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent
LONG, SHORT, INK = "#3b6fb6", "#e08a3c", "#222222"


def head_groups() -> plt.Figure:
    """Head groups over the grid: the score tiles of each head, and the tasks that make them."""
    queries, lengths, heads = 3920, (3920, 588), (2, 2)
    figure, (forward, backward) = plt.subplots(2, 1, figsize=(9, 7.6), height_ratios=(1, 1))
    gap = 420
    for axes, title in (
        (forward, "Forward: a task is a band of queries; numbers give the order of launch"),
        (backward, "Backward: a task is a band of keys; dQ is added to from left to right"),
    ):
        left, order = 0, 0
        for group, (length, count) in enumerate(zip(lengths, heads, strict=True)):
            color = (LONG, SHORT)[group]
            for head in range(count):
                axes.add_patch(
                    Rectangle((left, 0), length, queries, fc=color, alpha=0.18, ec="none")
                )
                axes.add_patch(Rectangle((left, 0), length, queries, fc="none", ec=color, lw=1.6))
                bands = 5 if axes is forward else max(1, round(5 * length / queries))
                for band in range(bands):
                    order += 1
                    if axes is forward:
                        y = queries * band / bands
                        axes.plot([left, left + length], [y, y], color=color, lw=0.8)
                        x, y = left + length / 2, y + queries / bands / 2
                    else:
                        x = left + length * band / bands
                        axes.plot([x, x], [0, queries], color=color, lw=0.8)
                        x, y = x + length / bands / 2, queries / 2
                    axes.text(x, y, str(order), ha="center", va="center", color=INK, fontsize=9)
                if axes is backward and bands > 1:
                    for row in (0.15, 0.85):
                        axes.add_patch(
                            FancyArrowPatch(
                                (left + 0.04 * length, row * queries),
                                (left + 0.96 * length, row * queries),
                                arrowstyle="-|>",
                                mutation_scale=11,
                                color=INK,
                                lw=1,
                            )
                        )
                name = f"head {head + sum(heads[:group])}"
                axes.text(left + length / 2, -130, name, ha="center", va="bottom", fontsize=9)
                left += length + gap
        axes.set_xlim(-260, left - gap + 120)
        axes.set_ylim(queries + 420, -560)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=10.5, loc="left", color=INK)
        axes.text(
            -70, queries / 2, "3920 queries", rotation=90, ha="right", va="center", fontsize=9
        )
        axes.text(
            lengths[0] / 2,
            queries + 90,
            "3920 keys (r = 1)",
            ha="center",
            va="top",
            color=LONG,
            fontsize=9.5,
        )
        axes.text(
            left - gap - (2 * lengths[1] + gap) / 2,
            queries + 90,
            "588 keys (r = 2)",
            ha="center",
            va="top",
            color=SHORT,
            fontsize=9.5,
        )
        axes.axis("off")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "vsod-ops"
    head_groups().savefig(FOLDER / "attention_tasks.svg", metadata={"Date": None})
    print(f"wrote {FOLDER.name}/attention_tasks.svg")
