"""Plots of results: lines over a length, or grouped bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Panel:
    """One set of axes.  `series`: label -> points (x, y); x is a name in bar charts."""

    title: str
    series: Mapping[str, Sequence[tuple[Any, float]]]
    peak: float | None = None  # a dashed line at this y


def plot(
    panels: Sequence[Panel],
    path: Path,
    *,
    kind: str,
    title: str,
    x_label: str,
    y_label: str,
    y_log: bool = True,
    peak_label: str = "",
    columns: int = 2,
) -> list[Path]:
    """Draw `panels` as "lines" (both axes logarithmic) or grouped "bars"; write SVG and PNG.

    The first series is drawn in the strongest colour: ours comes first.  Panels without a point
    are left out, and nothing is written when there are no others.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    palette = ["#c1121f", *_rival_colours(len(labels) - 1)]
    colours = dict(zip(labels, palette, strict=True))
    rows = -(-len(panels) // columns)
    settings = {
        "font.size": 11, "svg.hashsalt": "vsod-ops", "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#dddddd",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(
            rows, min(columns, len(panels)), figsize=(5.6 * min(columns, len(panels)), 3.6 * rows),
            squeeze=False, sharey="all" if y_log else "row", layout="constrained",
        )  # fmt: skip
        for ax, panel in zip(axes.flat, panels, strict=False):
            draw = _draw_lines if kind == "lines" else _draw_bars
            draw(ax, panel, colours)
            if panel.peak is not None:
                ax.axhline(panel.peak, color="#333333", dashes=(4, 3), linewidth=1.2)
                ax.text(
                    0.995, panel.peak, peak_label, transform=ax.get_yaxis_transform(),
                    ha="right", va="bottom", fontsize=9, color="#333333",
                )  # fmt: skip
            ax.set_title(panel.title, fontsize=11, loc="left")
            ax.grid(axis="both" if kind == "lines" else "y")
            if y_log:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
        for ax in axes[:, 0]:
            ax.set_ylabel(y_label)
        for ax in axes[-1]:
            ax.set_xlabel(x_label)
        for ax in axes.flat[len(panels) :]:
            ax.set_visible(False)
        handles: dict[str, Any] = {}
        for ax in axes.flat:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            [handles[label] for label in labels], labels,
            loc="outside lower center", ncols=min(4, len(labels)), frameon=False,
        )  # fmt: skip
        figure.suptitle(title, fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        paths = [path.with_suffix(".svg"), path.with_suffix(".png")]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=120)
        pyplot.close(figure)
    return paths


def _rival_colours(count: int) -> list[str]:
    base = ["#33658a", "#86bbd8", "#6a994e", "#f6ae2d", "#8d6a9f", "#555555"]
    base += ["#2a9d8f", "#bc6c25", "#a3b18a", "#9a8c98"]
    return [base[i % len(base)] for i in range(count)]


def _draw_lines(ax: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    ticks: list[Any] = []
    for order, (label, points) in enumerate(panel.series.items()):
        x, y = zip(*points, strict=True)
        ticks += x
        ax.plot(
            x, y, marker="o", markersize=4, label=label, color=colours[label],
            linewidth=2.4 if order == 0 else 1.4, zorder=10 - order,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(ticks)), [f"{x:,}" for x in sorted(set(ticks))])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_bars(ax: Any, panel: Panel, colours: Mapping[str, str]) -> None:
    names = list(dict.fromkeys(x for points in panel.series.values() for x, _ in points))
    width = 0.84 / len(panel.series)
    for order, (label, points) in enumerate(panel.series.items()):
        x = [names.index(name) + (order + 0.5) * width - 0.42 for name, _ in points]
        ax.bar(x, [y for _, y in points], width * 0.94, label=label, color=colours[label])
    ax.set_xticks(range(len(names)), names)
