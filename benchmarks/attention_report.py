"""Tables and plots of the attention benchmark, all from its results document."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import measure
from .attention_rivals import OURS
from .measure import AS_CALLED, BACKWARD, BOTH, FORWARD, IN_GRAPH
from .plots import Panel
from .plots import plot as draw


def left_out(document: Mapping[str, Any]) -> list[str]:
    """Who was left out and why, each once, with the cases where it is not all of them."""
    cases: dict[str, list[str]] = {}
    for case in document["cases"]:
        for name, why in case["left_out"].items():
            cases.setdefault(f"{name}: {why}", []).append(case["label"])
    every = len(document["cases"])
    return [
        text if len(labels) == every else f"{text} (at {'; '.join(labels)})"
        for text, labels in cases.items()
    ]


def case_table(case: Mapping[str, Any]) -> Any:
    """All rows of one case, as a rich table."""
    from rich.table import Table

    title = case["label"] if case["source"] == "random" else f"{case['label']}, {case['source']}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("median", "p20 to p80", "samples", "GFLOP/s", "of peak", "ours is", "memory"):
        table.add_column(name, justify="right")
    sections = {(row["direction"], row["mode"]) for row in case["rows"]}
    order = (FORWARD, BACKWARD, BOTH)
    for direction, mode in sorted(sections, key=lambda s: (order.index(s[0]), s[1])):
        table.add_section()
        name = direction if case["device"] == "cpu" else f"{direction}, {mode}"
        table.add_row(name + (", derived" if direction == BACKWARD else ""), style="bold italic")
        for row in case["rows"]:
            if (row["direction"], row["mode"]) != (direction, mode):
                continue
            spread = ""
            if row["p20_s"] is not None:
                ends = (row["p20_s"], row["p80_s"])
                spread = " to ".join(measure.seconds_text(x) for x in ends)
            ratio = row["speedup_of_ours"]
            table.add_row(
                row["label"],
                measure.seconds_text(row["median_s"]),
                spread,
                str(row["repeats"]),
                f"{row['gflops_per_second']:.0f}",
                f"{row['share_of_peak']:.0%}",
                "" if ratio is None or row["rival"] == OURS else f"{ratio:.2f}x",
                measure.bytes_text(row["peak_extra_bytes"]),
                style="green" if row["rival"] == OURS else None,
            )
    return table


SUMMARY_COLUMNS = (
    "case",
    "direction",
    "ours",
    "of peak",
    "vs SDPA",
    "vs best rival",
    "memory",
    "of SDPA",
)


def _summary(document: Mapping[str, Any]) -> list[list[str]]:
    """One row a case and direction: ours against SDPA a group + cat and against the best rival."""
    rows = []
    for case in document["cases"]:
        sections = dict.fromkeys((row["direction"], row["mode"]) for row in case["rows"])
        for direction, mode in sections:
            found = {
                row["rival"]: row
                for row in case["rows"]
                if (row["direction"], row["mode"]) == (direction, mode)
            }
            ours = found.pop(OURS, None)
            if ours is None or direction == BACKWARD:
                continue
            best = min(found.values(), key=lambda row: row["median_s"], default=None)
            sdpa = found.get("sdpa")
            rows.append(
                [
                    case["label"],
                    direction if case["device"] == "cpu" else f"{direction}, {mode}",
                    measure.seconds_text(ours["median_s"]),
                    f"{ours['share_of_peak']:.0%}",
                    f"{sdpa['speedup_of_ours']:.2f}x" if sdpa else "",
                    f"{best['speedup_of_ours']:.2f}x {best['label']}" if best else "",
                    measure.bytes_text(ours["peak_extra_bytes"]),
                    measure.bytes_text(sdpa["peak_extra_bytes"]) if sdpa else "",
                ]
            )
    return rows


def summary_table(document: Mapping[str, Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "shunted_attention against the rest"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for i, name in enumerate(SUMMARY_COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in _summary(document):
        table.add_row(*row)
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of one results document, as a Markdown table."""
    table = measure.markdown_table(SUMMARY_COLUMNS, _summary(document), left=2)
    peaks = ", ".join(
        f"{name} {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s ({peak['how']})"
        for name, peak in document["peak"].items()
    )
    sources = ", ".join(dict.fromkeys(case["source"] for case in document["cases"]))
    absent = "; ".join(left_out(document)) or "nobody"
    note = f"Inputs: {sources}. Measured peak: {peaks}. Left out: {absent}."
    return f"{table}\n\n{note}"


def plot(document: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Speed and memory of every rival: over length from three lengths on, else as bars."""
    lengths = {case["queries"] for case in document["cases"]}
    mode = AS_CALLED if document["machine"]["device"] == "cpu" else IN_GRAPH
    lines = len(lengths) >= 3
    speed, memory = [], []
    for heads in dict.fromkeys((c["heads"], c["head_dim"]) for c in document["cases"]):
        for dtype, peak in document["peak"].items():
            for direction in (FORWARD, BOTH):
                rows = [
                    (case, row)
                    for case in document["cases"]
                    for row in case["rows"]
                    if case["dtype"] == dtype and row["direction"] == direction
                    and (not lines or (case["heads"], case["head_dim"]) == heads)
                ]  # fmt: skip
                title = f"{dtype}, {direction}" + (f", {heads[0]} x {heads[1]}" if lines else "")
                x = _x_number if lines else _x_name
                timed = [(case, row) for case, row in rows if row["mode"] == mode]
                speed.append(
                    Panel(
                        title,
                        _series(timed, x, "median_s", 1e3)
                        if lines
                        else _series(timed, x, "gflops_per_second", 1),
                        None if lines else peak["flops_per_second"] / 1e9,
                    )
                )
                known = [(case, row) for case, row in rows if row["peak_extra_bytes"] is not None]
                memory.append(Panel(title, _series(known, x, "peak_extra_bytes", 1e-6)))
        if not lines:
            break
    kind = "lines" if lines else "bars"
    x_label = "tokens N" if lines else ""
    line = document["machine"]["line"]
    paths = draw(
        speed, folder / f"{stem}-{'time' if lines else 'speed'}", kind=kind, x_label=x_label,
        y_label="ms, lower is better" if lines else "GFLOP/s, higher is better",
        y_log=lines, title=line, peak_label="measured peak",
    )  # fmt: skip
    return paths + draw(
        memory, folder / f"{stem}-memory", kind=kind, x_label=x_label,
        y_label="peak extra memory, MB", title=line,
    )  # fmt: skip


def _series(
    rows: Sequence[tuple[Mapping, Mapping]], x: Callable[[Mapping], Any], field: str, factor: float
) -> dict[str, list[tuple[Any, float]]]:
    series: dict[str, list[tuple[Any, float]]] = {}
    for case, row in rows:
        series.setdefault(row["label"], []).append((x(case), row[field] * factor))
    return series


def _x_number(case: Mapping[str, Any]) -> int:
    return case["queries"]


def _x_name(case: Mapping[str, Any]) -> str:
    return f"N = {case['queries']:,}\n{case['heads']} x {case['head_dim']}"
