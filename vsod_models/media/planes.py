"""Pictures as videos hold them: brightness at full size, two colour differences at half of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

# What is weighed into the brightness: of red, and of blue.
WEIGHTS = {Colorspace.ITU709: (0.2126, 0.0722), Colorspace.SMPTE170M: (0.299, 0.114)}
# AVColorSpace of a frame that FFmpeg turns into RGB by these; unspecified ones are among them.
KNOWN = {1: Colorspace.ITU709, **dict.fromkeys((0, 2, 5, 6), Colorspace.SMPTE170M)}


class Planes:
    """A copy of a frame of 4:2:0, to be drawn on.

    arrays: brightness (H, W) and colour differences (H / 2, W / 2) of blue and red, uint8.
    """

    def __init__(self, decoded: Any, colours: Colorspace):
        self.frame = av.VideoFrame(decoded.width, decoded.height, "yuv420p")
        self.arrays, self.colours = _arrays(self.frame), colours
        for made, given in zip(self.arrays, _arrays(decoded), strict=True):
            made[:] = given

    @property
    def size(self) -> tuple[int, int]:
        return self.frame.width, self.frame.height

    def colour(self, rgb: Sequence[int]) -> tuple[int, ...]:
        """What stands for a colour in each of the arrays."""
        of_red, of_blue = WEIGHTS[self.colours]
        red, green, blue = (n / 255 for n in rgb)
        bright = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
        differences = (blue - bright) / (1 - of_blue), (red - bright) / (1 - of_red)
        return (round(16 + 219 * bright), *(round(128 + 112 * d) for d in differences))


def planes_of(decoded: Any, colours: Colorspace) -> Planes | None:
    """The planes of FFmpeg's frame, if it holds just this: 4:2:0, of even sides and 16 to 235."""
    fits = (
        decoded is not None
        and decoded.format.name == "yuv420p"
        and decoded.width % 2 == decoded.height % 2 == 0
        and decoded.color_range != ColorRange.JPEG
        and KNOWN.get(decoded.colorspace) == colours
        and all(plane.line_size > 0 for plane in decoded.planes)  # not stored bottom up
    )
    return Planes(decoded, colours) if fits else None


def _arrays(frame: Any) -> list[np.ndarray]:
    return [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    ]
