"""Evaluation protocols; docs/evaluation.md says what each of them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Protocol:
    """What a table of numbers leaves unsaid.

    skip_ends: the first and the last annotated frame of each sequence do not count.
    mask_above: ground truth is where the grey level, 0..255, is above this.
    normalise: MAE, S and wF see the min-max normalised prediction; F and E always do.
    thresholds: how many, equally spaced from 0 to 1; a prediction is salient at >= threshold.
    by_sequence: mean over the frames of a sequence, then over sequences; else over all frames.
    """

    name: str
    skip_ends: bool
    mask_above: int
    normalise: bool
    thresholds: int
    by_sequence: bool
    summary: str


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "davsod", True, 128, True, 256, True,
            "first and last annotated frame of each sequence skipped; ground truth > 128; "
            "predictions min-max normalised, for MAE too; 256 thresholds; mean over frames, then "
            "over sequences",
        ),
        Protocol(
            "davsod-raw", True, 128, False, 256, True,
            "first and last annotated frame of each sequence skipped; ground truth > 128; MAE, S "
            "and wF of the raw predictions, F and E of min-max normalised ones; 256 thresholds; "
            "mean over frames, then over sequences",
        ),
        Protocol(
            "frame", False, 127, False, 255, False,
            "all annotated frames; ground truth > 127; MAE, S and wF of the raw predictions, F and "
            "E of min-max normalised ones; 255 thresholds; mean over frames",
        ),
    )
}  # fmt: skip


def get_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def choose_frames(
    annotated: Mapping[str, Sequence[str]], protocol: Protocol
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Annotated frames in order, by sequence -> (used, skipped, sequences kept whole)."""
    used, skipped, whole = {}, {}, []
    for sequence, frames in annotated.items():
        used[sequence] = list(frames)
        if protocol.skip_ends and len(frames) < 3:
            whole.append(sequence)
        elif protocol.skip_ends:
            used[sequence] = list(frames[1:-1])
            skipped[sequence] = [frames[0], frames[-1]]
    return used, skipped, whole
