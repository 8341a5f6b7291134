"""Sources that go on while they are read: a camera, a network stream, a pipe."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import av
from av.video.reformatter import VideoReformatter

from ..errors import InputError
from .reading import CONTAINERS, Frame

SECONDS = 10.0  # without a frame, after which a source has stopped
QUICK = {"analyzeduration": "1000000"}  # microseconds of the stream, to know what it is
# FFmpeg's device and the name of the camera in it, by platform.
CAMERAS = {
    "linux": ("video4linux2", "/dev/video{}"),
    "darwin": ("avfoundation", "{}"),
    "win32": ("dshow", "video={}"),
}


def is_live(name: str) -> bool:
    """`camera:0`, `rtsp://...` and `-` are no files; `./camera:0` is one."""
    return name == "-" or re.match(r"camera:|rtsps?://", name) is not None


class Live:
    """A `Source` of what is happening now; it can be iterated once.

    Args:
        name: "camera:N", "rtsp://...", or "-" for standard input.
        drop: the newest frame comes next, and what waited for longer is left out.

    Damaged packets are left out, frames of another size are brought to that of the first one, and
    a source that stops ends the frames: `summary` says so.

    Raises InputError where there is no such source, or nothing comes from it.
    """

    files: list[Path] = []  # noqa: RUF012
    frames: int | None = None
    sound: Path | None = None

    def __init__(self, name: str, drop: bool = False):
        self.name = re.sub(r"//[^/@]*@", "//", name)  # without user and password
        self.drop, self.dropped, self.damaged, self.scaled = drop, 0, 0, 0
        self.notes: list[str] = []
        self.latencies: Counter[int] = Counter()  # milliseconds -> frames, however many these are
        self.latest = 0  # milliseconds, of the frame that was written last
        self._first = self._last = 0.0
        self._arrived: dict[int, float] = {}
        self._closed = threading.Event()
        try:
            self.container = _open(name)
        except (av.error.FFmpegError, OSError) as error:
            reason = str(getattr(error, "strerror", None) or error).lower()
            raise InputError(f"{self.name}: cannot be opened: {reason}") from None
        videos = [s for s in self.container.streams.video if s.codec_context is not None]
        if not videos:
            raise InputError(f"{self.name}: has no video in it that can be decoded")
        self.stream: Any = videos[0]
        self.stream.thread_type = "SLICE"  # threads a frame each would hold frames back
        self.time_base = Fraction(self.stream.time_base or Fraction(1, 90_000))
        rate = self.stream.average_rate or self.stream.guessed_rate or 25
        self.rate = Fraction(rate) if 1 <= rate <= 1000 else Fraction(25)
        self.pixel_aspect = Fraction(self.stream.sample_aspect_ratio or 1)

    def __iter__(self) -> Iterator[Frame]:
        for index, frame in enumerate(self._apart()):
            if self.drop:
                self._arrived[index] = self._arrived.pop(frame.index, time.monotonic())
                frame = replace(frame, index=index, name=f"{index:05d}")
            yield frame

    def close(self) -> None:
        """Ends the frames; what waits for one, and may wait long, need not be waited for."""
        self._closed.set()

    def _apart(self) -> Iterator[Frame]:
        """The frames, read by a thread of their own; of those that wait the newest, if `drop`."""
        waiting: queue.Queue[Any] = queue.Queue(1)
        end = object()

        def put(item: Any) -> None:
            while not self._closed.is_set():
                with contextlib.suppress(queue.Full):
                    waiting.put(item, timeout=0.1)
                    return

        def work() -> None:
            last: Any = end
            try:
                for frame in self._read():
                    if self.drop:
                        with contextlib.suppress(queue.Empty):
                            self._left_out(waiting.get_nowait())
                    put(frame)
                    if self._closed.is_set():
                        return
            except BaseException as error:
                last = error
            put(last)

        threading.Thread(target=work, name="vsod-live", daemon=True).start()
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                item = waiting.get(timeout=0.1)
                if item is end:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _left_out(self, frame: Frame) -> None:
        self.dropped += 1
        self._arrived.pop(frame.index, None)

    def _read(self) -> Generator[Frame]:
        index, shift, last = 0, None, -1
        size: tuple[int, int] | None = None
        convert = VideoReformatter()
        step = max(1, round(1 / (self.rate * self.time_base)))
        for decoded in self._decoded():
            size = size or (decoded.width, decoded.height)
            self.scaled += (decoded.width, decoded.height) != size
            picture = convert.reformat(
                decoded, width=size[0], height=size[1], format="rgb24", threads=1
            ).to_ndarray()
            shift = decoded.pts if shift is None else shift
            pts = last + step if decoded.pts is None else decoded.pts - (shift or 0)
            last = pts = max(pts, last + 1)
            self._arrived[index] = time.monotonic()
            same = (decoded.width, decoded.height) == size
            yield Frame(
                picture, index, f"{index:05d}", pts, self.time_base, decoded.duration or 0,
                decoded=decoded if same else None,
            )  # fmt: skip
            index += 1
        if not index:
            raise InputError(f"{self.name}: no frame came from it")

    def _decoded(self) -> Iterator[Any]:
        with self.container as container:
            try:
                for packet in container.demux(self.stream):
                    try:
                        yield from packet.decode()
                    except av.error.InvalidDataError:
                        self.damaged += 1
            except av.error.FFmpegError as error:
                reason = str(error.strerror or error).lower()
                if isinstance(error, (av.error.ExitError, av.error.TimeoutError)):
                    reason = f"nothing for {SECONDS:g} s"
                self.notes.append(f"{self.name}: stopped: {reason}")

    def written(self, frame: Frame) -> None:
        """To be called when a frame has gone where it should: for its latency."""
        arrived = self._arrived.pop(frame.index, None)
        if arrived is not None:
            self._last = time.monotonic()
            self._first = self._first if self.latencies else arrived
            self.latest = round(1000 * (self._last - arrived))
            self.latencies[self.latest] += 1

    def pace(self) -> str:
        """How fast and how late frames were written: "25.0 frames/s, latency 80 ms, ..."."""
        if not self.latencies:
            return ""
        rate = self.latencies.total() / max(self._last - self._first, 1e-9)
        middle, most = median(self.latencies.elements()), max(self.latencies)
        return f"{rate:.1f} frames/s, latency {middle:.0f} ms, at most {most} ms"

    def summary(self) -> list[str]:
        """What happened, a line each."""
        lines = list(self.notes)
        for count, what in (
            (self.dropped, "left out for newer ones"),
            (self.damaged, "damaged, and left out"),
            (self.scaled, "of another size, brought to that of the first one"),
        ):
            if count:
                lines.append(f"{self.name}: {count} frame{'s' * (count > 1)} {what}")
        return lines


def _open(name: str) -> Any:
    waiting = (SECONDS, SECONDS)
    if name == "-":
        if os.isatty(0):
            raise InputError("-: standard input is a terminal; pipe a stream into it")
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "pipe"}
        return av.open("pipe:0", container_options={**options, **QUICK})
    if name.startswith("camera:"):
        device, place = CAMERAS.get(sys.platform, CAMERAS["linux"])
        number = name.removeprefix("camera:")
        if not number.isdecimal() and sys.platform != "win32":
            raise InputError(f"{name}: camera: and a number is needed, such as camera:0")
        return av.open(place.format(number), format=device, timeout=waiting)
    options = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,rtp,tcp,tls"}
    return av.open(name, container_options={**options, **QUICK}, timeout=waiting)
