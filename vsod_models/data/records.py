"""The one record type that every dataset gives and everything else reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError, one_line
from ..files import is_plain, need_file

Picture = Callable[[], np.ndarray]  # makes the array when called (synthetic clips)


@dataclass(frozen=True, slots=True)  # slots: synthetic sets have hundreds of thousands
class Record:
    """One frame, with or without ground truth."""

    sequence: str
    frame: int  # index within the sequence, from 0, over all frames whether annotated or not
    name: str  # stem of the image file, and of the prediction: `<sequence>/<name>.png`
    image: Path | Picture
    mask: Path | Picture | None
    split: str
    # Grey or colour picture as read (uint8) -> foreground; None: grey above a threshold.
    foreground: Callable[[np.ndarray], np.ndarray] | None = field(default=None, compare=False)
    label: Literal["fine", "coarse"] = "fine"
    prior: Path | None = None  # motion prior, a grey picture (MSST)

    def __post_init__(self) -> None:
        # Files are written under these names: none may lead out of its folder.
        if not is_plain(self.sequence) or not is_plain(self.name):
            raise InputError(
                f"{self.image}: {self.sequence!r} and {self.name!r} have to be the plain names of "
                "a sequence and a frame"
            )

    def read_image(self) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        return read_rgb(self.image) if isinstance(self.image, Path) else self.image()

    def read_mask(self, above: int = 127) -> np.ndarray | None:
        """(H, W) uint8, 0 or 1; None where the frame has no ground truth.

        Foreground is what `foreground` returns; without it, where the grey level is over `above`.
        """
        if self.mask is None:
            return None
        picture = read_as_stored(self.mask) if isinstance(self.mask, Path) else self.mask()
        if self.foreground is not None:
            return self.foreground(picture).astype(np.uint8)
        return (grey(picture) > above).astype(np.uint8)

    def read_prior(self) -> np.ndarray | None:
        """(H, W) float32 in [0, 1]; None where the frame has no motion prior."""
        if self.prior is None:
            return None
        return grey(read_as_stored(self.prior)).astype(np.float32) / 255


class Records(Sequence[Record]):
    """The records of one split of one dataset, sequence by sequence, frames in order."""

    def __init__(self, dataset: str, split: str, records: Sequence[Record]):
        self.dataset = dataset
        self.split = split
        self._records = list(records)
        self.sequences: dict[str, list[Record]] = {}
        for record in self._records:
            self.sequences.setdefault(record.sequence, []).append(record)

    def of_sequences(self, names: Sequence[str]) -> Records:
        """The records of these sequences alone."""
        for name in names:
            if name not in self.sequences:
                raise InputError(f"{self.dataset} {self.split} has no sequence {name!r}")
        wanted = set(names)
        kept = [record for record in self._records if record.sequence in wanted]
        return Records(self.dataset, self.split, kept)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)


@contextlib.contextmanager
def reading_picture(path: Path) -> Iterator[None]:
    """Whatever a library makes of a picture that it cannot read becomes one line with the file."""
    need_file(path)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except MemoryError:
        raise InputError(f"{path}: there is not enough memory to decode it") from None
    except Exception as error:  # Pillow and OpenCV raise many kinds for damaged files
        raise InputError(f"{path}: not a readable picture ({one_line(error)})") from None


def read_as_stored(path: Path) -> np.ndarray:
    """A picture as it is stored: (H, W) or (H, W, channels) uint8, colours as RGB(A).

    A palette is not expanded: its indices come back.  16-bit pictures are scaled to 8 bits.
    """
    with reading_picture(path), Image.open(path) as picture:
        array = np.array(picture.convert("L") if picture.mode == "1" else picture)
        if array.dtype != np.uint8:
            array = np.clip(array.astype(np.float64) / 257.0, 0, 255).round().astype(np.uint8)
    return array


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of any picture, upright: grey is repeated, alpha is dropped."""
    with reading_picture(path):
        if path.suffix.lower() in (".jpg", ".jpeg"):  # OpenCV decodes these at twice Pillow's rate
            data = path.read_bytes()
            # It takes a file that was cut off for a whole one: leave it one that has its end mark;
            # nor does it mind a bomb, which is a large file, too.
            if b"\xff\xd9" in data[-4096:] and len(data) < 2**22:
                picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                if picture is not None:
                    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                return np.repeat(read_as_stored(path)[:, :, None], 3, axis=2)
            return np.array(ImageOps.exif_transpose(opened).convert("RGB"))


def grey(picture: np.ndarray) -> np.ndarray:
    """(H, W) of a picture of any number of channels: alpha is dropped, colours are averaged."""
    if picture.ndim == 2:
        return picture
    if picture.shape[2] in (1, 2):
        return picture[:, :, 0]
    return picture[:, :, :3].mean(axis=2)
