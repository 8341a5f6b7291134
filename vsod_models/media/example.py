"""A short clip to try things with: a camera over a photograph, and a soft chord."""

from __future__ import annotations

import math
import os
import tempfile
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from ..data.synthetic.textures import photo
from ..errors import InputError
from .reading import Frame
from .writing import open_writer

# Photographs without copyright restrictions, in the wheel of scikit-image.
PHOTOS = {"coffee": "coffee.png", "astronaut": "astronaut.png", "cat": "chelsea.png"}
SIZE = (384, 256)  # width, height
RATE = 25  # frames a second
SOUND_RATE = 48000  # samples a second
CHORD = (220.0, 277.18, 329.63)  # Hz: A, C sharp, E


class Example:
    """A `Source`: a camera that pans and zooms over a photograph and comes back to its start.

    photo: one of PHOTOS; sound: a file that belongs to the clip.
    """

    rate = Fraction(RATE)
    time_base = Fraction(1, RATE)
    pixel_aspect = Fraction(1)

    def __init__(self, photo: str = "coffee", seconds: float = 3.0, sound: Path | None = None):
        if photo not in PHOTOS:
            raise InputError(f"photo must be one of {', '.join(PHOTOS)}, got {photo!r}")
        if not 0.1 <= seconds <= 60:
            raise InputError(f"seconds must be from 0.1 to 60, got {seconds:g}")
        self.name, self.photo, self.sound = f"example of {photo}", photo, sound
        self.files: list[Path] = [] if sound is None else [sound]
        self.length = round(seconds * RATE)
        self.frames: int | None = self.length

    def __iter__(self) -> Iterator[Frame]:
        picture = photo(PHOTOS[self.photo])
        for index in range(self.length):
            turn = 2 * math.pi * index / self.length
            yield Frame(_seen(picture, turn), index, f"{index:05d}", index, self.time_base, 1)


def _seen(picture: np.ndarray, turn: float) -> np.ndarray:
    """What the camera sees of `picture` at `turn`, from 0 to 2 pi: (height, width, 3) uint8."""
    (rows, columns), (width, height) = picture.shape[:2], SIZE
    scale = min(columns / width, rows / height) * (0.83 + 0.13 * math.cos(turn))
    spare_x, spare_y = columns - scale * width, rows - scale * height
    x = spare_x * (0.5 + 0.5 * math.sin(turn))
    y = spare_y * (0.5 - 0.5 * math.sin(2 * turn))
    matrix = np.array([[scale, 0, x], [0, scale, y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, matrix, SIZE, flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def chord(seconds: float) -> np.ndarray:
    """(samples, 2) int16, at SOUND_RATE: a soft chord that fades in and out."""
    t = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    tones = sum(np.sin(2 * np.pi * hertz * t) for hertz in CHORD)
    fade = np.minimum(1, np.minimum(t, seconds - t) / 0.1)
    return np.repeat((0.1 * 32767 * tones * fade).astype(np.int16)[:, None], 2, 1)


def write_example(
    output: str | os.PathLike[str],
    photo: str = "coffee",
    seconds: float = 3.0,
    *,
    overwrite: bool = False,
) -> int:
    """Write the clip, with its sound where `output` holds sound; returns its number of frames.

    output: .mp4, .mov, .webm, .gif, or a folder for PNG.  Raises InputError as `open_writer` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder, "chord.wav")
        clip = Example(photo, seconds, sound)
        samples = chord(seconds)
        with wave.open(str(sound), "wb") as file:
            file.setnchannels(samples.shape[1])
            file.setsampwidth(samples.itemsize)
            file.setframerate(SOUND_RATE)
            file.writeframes(samples.tobytes())
        with open_writer(output, clip, overwrite=overwrite) as writer:
            for frame in clip:
                writer.write(frame.picture, frame)
            writer.close()
    return clip.length
