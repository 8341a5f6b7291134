"""Coarse labels that a person corrects: the list of what is wrong, and what it makes of them.

The list on the disk is the truth.  Each step is written to it at once, and a step that was made on
another version of it is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..data.records import Record, Records
from ..errors import InputError
from ..files import read_json, whole_file
from ..labels.carrying import back_flow, carried, moved
from ..labels.coarse import MANIFEST
from ..labels.erasing import (
    FORMS,
    Entries,
    as_entries,
    correct,
    corrected,
    is_entry,
    looked_over,
    mark_of,
    write_entries,
)
from ..media.writing import encode_png
from ..prior.flow import naming

GAP = 3  # frames that something carried on may be hidden
KEPT = 32  # labels in memory
FLOWS = 200  # of half a megabyte to one


class Conflict(Exception):
    """The list is not what the page thinks it is."""


@dataclass
class Carrying:
    """Something on its way through a sequence."""

    step: int
    index: int  # of the frame reached
    where: np.ndarray  # (H, W) bool, in that frame
    origin: str
    hidden: int = 0  # frames since it was last seen


class Labels:
    """A folder of `vsod label coarse` and the list of what is wrong in it.

    Raises InputError for a folder that was corrected already, or does not belong to the records.
    """

    def __init__(self, folder: Path, records: Records, erase_list: Path):
        self.folder, self.list = folder, erase_list
        file = folder / MANIFEST
        manifest = read_json(file, "manifest of `vsod label coarse`")
        try:
            labelled, skipped = manifest["frames"], manifest["skipped"]
        except (KeyError, TypeError):
            raise InputError(f"{file}: not a manifest of `vsod label coarse`") from None
        if manifest.get("auto_erase") or any(of["erased"] for of in labelled.values()):
            raise InputError(
                f"{folder}: made with an erase list or auto_erase=True; make the labels again "
                "without: the page applies the list itself"
            )
        self.sequences: dict[str, list[Record]] = {}
        self.of: dict[str, tuple[str, int]] = {}
        for record in records:
            name = f"{record.sequence}/{record.name}"
            if name in labelled or not str(skipped.get(name, "map missing")).startswith("map"):
                frames = self.sequences.setdefault(record.sequence, [])
                self.of[name] = (record.sequence, len(frames))
                frames.append(record)
        if missing := sorted(set(labelled) - set(self.of)):
            raise InputError(
                f"{folder}: has a label for {missing[0]}, which is not in {records.dataset} "
                f"{records.split}"
            )
        if skipped_by_hand := [n for n, why in skipped.items() if why == "skipped by a person"]:
            raise InputError(f"{folder}: made with an erase list, which skips {skipped_by_hand[0]}")
        self.labelled = set(labelled)
        self.lock = threading.RLock()
        self.entries: Entries = []
        self.by_frame: dict[str, Entries] = {}
        self.version = "new"
        self.undone: list[Entries] = []
        self.undone_list = erase_list.with_name(f"{erase_list.stem}.redo.json")
        self.carrying: Carrying | None = None
        self.flows: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self.labels: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self.read()

    def read(self) -> None:
        """Takes what is on the disk."""
        data = self.list.read_bytes() if self.list.exists() else b""
        version = _version(data)
        if version == self.version:
            return
        try:
            entries = as_entries(json.loads(data), str(self.list)) if data else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.list}: not JSON, so not an erase list ({error})") from None
        for entry in entries:
            if entry["frame"] not in self.of:
                raise InputError(f"{self.list}: no frame {entry['frame']} in {self.folder}")
        self._take(entries, version)
        self.undone, self.carrying = self._read_undone(), None

    def _take(self, entries: Entries, version: str) -> None:
        self.entries, self.version, self.by_frame = entries, version, {}
        for entry in entries:
            self.by_frame.setdefault(entry["frame"], []).append(entry)

    def _write(self, entries: Entries) -> None:
        data = write_entries(self.list, entries)
        self._take(entries, _version(data))

    def _read_undone(self) -> list[Entries]:
        """What was undone before the server ended, as long as the list is still the same."""
        try:
            kept = json.loads(self.undone_list.read_bytes())
            undone = [as_entries(step, str(self.undone_list)) for step in kept["undone"]]
            if kept["version"] == self.version and all(
                entry["frame"] in self.of for step in undone for entry in step
            ):
                return undone
        except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError):
            pass  # there is nothing to do again, then
        return []

    def _keep_undone(self, undone: list[Entries]) -> None:
        self.undone = undone
        if undone:
            with whole_file(self.undone_list) as part:
                part.write_text(json.dumps({"version": self.version, "undone": undone}))
        else:
            self.undone_list.unlink(missing_ok=True)

    def _check(self, version: str) -> None:
        data = self.list.read_bytes() if self.list.exists() else b""
        if _version(data) != self.version:
            self.read()
            raise Conflict("Another program changed the list.")
        if version != self.version:
            raise Conflict("The list was changed elsewhere, as in another tab.")

    # What there is

    def summary(self) -> dict[str, Any]:
        with self.lock:
            self.read()
            return {
                "version": self.version,
                "list": self.list.name,
                "undo": bool(self.entries),
                "redo": bool(self.undone),
                "sequences": [
                    {
                        "name": name,
                        "frames": len(frames),
                        "looked": sum(looked_over(self._entries(name, r)) for r in frames),
                    }
                    for name, frames in self.sequences.items()
                ],
            }

    def frames(self, sequence: str) -> list[dict[str, Any]]:
        """Of each frame of a sequence its state; `key` changes with its label."""
        with self.lock:
            return [self.state(f"{sequence}/{r.name}") for r in self.sequences[sequence]]

    def state(self, name: str) -> dict[str, Any]:
        entries = self.by_frame.get(name, [])
        return {
            "name": name.rpartition("/")[2],
            "index": self.of[name][1],
            "mark": mark_of(entries),
            "looked": looked_over(entries),
            "edits": sum("mark" not in e and "carried" not in e for e in entries),
            "carried": sum("carried" in e for e in entries),
            "key": zlib.crc32(json.dumps(entries).encode()),
        }

    def _entries(self, sequence: str, record: Record) -> Entries:
        return self.by_frame.get(f"{sequence}/{record.name}", [])

    def record(self, sequence: str, index: int) -> Record:
        frames = self.sequences.get(sequence, [])
        if not 0 <= index < len(frames):
            raise InputError(f"sequence {sequence} has no frame {index}")
        return frames[index]

    def base(self, name: str) -> np.ndarray:
        """(H, W) bool, as `vsod label coarse` made it; nothing where the maps said nothing."""
        if name not in self.labelled:
            sequence, index = self.of[name]
            return np.zeros(self.sequences[sequence][index].read_image().shape[:2], bool)
        path = self.folder / f"{name}.png"
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if picture is None:
            raise InputError(f"{path}: not a readable picture")
        return picture > 127

    def label(self, name: str, entries: Entries | None = None) -> np.ndarray:
        """(H, W) bool, after the entries of its frame; not to be written to."""
        entries = self.by_frame.get(name, []) if entries is None else entries
        key = (name, zlib.crc32(json.dumps(entries).encode()))
        with self.lock:
            found = self.labels.get(key)
            if found is None:
                try:
                    found = corrected(self.base(name), entries)
                except InputError as error:
                    raise InputError(f"{self.list}: {error}") from None
                self.labels[key] = found
            self.labels.move_to_end(key)
            while len(self.labels) > KEPT:
                self.labels.popitem(last=False)
        return found

    def regions(self, sequence: str, index: int) -> bytes:
        """PNG (H, W, 3): number of the region (low byte, high byte), and what it is.

        255: in the label; 128: was, and is erased; 0: neither.
        """
        record = self.record(sequence, index)
        name = f"{sequence}/{record.name}"
        label, base = self.label(name), self.base(name)
        gone = base & ~label
        count, found = cv2.connectedComponents(label.astype(np.uint8))
        _, erased = cv2.connectedComponents(gone.astype(np.uint8))
        numbers = np.where(gone, erased + (count - 1), found).clip(max=65535)
        what = 255 * label.astype(np.uint8) + 128 * gone.astype(np.uint8)
        channels = ((numbers & 255).astype(np.uint8), (numbers >> 8).astype(np.uint8), what)
        return encode_png(np.dstack(channels))

    # What the person does

    def edit(self, sequence: str, index: int, entry: dict[str, Any], version: str) -> set[str]:
        """One step: an entry without its frame.  Gives the frames that changed.

        Raises Conflict, or InputError where it would change nothing.
        """
        name = f"{sequence}/{self.record(sequence, index).name}"
        entry = {"frame": name, **{k: v for k, v in entry.items() if k != "frame"}}
        if "carried" in entry or "step" in entry or not is_entry(entry):
            raise InputError(f"the entry {FORMS}")
        with self.lock:
            self._check(version)
            if "mark" not in entry:
                correct(self.label(name).copy(), self.base(name), entry)
            self._write([*self.entries, {**entry, "step": self._next_step()}])
            self._keep_undone([])
            self.carrying = None
        return {name}

    def _next_step(self) -> int:
        return 1 + max((entry.get("step", 0) for entry in self.entries), default=0)

    def _last_step(self) -> int:
        """Where the entries of the last step begin."""
        at = len(self.entries) - 1
        step = self.entries[at].get("step")
        while step is not None and at > 0 and self.entries[at - 1].get("step") == step:
            at -= 1
        return at

    def undo(self, version: str) -> set[str]:
        with self.lock:
            self._check(version)
            if not self.entries:
                raise InputError("there is nothing to undo")
            at = self._last_step()
            gone = self.entries[at:]
            self._write(self.entries[:at])
            self._keep_undone([*self.undone, gone])
            self.carrying = None
        return _names(gone)

    def redo(self, version: str) -> set[str]:
        with self.lock:
            self._check(version)
            if not self.undone:
                raise InputError("there is nothing to do again")
            again = self.undone[-1]
            self._write([*self.entries, *again])
            self._keep_undone(self.undone[:-1])
            self.carrying = None
        return _names(again)

    def carry(self, sequence: str, index: int, version: str) -> tuple[set[str], int, bool]:
        """What the last step on a frame erased, erased in the next frame as well.

        Called again with the frame that it reached, it goes on.  Gives the frames that changed, the
        frame reached, and whether it ends there: with the sequence, or as nothing is left of it.
        """
        name = f"{sequence}/{self.record(sequence, index).name}"
        with self.lock:
            self._check(version)
            going = self.carrying
            if going is None or (going.origin.rpartition("/")[0], going.index) != (sequence, index):
                going = Carrying(self._next_step(), index, self._last_erased(name), name)
                self._keep_undone([])
            frames = self.sequences[sequence]
            if index + 1 >= len(frames):
                self.carrying = None
                return set(), index, True
            following = f"{sequence}/{frames[index + 1].name}"
            where = moved(going.where, self._flow(sequence, index))
            label = self.label(following)
            new: Entries = []
            after = label.copy()
            for entry in carried(where, label, following, going.origin):
                with contextlib.suppress(InputError):  # gone with the one before it
                    correct(after, label, entry)
                    new.append({**entry, "step": going.step})
            if new:
                self._write([*self.entries, *new])
                where = label & ~after
            hidden = 0 if new else going.hidden + 1
            ends = hidden > GAP or not where.any() or index + 2 >= len(frames)
            self.carrying = (
                None if ends else Carrying(going.step, index + 1, where, going.origin, hidden)
            )
            return _names(new), index + 1, ends

    def _flow(self, sequence: str, index: int) -> np.ndarray:
        """From a frame to the next one, as `moved` takes it; kept, as people carry on again."""
        key = (sequence, index)
        if key not in self.flows:
            first, second = self.sequences[sequence][index : index + 2]
            with naming(first, second):
                self.flows[key] = back_flow(first.read_image(), second.read_image())
            while len(self.flows) > FLOWS:
                self.flows.popitem(last=False)
        return self.flows[key]

    def _last_erased(self, name: str) -> np.ndarray:
        """(H, W) bool, what the last step on a frame took out of its label."""
        entries = [entry for entry in self.by_frame.get(name, []) if "mark" not in entry]
        if not entries:
            raise InputError(f"{name}: nothing was erased here that could be carried on")
        step = entries[-1].get("step")
        at = len(entries) - 1
        while step is not None and at > 0 and entries[at - 1].get("step") == step:
            at -= 1
        erased = self.label(name, entries[:at]) & ~self.label(name, entries)
        if not erased.any():
            raise InputError(f"{name}: the last step added; only what is erased is carried on")
        return erased

    def stop(self, sequence: str, index: int, version: str) -> set[str]:
        """What was carried on to this frame stops before it: here and in all frames after it."""
        name = f"{sequence}/{self.record(sequence, index).name}"
        with self.lock:
            self._check(version)
            steps = {e.get("step") for e in self.by_frame.get(name, []) if "carried" in e}
            if not steps:
                raise InputError(f"{name}: nothing was carried on to here")
            after = {f"{sequence}/{r.name}" for r in self.sequences[sequence][index:]}
            kept: Entries = []
            gone: Entries = []
            for entry in self.entries:
                stops = entry["frame"] in after and "carried" in entry
                (gone if stops and entry.get("step") in steps else kept).append(entry)
            changed = _names(gone)
            self._write(self._without_idle(kept, changed))
            self._keep_undone([])
            self.carrying = None
        return changed

    def _without_idle(self, entries: Entries, names: Iterable[str]) -> Entries:
        """Without entries of these frames that change nothing any more."""
        idle: list[int] = []
        for name in names:
            base = self.base(name)
            label = base.copy()
            for entry in entries:
                if entry["frame"] == name:
                    try:
                        correct(label, base, entry)
                    except InputError:
                        idle.append(id(entry))
        return [entry for entry in entries if id(entry) not in idle]


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _names(entries: Entries) -> set[str]:
    return {entry["frame"] for entry in entries}
