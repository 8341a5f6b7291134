"""Videos, folders of frames and pictures, read frame by frame.

Whatever the source, a frame is (H, W, 3) uint8 RGB, upright, with its time stamp.  Nothing here
holds more than a few frames, however long the video is.
"""

from __future__ import annotations

import contextlib
import glob
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ..data.records import read_rgb
from ..errors import InputError
from ..files import PICTURE_ENDINGS, is_picture, natural_order, need_file

PathLike = str | os.PathLike[str]
T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """One frame as read.  `pts` and `duration` (0: unknown) count in `time_base` seconds."""

    picture: np.ndarray  # (H, W, 3) uint8 RGB, upright
    index: int
    name: str  # of its PNG: the stem of its file, or its index in a video
    pts: int
    time_base: Fraction
    duration: int = 0
    prior: np.ndarray | None = None  # (H, W) in [0, 1]: its motion prior, where that is known
    # The same picture as FFmpeg's frame, where that is upright; it cannot go to another process.
    decoded: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "decoded": None}

    @property
    def time(self) -> float:
        """Seconds from the start of the source."""
        return float(self.pts * self.time_base)


class Source(Protocol):
    """Where frames come from.  It can be iterated again, from the start."""

    name: str  # for messages
    files: list[Path]  # what it reads, and no output may replace
    frames: int | None  # how many there are, as far as it is known
    rate: Fraction  # frames per second, the average where it varies
    time_base: Fraction
    sound: Path | None  # the file whose sound belongs to it
    pixel_aspect: Fraction  # width of a pixel / its height

    def __iter__(self) -> Iterator[Frame]: ...


