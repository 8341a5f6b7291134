"""`vsod data prepare` and `vsod data synthetic`: datasets in the one layout, DAVIS's.

    JPEGImages/480p/<sequence>/<frame>.jpg      frames, byte for byte where they are JPEG
    Annotations/480p/<sequence>/<frame>.png     masks, {0, 255}
    ImageSets/480p/<split>.txt                  frame and mask a line, or sequences (some masks)

"480p" is the layout's name for the folder; frames keep their size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from ..errors import InputError
from ..files import inside, whole_folder
from .check import compare, whole_image
from .readers import find_dataset
from .readers.folders import fail
from .records import Record, Records

# Splits under the names that the layout has for them.
RENAMED = {"test": "val"}

Track = Callable[[Iterable, int], Iterable]


def prepare(
    name: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    splits: Iterable[str] | None = None,
    *,
    partial: bool = False,
    track: Track | None = None,
) -> dict[str, Records]:
    """Convert splits (default: all) of a dataset; gives list name -> records that were read.

    Counts that differ from the official ones are an error, unless partial=True.  `target` is
    written whole or not at all, has to be new or empty, and may not lie in `source`.
    """
    source, target = Path(source), Path(target)
    outer, inner = source.resolve(), target.resolve()
    if inner == outer or outer in inner.parents:
        raise InputError(f"{target}: lies in the source {source}, which is not written to")
    if inner in outer.parents:
        raise InputError(f"{target}: holds the source {source}; it has to be a new folder")
    dataset = find_dataset(name)
    read = {}
    for split in splits or dataset.splits:
        records = dataset.open(source, split, on_problem=fail)
        differences = compare(records, dataset.counts.get(split))
        if differences and not partial:
            raise InputError(f"{source}: {'; '.join(differences)} (partial=True accepts this)")
        read[RENAMED.get(split, split)] = records
    write(read, target, track)
    return read


def write(read: dict[str, Records], target: Path, track: Track | None = None) -> None:
    """Write records to a new folder in the layout; `read` is list name -> records."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists and is not an empty folder")
    seen: dict[str, str] = {}
    for split, records in read.items():
        for sequence in records.sequences:
            if seen.setdefault(sequence, split) != split:
                raise InputError(f"sequence {sequence} is in {seen[sequence]} and in {split}")
    with whole_folder(target) as folder:
        frames = [record for records in read.values() for record in records]
        for record in track(frames, len(frames)) if track else frames:
            write_frame(record, folder)
        for split, records in read.items():
            path = inside(folder / "ImageSets" / "480p", f"{split}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in list_lines(records)), encoding="utf-8")


def list_lines(records: Records) -> list[str]:
    """The official form where each frame has a mask and no name a space, else the sequences."""
    spaces = any(len(f"{r.sequence}/{r.name}".split()) > 1 for r in records)
    if spaces or any(record.mask is None for record in records):
        return list(records.sequences)
    return [
        f"/JPEGImages/480p/{r.sequence}/{r.name}.jpg /Annotations/480p/{r.sequence}/{r.name}.png"
        for r in records
    ]


def write_frame(record: Record, folder: Path) -> None:
    image = inside(folder / "JPEGImages" / "480p", record.sequence, f"{record.name}.jpg")
    image.parent.mkdir(parents=True, exist_ok=True)
    # Decoded where it is only copied, too: a broken file stops here.
    picture = whole_image(record)
    if isinstance(record.image, Path) and record.image.suffix.lower() in (".jpg", ".jpeg"):
        shutil.copyfile(record.image, image)
    else:
        encode(image, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    mask = record.read_mask()
    if mask is None:
        return
    if mask.shape != picture.shape[:2]:
        raise InputError(
            f"{record.mask}: the mask is {mask.shape[1]}x{mask.shape[0]}, its frame "
            f"{picture.shape[1]}x{picture.shape[0]}"
        )
    path = inside(folder / "Annotations" / "480p", record.sequence, f"{record.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    encode(path, mask * np.uint8(255), [])


def encode(path: Path, picture: np.ndarray, options: list[int]) -> None:
    """Encode in memory and write with Python, so that a full disk is an error and not a `False`."""
    done, coded = cv2.imencode(path.suffix, picture, options)
    if not done:
        raise InputError(f"{path}: the picture cannot be encoded")
    path.write_bytes(coded.tobytes())
