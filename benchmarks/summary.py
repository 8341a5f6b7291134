"""The five rows of the front page, from the results of the single benchmarks."""

from collections.abc import Mapping
from typing import Any

from . import measure
from .attention_rivals import OURS
from .measure import BOTH, FORWARD

NEEDED = ("attention", "conv_lstm", "dense_crf", "mssa")
COLUMNS = ("", "compared with", "time", "faster", "memory", "its memory")


def markdown(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of one machine's `documents`: name of a benchmark -> its results."""
    rows = [_attention(documents["attention"], dtype) for dtype in ("float32", "bfloat16")]
    rows += [_conv_lstm(documents["conv_lstm"]), _dense_crf(documents["dense_crf"])]
    rows.append(_mssa(documents["mssa"]))
    return measure.markdown_table(COLUMNS, rows, left=2)


def _attention(document: Mapping[str, Any], dtype: str) -> list[str]:
    what = f"`shunted_attention`, 3,920 tokens, 4 heads of 128, {dtype}, forward and backward"
    pair = _pair(document, f"5x28x28 = 3,920, 4 x 128, {dtype}", BOTH, "sdpa")
    return _row(what, "PyTorch's attention, a call a group", *pair)


def _conv_lstm(document: Mapping[str, Any]) -> list[str]:
    what = "`conv_lstm`, 4 to 16 channels, 4 frames of 512x512, float32, forward"
    pair = _pair(document, "4 -> 16, 512x512, B=1, T=4, float32", FORWARD, "eager")
    return _row(what, "the usual loop over a cell", *pair)


def _pair(document: Mapping[str, Any], label: str, direction: str, rival: str) -> list[Any]:
    """Rows of ours and of a rival, in the first way that was timed."""
    case = next(case for case in document["cases"] if case["label"] == label)
    return [
        next(r for r in case["rows"] if (r["rival"], r["direction"]) == (name, direction))
        for name in (OURS, rival)
    ]


def _dense_crf(document: Mapping[str, Any]) -> list[str]:
    case = next(
        c for c in document["cases"] if (c["batch"], c["width"], c["height"]) == (1, 512, 512)
    )
    ours, theirs = case["rows"]
    return _row("`dense_crf`, one frame of 512x512", f"`{theirs['rival']}`", ours, theirs)


def _mssa(document: Mapping[str, Any]) -> list[str]:
    case = min(document["cases"], key=lambda case: case["size"])
    ours, theirs = (row for row in case["rows"] if row["direction"] == "forward")
    size, frames = case["size"], document["options"]["frames"]
    precision = document["options"].get("precision", "float32")  # older results have no other
    what = f"MSSA with VGG16, {frames} frames of {size}x{size}, {precision}, forward"
    return _row(what, "its attention in plain PyTorch", ours, theirs)


def _row(what: str, rival: str, ours: Mapping, theirs: Mapping) -> list[str]:
    return [
        what,
        rival,
        measure.seconds_text(ours["median_s"]),
        f"{theirs['median_s'] / ours['median_s']:.1f}x",
        measure.bytes_text(ours["peak_extra_bytes"]),
        measure.bytes_text(theirs["peak_extra_bytes"]),
    ]
