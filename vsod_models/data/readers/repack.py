"""The layout that VSOD papers pass around (DAVIS, FBMS, ViSal, DAVSOD, SegTrack-V2, VOS repacked).

    <sequence>/Imgs/<frame>.jpg
    <sequence>/GT_object_level/<frame>.png      or ground-truth, GT; for some frames only

Masks are of mode 1, L or RGB, some of them anti-aliased: grey above 127 counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ..records import Record, Records
from .folders import (
    OnProblem,
    fail,
    folders,
    gathered,
    need_folder,
    pictures,
    sequence_records,
)  # fmt: skip

SPLITS = ("test",)
IMAGES = ("Imgs", "Frame", "Image", "images")
MASKS = ("GT_object_level", "ground-truth", "GT", "masks")


def open_repack(
    root: Path, split: str, *, without: Sequence[str] = (), on_problem: OnProblem = fail
) -> Records:
    """`root` holds the sequences of one set; the layout has no lists, so `split` only names it.

    without: names of sequences to leave out.
    """
    need_folder(root, "<sequence>/Imgs and <sequence>/GT_object_level")
    records: list[Record] = []
    for folder in folders(root):
        if folder.name in without:
            continue
        if folder.name == "static_images":
            raise InputError(f"{folder}: still images, not a sequence; open it as stills")
        images = [folder / name for name in IMAGES if (folder / name).is_dir()]
        truth = [folder / name for name in MASKS if (folder / name).is_dir()]
        if len(images) != 1 or len(truth) != 1:
            on_problem(
                f"{folder}: it has to hold one of {', '.join(IMAGES)} and one of {', '.join(MASKS)}"
            )
            continue
        records += sequence_records(
            folder.name,
            split,
            pictures(images[0], on_problem=on_problem),
            pictures(truth[0], on_problem=on_problem),
            on_problem=on_problem,
        )
    return gathered("repack", split, records, root)