def open_source(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], rate: Fraction | float = 25
) -> Source:
    """The frames of a video, a folder of frames, a picture, a glob, or several pictures.

    rate: frames per second of pictures (a video has its own).
    Raises InputError naming what is missing, empty or neither a video nor a picture.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    paths: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = [p for p in path.iterdir() if is_picture(p) and not p.name.startswith(".")]
            if not found:
                endings = " ".join(PICTURE_ENDINGS)
                raise InputError(f"{path}: a folder without pictures ({endings})")
            paths += natural_order(found)
        elif path.exists():
            need_file(path)
            paths.append(path)
        elif glob.has_magic(str(given)):
            matches = natural_order([Path(match) for match in glob.glob(str(given))])
            if not matches:
                raise InputError(f"{given}: matches no file")
            paths += matches
        else:
            raise InputError(f"{given}: no such file or folder")
    if len(paths) == 1 and not is_picture(paths[0]):
        return VideoFile(paths[0])
    for path in paths:
        if not is_picture(path):
            raise InputError(f"{path}: not a picture; several inputs must all be pictures")
    name = str(inputs[0]) if len(inputs) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Pictures(paths, name, rate)


class Pictures:
    """Picture files, one frame each, in the order given."""

    sound: Path | None = None
    pixel_aspect = Fraction(1)

    def __init__(self, paths: Sequence[Path], name: str, rate: Fraction | float = 25):
        self.files, self.name = list(paths), name
        self.frames: int | None = len(paths)
        if not 0.001 <= rate <= 1000:  # nor NaN
            raise InputError(f"rate must be 0.001 to 1000 frames per second, got {rate}")
        self.rate = Fraction(rate).limit_denominator(1001)
        self.time_base = 1 / self.rate

    def __iter__(self) -> Iterator[Frame]:
        for index, path in enumerate(self.files):
            yield Frame(read_rgb(path), index, path.stem, index, self.time_base, 1)


class VideoFile:
    """A video file that FFmpeg reads.

    A truncated file is refused at once where its index gives it away, and else when its frames end
    too early; damaged frames are an error too, rather than a guess at what they showed.
    """

    def __init__(self, path: PathLike):
        path = Path(path)
        self.path, self.files, self.name = path, [path], str(path)
        with _reading(path), open_container(path) as container:
            stream = _picture_stream(path, container)
            self.time_base = Fraction(stream.time_base)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.sound = path if container.streams.audio else None
            self._start = clock_start(container)
            self._end = _promised_end(container, stream)
            self.frames: int | None = stream.frames or None
            if self.frames is None and self._end is not None:
                self.frames = max(1, round((self._end - self._start) * self.rate))
            _check_index(path, container, stream)
            matrix = _display_matrix(_first_frame(path, container, stream))
            if matrix is not None and matrix[0, 0] == 0:  # lying on its side
                self.pixel_aspect = 1 / self.pixel_aspect

    def __iter__(self) -> Iterator[Frame]:
        return self._frames(0, None)

    def times(self) -> list[int] | None:
        """The `pts` of all frames, from the packets alone; None where those do not say it."""
        shift = round(self._start / self.time_base)
        found = []
        with _reading(self.path), open_container(self.path) as container:
            for packet in container.demux(_picture_stream(self.path, container)):
                if not packet.size or packet.is_discard:
                    continue
                if packet.pts is None or packet.pts < shift:
                    return None
                found.append(packet.pts - shift)
        return sorted(found) if len(set(found)) == len(found) else None

    def _frames(self, index: int, since: int | None) -> Iterator[Frame]:
        """The frames from the one on whose number is `index` and whose `pts` is `since`."""
        end = self._start
        shift = round(self._start / self.time_base)
        last = -1
        place = "at its first frame"
        convert = VideoReformatter()  # one for all frames, and one thread: 1 ms less for each
        with _reading(self.path, lambda: place), open_container(self.path) as container:
            stream = _picture_stream(self.path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            step = max(1, round(1 / (self.rate * self.time_base)))
            if since is not None:
                self._seek(container, stream, since + shift)
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise InputError(f"{self.path}: damaged or cut off {place}")
                if packet.pts is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * self.time_base)
                for decoded in packet.decode():
                    # Some containers give no time, or the same one twice.
                    pts = last + step if decoded.pts is None else decoded.pts - shift
                    if since is not None and pts < since:
                        continue
                    last = pts = max(pts, last + 1)
                    stored = convert.reformat(decoded, format="rgb24", threads=1).to_ndarray()
                    matrix = _display_matrix(decoded)
                    frame = Frame(
                        upright(stored, matrix), index, f"{index:05d}", pts, self.time_base,
                        decoded.duration or 0, decoded=decoded if matrix is None else None,
                    )  # fmt: skip
                    yield frame
                    index += 1
                    place = f"after frame {index} ({frame.time:.2f} s)"
        if self._end is not None and end < self._end - Fraction(1, 2):
            whole = float(self._end - self._start)
            raise InputError(f"{self.path}: cut off {place}, it should last {whole:.2f} s")

    def _seek(self, container: Any, stream: Any, at: int) -> None:
        """To a key frame after which the frame at this time is decoded, or else to the start."""
        for seconds in (0, 2, 10, 60):
            back = max(0, at - round(seconds / self.time_base))
            with contextlib.suppress(av.error.FFmpegError):
                container.seek(back, stream=stream)
                times = (frame.pts for frame in container.decode(stream) if frame.pts is not None)
                if next((pts for pts in times if pts >= at), None) == at:
                    container.seek(back, stream=stream)
                    return
        container.seek(0, stream=stream)


class VideoPart:
    """The frames of a video from one in the middle on, as a source without sound.

    read, pts: number and time stamp of the first frame that is read.
    shows: number -> time stamp of the frames that tell whether it is read as the whole one is.
    """

    sound: Path | None = None

    def __init__(self, video: VideoFile, read: int, pts: int, shows: Mapping[int, int]):
        self.video, self.read, self.pts = video, read, pts
        self.shows = {read: pts, **shows}
        self.name, self.files, self.frames = video.name, video.files, video.frames
        self.rate, self.time_base = video.rate, video.time_base
        self.pixel_aspect = video.pixel_aspect

    def __iter__(self) -> Iterator[Frame]:
        shape = None
        for frame in self.video._frames(self.read, self.pts if self.read else None):
            shape = shape or frame.picture.shape
            if self.shows.get(frame.index, frame.pts) != frame.pts or shape != frame.picture.shape:
                raise InputError(
                    f"{self.name}: changes its size or is read differently from its middle on: it "
                    "cannot be cut into parts"
                )
            yield frame


# Files that hold frames themselves: a playlist (ffconcat, HLS) names other files and addresses.
CONTAINERS = (
    "apng,asf,avi,av1,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,"
    "ogg,rm,webm,webp,wtv,yuv4mpegpipe,wav,mp3,flac,aac"
)


def open_container(path: Path) -> Any:
    """A file that is a container, by FFmpeg; a name with a colon is no address."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return av.open(f"file:{path}", container_options=options)


