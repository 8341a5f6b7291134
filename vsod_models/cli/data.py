"""`vsod data`: check datasets, bring them into one layout, write synthetic ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .progress import counted, track

DatasetName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="davis16, folder, fbms59, segtrackv2, repack, duts, stills or coco."
    ),
]
Splits = Annotated[list[str] | None, typer.Option("--split", help="Default: all; repeatable.")]


def check(
    name: DatasetName,
    root: Annotated[Path, typer.Argument(metavar="DIR")],
    split: Splits = None,
    strict: Annotated[bool, typer.Option(help="Counts that are not official are errors.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Count, decode and validate a dataset; every problem with its file.  Exit code 1 if any."""
    from ..data.check import check
    from ..data.readers import find_dataset

    failed = False
    for part in split or find_dataset(name).splits:
        report = check(name, root, part, jobs=jobs, track=track(f"{name} {part}"))
        print(
            f"{name} {part}: {counted(report.sequences, 'sequence')}, "
            f"{counted(report.frames, 'frame')}, {counted(report.masks, 'mask')}"
        )
        for kind in ("problems", "warnings", "notes"):
            for line in getattr(report, kind):
                print(f"{kind[:-1]}: {line}")
        failed = failed or bool(report.problems) or (strict and bool(report.warnings))
    if failed:
        raise typer.Exit(1)
    print("no problems")


def prepare(
    name: DatasetName,
    source: Annotated[Path, typer.Argument(metavar="SRC")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")],
    split: Splits = None,
    partial: Annotated[bool, typer.Option(help="Accept counts that are not official.")] = False,
) -> None:
    """Convert a dataset to the layout of DAVIS-2016, which `folder` reads."""
    from ..data.check import count
    from ..data.prepare import prepare

    read = prepare(name, source, target, split, partial=partial, track=track("writing"))
    for part, records in read.items():
        numbers = zip(count(records), ("sequence", "frame", "mask"), strict=True)
        print(f"{part}: {', '.join(counted(number, what) for number, what in numbers)}")


def synthetic(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    clips: Annotated[int, typer.Option(help="Clips of the training split.")] = 20,
    val_clips: Annotated[int, typer.Option(help="Clips of the validation split.")] = 5,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 24,
    height: Annotated[int, typer.Option(max=16_384)] = 224,
    width: Annotated[int, typer.Option(max=16_384)] = 224,
    seed: int = 0,
    photos: Annotated[bool, typer.Option(help="Also use scikit-image's pictures.")] = True,
) -> None:
    """Write synthetic clips with their masks in the layout of DAVIS-2016, to try things with."""
    from ..data import open_dataset
    from ..data.prepare import write

    read = {}
    for part, count in (("train", clips), ("val", val_clips)):
        options = dict(frames=frames, size=(height, width), seed=seed, photos=photos)
        read[part] = open_dataset("synthetic", None, part, clips=count, **options)
    write(read, target, track("writing"))
    print(f"{target}: {clips} + {val_clips} clips of {counted(frames, 'frame')}, {width}x{height}")
