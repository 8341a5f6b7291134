"""What made the maps in a folder: a small file `.vsod.json` beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import is_plain, read_json

RECORD = ".vsod.json"


def write_record(folder: Path, made_by: Mapping[str, Any], frames: Sequence[str]) -> None:
    """`made_by`: of `VideoPredictor.record`, and the view."""
    (folder / RECORD).write_text(json.dumps({**made_by, "frames": list(frames)}) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What made the maps of a sequence; None where nobody says."""
    file = folder / RECORD
    if not file.is_file():
        return None
    record = read_json(file, "record of `vsod predict`")
    if not isinstance(record, dict):
        raise InputError(f"{file}: not a record of `vsod predict`")
    return record


def are_made_by(made_by: Mapping[str, Any], folder: Path, frames: Sequence[str]) -> bool:
    """Whether the maps of these frames are there and made like this; False where there are none.

    Raises:
        InputError: there are others, or only some.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    again = "overwrite=True makes them anew"
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder}: holds maps that do not say what made them; {again}")
    for key, value in made_by.items():
        # The hash says which model; its name is what somebody called it.
        if key != "model" and record.get(key) != value:
            raise InputError(
                f"{folder}: its maps were made with {key} {record.get(key)}, not {value}; {again}"
            )
    if record.get("frames") != list(frames):
        raise InputError(f"{folder}: its maps were made of other frames; {again}")
    missing = [name for name in frames if not (folder / f"{name}.png").is_file()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of its {len(frames)} maps are missing, such as "
            f"{missing[0]}.png; {again}"
        )
    return True


def left_over(folder: Path, frames: Sequence[str]) -> list[Path]:
    """Maps of frames that there were when the maps in a folder were made, and are no more."""
    try:
        before = (read_record(folder) or {}).get("frames")
    except InputError:
        before = None
    names = before if isinstance(before, list) else []
    gone = [name for name in names if isinstance(name, str) and name not in set(frames)]
    return [folder / f"{name}.png" for name in gone if is_plain(name)]


def makers(folder: Path, sequences: Sequence[str]) -> list[str]:
    """`mssa-tiny (1f2e..., mask)` of all that made the maps of these sequences, as far as known."""
    found = dict[str, None]()
    for sequence in sequences:
        try:
            record = read_record(folder / sequence)
        except InputError:
            record = None
        if record is not None:
            what = ", ".join(str(record.get(k)) for k in ("hash", "view", "precision", "crf"))
            found[f"{record.get('model')} ({what})"] = None
    return list(found)