@contextlib.contextmanager
def _reading(path: Path, place: Any = None) -> Iterator[None]:
    """FFmpeg's errors become one line that names the file, and how far it could be read."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, (av.error.PermissionError, av.error.IsADirectoryError)):
            raise InputError(f"{path}: cannot be read: {str(error.strerror).lower()}") from None
        if place is None:
            _check_boxes(path)
            raise InputError(f"{path}: neither a picture nor a video that can be read") from None
        raise InputError(f"{path}: damaged or cut off {place()} ({error.strerror})") from None


def _check_boxes(path: Path) -> None:
    """InputError for an MP4 or MOV without its index, which comes last where nobody moved it."""
    size, at = path.stat().st_size, 0
    if not size:
        raise InputError(f"{path}: is empty")
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if at == 0 and kind not in (b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide"):
                return  # another kind of file
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if kind == b"moov" and at + length <= size:
                return  # the index is there
            at += length if length >= 8 else size
    if at:
        raise InputError(
            f"{path}: cut off: the index is missing; a tool such as untrunc can make one from "
            "another video of the same camera"
        )


def _picture_stream(path: Path, container: Any) -> Any:
    for stream in container.streams.video:
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if stream.codec_context is not None and not cover:
            return stream
    raise InputError(f"{path}: has no video in it that can be decoded")


def _first_frame(path: Path, container: Any, stream: Any) -> Any:
    for frame in container.decode(stream):
        return frame
    raise InputError(f"{path}: has no frames")


def clock_start(container: Any) -> Fraction:
    """Where its clock starts, seconds; a transport stream rarely starts at 0."""
    return max(Fraction(0), Fraction(container.start_time or 0, av.time_base))


def _promised_end(container: Any, stream: Any) -> Fraction | None:
    """When the last frame ends by what the header says of the video alone, seconds."""
    if match := re.fullmatch(r"(\d+):(\d\d):([\d.]+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    if stream.duration:
        return (stream.duration + (stream.start_time or 0)) * Fraction(stream.time_base)
    if container.duration and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base) + clock_start(container)
    return None


def _check_index(path: Path, container: Any, stream: Any) -> None:
    """InputError for an index (MP4, MOV) that points past the end of the file."""
    size = path.stat().st_size
    there = missing = 0
    for entry in stream.index_entries:
        if entry.pos + entry.size > size:
            missing += 1
        else:
            there += 1
    if missing:
        raise InputError(f"{path}: cut off, {there} of its {there + missing} frames are there")


def _display_matrix(frame: Any) -> np.ndarray | None:
    """(2, 2): where the stored x axis (row 0) and y axis (row 1) point on the screen."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    return np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2]


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turn and mirror a stored picture (H, W, C) as its display matrix says.

    Quarter turns and mirrored axes, all eight; phones write these instead of turning the pixels.
    """
    if matrix is None:
        return picture
    (a, b), (c, d) = np.sign(matrix)
    if a == 0 and d == 0 and b and c:  # x goes to y and y to x
        picture, (a, d) = picture.swapaxes(0, 1), (c, b)
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def ahead(
    items: Iterable[T],
    depth: int = 4,
    stop: Callable[[], None] = lambda: None,
    idle: Callable[[], None] | None = None,
) -> Generator[T]:
    """The same items, made by a thread that runs at most `depth` of them ahead.

    stop: called when no more are wanted, Ctrl-C included, and before the thread is waited for: it
    ends items that may never come.  idle: called again and again while there is none.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, what: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((kind, what), timeout=0.1)
                return True
        return False

    def take() -> tuple[str, Any]:
        while idle is not None:
            with contextlib.suppress(queue.Empty):
                return waiting.get(timeout=0.02)
            idle()
        return waiting.get()

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="vsod-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, what = take()
            if kind == "end":
                return
            if kind == "error":
                raise what
            yield what
    finally:
        stopped.set()
        stop()
        thread.join()
