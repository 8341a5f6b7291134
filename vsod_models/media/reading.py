"""Videos, folders of frames and pictures: read frame by frame, written whole or not at all.

Whatever the source, a frame is (H, W, 3) uint8 RGB, upright, with its time stamp.  Nothing here
holds more than a few frames, however long the video is.
"""

from __future__ import annotations

import contextlib
import glob
import os
import queue
import re
import tempfile
import threading
import types
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ..data.records import read_rgb
from ..errors import InputError
from ..files import whole_file, whole_folder

PICTURE_ENDINGS = (
    ".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
OUTPUT_ENDINGS = (".mp4", ".mov", ".webm", ".gif", ".png")
ALPHA_ENDINGS = (".mov", ".webm", ".gif", ".png")

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

    @property
    def time(self) -> float:
        """Seconds from the start of the source."""
        return float(self.pts * self.time_base)


class Source(Protocol):
    """Where frames come from.  It can be iterated again, from the start."""

    name: str  # for messages
    files: list[Path]  # what it reads, and no output may replace
    frames: int | None  # how many there are, as far as it is known
    rate: Fraction  # frames a second, the average where it varies
    time_base: Fraction
    sound: Path | None  # the file whose sound belongs to it
    pixel_aspect: Fraction  # width of a pixel / its height

    def __iter__(self) -> Iterator[Frame]: ...


# ---- reading


def open_source(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], rate: Fraction | float = 25
) -> Source:
    """The frames of a video, a folder of frames, a picture, a glob, or several pictures.

    rate: frames a second of pictures (a video brings its own).
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


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_ENDINGS


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """frame2 before frame10."""

    def key(path: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", str(path))
        return [(0, int(p), p) if p.isdigit() else (1, 0, p) for p in parts]

    return sorted(paths, key=key)


class Pictures:
    """Picture files, one frame each, in the order given."""

    sound: Path | None = None
    pixel_aspect = Fraction(1)

    def __init__(self, paths: Sequence[Path], name: str, rate: Fraction | float = 25):
        self.files, self.name = list(paths), name
        self.frames: int | None = len(paths)
        self.rate = Fraction(rate).limit_denominator(1001)
        if self.rate <= 0:
            raise InputError(f"rate must be above 0 frames a second, got {rate}")
        self.time_base = 1 / self.rate

    def __iter__(self) -> Iterator[Frame]:
        for index, path in enumerate(self.files):
            yield Frame(read_rgb(path), index, path.stem, index, self.time_base, 1)


class VideoFile:
    """A video file that FFmpeg reads.

    A file that was cut off is refused at once where its index tells, and else when its frames end
    too early; damaged frames are an error too, rather than a guess at what they showed.
    """

    def __init__(self, path: PathLike):
        path = Path(path)
        self.path, self.files, self.name = path, [path], str(path)
        with _reading(path), av.open(str(path)) as container:
            stream = _picture_stream(path, container)
            self.time_base = Fraction(stream.time_base)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.sound = path if container.streams.audio else None
            self._start = _start(container)
            self._end = _promised_end(container, stream)
            self.frames: int | None = stream.frames or None
            if self.frames is None and self._end is not None:
                self.frames = max(1, round((self._end - self._start) * self.rate))
            _check_index(path, container, stream)
            matrix = _display_matrix(_first_frame(path, container, stream))
            if matrix is not None and matrix[0, 0] == 0:  # lying on its side
                self.pixel_aspect = 1 / self.pixel_aspect

    def __iter__(self) -> Iterator[Frame]:
        index, end = 0, self._start
        shift = round(self._start / self.time_base)
        last = -1
        place = "at its first frame"
        convert = VideoReformatter()  # one for all frames, and one thread: 1 ms less for each
        with _reading(self.path, lambda: place), av.open(str(self.path)) as container:
            stream = _picture_stream(self.path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            step = max(1, round(1 / (self.rate * self.time_base)))
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise InputError(f"{self.path}: damaged or cut off {place}")
                if packet.pts is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * self.time_base)
                for decoded in packet.decode():
                    # Some containers give no time, or the same one twice.
                    pts = last + step if decoded.pts is None else decoded.pts - shift
                    last = pts = max(pts, last + 1)
                    stored = convert.reformat(decoded, format="rgb24", threads=1).to_ndarray()
                    picture = upright(stored, _display_matrix(decoded))
                    name = f"{index:05d}"
                    frame = Frame(picture, index, name, pts, self.time_base, decoded.duration or 0)
                    yield frame
                    index += 1
                    place = f"after frame {index} ({frame.time:.2f} s)"
        if self._end is not None and end < self._end - Fraction(1, 2):
            whole = float(self._end - self._start)
            raise InputError(f"{self.path}: cut off {place}, it should last {whole:.2f} s")


@contextlib.contextmanager
def _reading(path: Path, place: Any = None) -> Iterator[None]:
    """FFmpeg's errors become one line that names the file, and how far it could be read."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, (av.error.PermissionError, av.error.IsADirectoryError)):
            raise InputError(f"{path}: cannot be read: {str(error.strerror).lower()}") from None
        if place is None:
            raise InputError(f"{path}: neither a picture nor a video that can be read") from None
        raise InputError(f"{path}: damaged or cut off {place()} ({error.strerror})") from None


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


def _start(container: Any) -> Fraction:
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
        return Fraction(container.duration, av.time_base) + _start(container)
    return None


def _check_index(path: Path, container: Any, stream: Any) -> None:
    """An index (MP4, MOV) that points behind the end of the file."""
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


def ahead(items: Iterable[T], depth: int = 4) -> Generator[T]:
    """The same items, made by a thread that is at most `depth` of them ahead."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, what: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((kind, what), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="vsod-decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, what = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise what
            yield what
    finally:
        stopped.set()
        thread.join()


# ---- writing


class Writer(Protocol):
    """Takes (H, W), (H, W, 3) or (H, W, 4) uint8 pictures, each with the frame it was made of."""

    notes: list[str]  # what the user should know of the file, one line each

    def write(self, picture: np.ndarray, frame: Frame) -> None: ...

    def close(self, *, stopped: bool = False) -> None:
        """Ends the file, which is then playable; stopped: the sound ends with the last frame."""


@contextlib.contextmanager
def open_writer(
    output: str | os.PathLike[str], source: Source, *, overwrite: bool = False
) -> Iterator[Writer]:
    """A writer to `output`, by its ending: .mp4, .mov, .webm, .gif, one .png, none for a folder.

    The output appears under its name when the block ends after `close()`; when the block raises,
    nothing is left and what was there before is untouched.

    Raises InputError when the output is an input, exists (without `overwrite`), cannot hold the
    frames of `source`, or cannot be written.
    """
    output = Path(output)
    check_output(output, source, overwrite)
    ending = output.suffix.lower()
    part: contextlib.AbstractContextManager[Path]
    if ending in OUTPUT_ENDINGS:
        part = whole_file(output)
    elif output.is_dir() and any(output.iterdir()):
        part = _into_folder(output)
    else:
        part = whole_folder(output)
    with contextlib.ExitStack() as stack:
        with _writing(output):
            path = stack.enter_context(part)
        writer: Writer
        if ending in (".mp4", ".mov", ".webm"):
            writer = Video(path, output, source)
        elif ending == ".gif":
            writer = Gif(path, output, source)
        else:
            writer = Png(path, output)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to see
                writer.close(stopped=True)
            raise
        with _writing(output):
            stack.close()


def check_output(output: Path, source: Source, overwrite: bool) -> None:
    """Raises InputError when `output` cannot be written from `source`, before any work is done."""
    ending = output.suffix.lower()
    folder = output.is_dir() or not ending
    if not folder and ending not in OUTPUT_ENDINGS:
        known = " ".join(OUTPUT_ENDINGS)
        raise InputError(f"{output}: cannot write {ending}, only {known} or a folder of PNG")
    if folder and ending in OUTPUT_ENDINGS:
        raise InputError(f"{output}: is a folder; a file is to be written there")
    targets = [output]
    if folder and isinstance(source, Pictures):
        targets = [output / f"{path.stem}.png" for path in source.files]
        first: dict[Path, Path] = {}
        for target, path in zip(targets, source.files, strict=True):
            if target in first:
                raise InputError(f"{path}: would be written to {target}, as {first[target]} would")
            first[target] = path
    inputs = {(s.st_dev, s.st_ino): p for p in source.files if (s := p.stat())}
    for target in targets:
        if target.exists():
            status = target.stat()
            if (status.st_dev, status.st_ino) in inputs:
                raise InputError(f"{target}: is an input, and inputs are never overwritten")
    there = output.is_dir() and any(output.iterdir()) if folder else os.path.lexists(output)
    if folder and output.exists() and not output.is_dir():
        there = True
    if there and not (overwrite and (not folder or output.is_dir())):
        raise InputError(f"{output}: exists already; give another name or --overwrite")
    if ending == ".png" and (source.frames or 1) > 1:
        raise InputError(
            f"{output}: holds one picture, {source.name} has {source.frames}; give a folder"
        )
    if not folder and ending != ".png" and isinstance(source, Pictures):
        _check_same_size(source)


def _check_same_size(source: Pictures) -> None:
    from PIL import Image

    first = None
    for path in source.files:
        try:
            with Image.open(path) as picture:
                size = picture.size
        except (OSError, SyntaxError, ValueError):
            continue  # the reader says what is wrong with it
        first = first or size
        # A turned photograph swaps its sides: the writer sees to those.
        if sorted(size) != sorted(first):
            raise InputError(_other_size(str(path), size, first))


def _other_size(name: str, size: Sequence[int], first: Sequence[int]) -> str:
    return (
        f"{name}: is {size[0]}x{size[1]} and the frames before {first[0]}x{first[1]}, "
        "a video has one size; write a folder of PNG instead"
    )


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{output}: cannot be written: {reason}") from None


@contextlib.contextmanager
def _into_folder(path: Path) -> Iterator[Path]:
    """As `whole_folder`, for one with files in it: those of the same name are replaced."""
    with tempfile.TemporaryDirectory(prefix=".new-", suffix=".part", dir=path) as part:
        yield Path(part)
        for file in Path(part).iterdir():
            os.replace(file, path / file.name)


class Png:
    """One picture, or a folder with one for each frame, of its own size: grey, RGB or RGBA."""

    def __init__(self, path: Path, output: Path):
        self.path, self.output, self.folder = path, output, path.is_dir()
        self.notes: list[str] = []

    def write(self, picture: np.ndarray, frame: Frame) -> None:
        if frame.index and not self.folder:
            raise InputError(f"{self.output}: holds one picture and there are more; give a folder")
        with _writing(self.output):
            path = self.path / f"{frame.name}.png" if self.folder else self.path
            path.write_bytes(encode_png(picture))

    def close(self, *, stopped: bool = False) -> None:
        pass


def encode_png(picture: np.ndarray) -> bytes:
    """PNG of (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA uint8."""
    if picture.ndim == 3:
        to = cv2.COLOR_RGB2BGR if picture.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        picture = cv2.cvtColor(picture, to)
    return cv2.imencode(".png", picture)[1].tobytes()


def _to_av(picture: np.ndarray) -> Any:
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    form = "rgba" if picture.shape[2] == 4 else "rgb24"
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=form)


class Video:
    """MP4 (H.264), MOV (H.264, or ProRes 4444 for RGBA) or WebM (VP9), with the source's sound.

    Times are the source's own (WebM counts in milliseconds).  H.264 gets no B-frames: the length
    of the last frame of a video of varying rate then survives.
    """

    def __init__(self, path: Path, output: Path, source: Source):
        self.output, self.source = output, source
        self.ending = output.suffix.lower()
        options = {}
        if self.ending != ".webm":
            # The start of a stream is stored in the film's clock, 1/1000 s if nothing is said.
            scale = min(source.time_base.denominator, 10**6)
            options = {"movflags": "+faststart", "movie_timescale": str(max(1000, scale))}
        with _writing(output):
            self.container: Any = av.open(str(path), "w", container_options=options)
        self.convert = VideoReformatter()  # as in reading
        self.stream: Any = None
        self.sound: Sound | None = None
        self.size: tuple[int, int] | None = None
        self.notes: list[str] = []

    def _start(self, picture: np.ndarray, frame: Frame) -> None:
        height, width = picture.shape[:2]
        self.size = (width, height)
        alpha = picture.ndim == 3 and picture.shape[2] == 4
        if self.ending == ".webm":
            codec, pixels = "libvpx-vp9", "yuva420p" if alpha else "yuv420p"
            options = {"crf": "24", "b": "0", "row-mt": "1", "cpu-used": "4"}
        elif alpha:
            codec, pixels = "prores_ks", "yuva444p10le"
            options = {"profile": "4444", "alpha_bits": "16", "vendor": "apl0"}
        else:
            # H.264 halves its colour planes, which needs even sides; only 4:4:4 keeps odd ones.
            odd = width % 2 or height % 2
            codec, pixels = "libx264", "yuv444p" if odd else "yuv420p"
            options = {"crf": "18", "bf": "0"}
            if odd:
                self.notes.append(
                    f"{self.output}: {width}x{height} is odd, which H.264 keeps only as 4:4:4; "
                    "QuickTime and Safari play .webm instead"
                )
        stream = self.container.add_stream(codec, rate=self.source.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        context = stream.codec_context
        context.time_base = frame.time_base
        context.flags |= av.codec.context.Flags.frame_duration
        context.sample_aspect_ratio = self.source.pixel_aspect
        # What players assume of an untagged file, and said as well.
        self.colours = Colorspace.ITU709 if height >= 720 else Colorspace.SMPTE170M
        context.colorspace = self.colours
        context.color_range = ColorRange.MPEG
        self.stream = stream
        if self.source.sound is not None:
            self.sound = Sound(self.source.sound, self.container, self.ending)
            if self.sound.left_out:
                self.notes.append(f"{self.source.name}: sound of unknown coding is left out")

    def write(self, picture: np.ndarray, frame: Frame) -> None:
        with _writing(self.output):
            if self.stream is None:
                self._start(picture, frame)
            size = (picture.shape[1], picture.shape[0])
            if size != self.size:
                raise InputError(_other_size(f"frame {frame.name}", size, self.size or size))
            made = self.convert.reformat(
                _to_av(picture),
                format=self.stream.pix_fmt,
                dst_colorspace=self.colours,
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            made.pts, made.time_base, made.duration = frame.pts, frame.time_base, frame.duration
            if self.sound is not None:
                self.sound.copy(frame.time)
            self.container.mux(self.stream.encode(made))
            self.last = frame

    def close(self, *, stopped: bool = False) -> None:
        with _writing(self.output):
            try:
                if self.stream is not None:
                    if self.sound is not None:
                        self.sound.copy(self.last.time if stopped else None)
                        self.sound.close()
                    self.container.mux(self.stream.encode(None))
            finally:
                self.container.close()


class Sound:
    """The sound of one file, laid into another as it grows.

    Packets are copied as they are where the container takes their coding, and else coded again:
    AAC for MP4 and MOV, Opus for WebM.
    """

    COPIED = types.MappingProxyType(
        {
            ".mp4": {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"},
            ".mov": {"aac", "ac3", "alac", "mp3", "pcm_s16le", "pcm_s16be", "pcm_s24le"},
            ".webm": {"opus", "vorbis"},
        }
    )

    def __init__(self, path: Path, container: Any, ending: str):
        self.container = container
        self.input: Any = av.open(str(path))
        self.start = _start(self.input)
        self.left_out = 0  # tracks that FFmpeg cannot read
        self.tracks: dict[int, Any] = {}  # index of the input stream -> what takes its packets
        for stream in self.input.streams.audio:
            if stream.codec_context is None:
                self.left_out += 1
                continue
            if stream.codec_context.name in self.COPIED[ending]:
                self.tracks[stream.index] = _CopiedTrack(stream, container)
            else:
                self.tracks[stream.index] = _CodedTrack(stream, container, ending)
        streams = [self.input.streams[index] for index in self.tracks]
        self.packets = self.input.demux(streams) if streams else iter(())
        self.next: Any = next(self.packets, None)

    def copy(self, until: float | None) -> None:
        """Everything that starts before `until` seconds, or all that is left."""
        while self.next is not None:
            packet = self.next
            if packet.pts is not None:  # the demuxer ends with an empty packet for each stream
                if until is not None and packet.pts * packet.time_base - self.start >= until:
                    return
                shift = round(self.start / packet.time_base)
                packet.pts -= shift
                packet.dts = packet.pts
                self.container.mux(self.tracks[packet.stream.index].take(packet))
            self.next = next(self.packets, None)

    def close(self) -> None:
        for track in self.tracks.values():
            self.container.mux(track.rest())
        self.input.close()


class _CopiedTrack:
    def __init__(self, stream: Any, container: Any):
        self.stream = container.add_stream_from_template(stream)

    def take(self, packet: Any) -> list[Any]:
        packet.stream = self.stream
        return [packet]

    def rest(self) -> list[Any]:
        return []


class _CodedTrack:
    def __init__(self, stream: Any, container: Any, ending: str):
        context = stream.codec_context
        if ending == ".webm":
            self.stream = container.add_stream("libopus", rate=48000)
            form = "flt"
        else:
            self.stream = container.add_stream("aac", rate=min(context.sample_rate, 48000))
            self.stream.bit_rate = 96000 * max(1, context.channels)
            form = "fltp"
        self.stream.layout = context.layout.name
        self.stream.codec_context.open()
        self.resampler = av.AudioResampler(
            form, context.layout, self.stream.rate, self.stream.codec_context.frame_size
        )

    def take(self, packet: Any) -> list[Any]:
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            return []  # a damaged piece of sound is left out, as players do
        frames = [made for frame in decoded for made in self.resampler.resample(frame)]
        return [coded for frame in frames for coded in self.stream.encode(frame)]

    def rest(self) -> list[Any]:
        frames = self.resampler.resample(None)
        return [coded for frame in [*frames, None] for coded in self.stream.encode(frame)]


class Gif:
    """GIF with a palette of its own for each frame; RGBA becomes transparent below alpha 128.

    It counts in 1/100 s, and players slow down below 2 of them: frames that come sooner after the
    one before are left out.
    """

    def __init__(self, path: Path, output: Path, source: Source):
        self.output, self.source = output, source
        with _writing(output):
            self.container: Any = av.open(str(path), "w")
        self.notes: list[str] = []
        self.graph: Any = None
        self.last = -2

    def _start(self, picture: np.ndarray) -> None:
        height, width = picture.shape[:2]
        self.size = (width, height)
        self.stream = self.container.add_stream("gif", rate=self.source.rate)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "pal8"
        self.stream.codec_context.time_base = Fraction(1, 100)
        graph = av.filter.Graph()
        form = av.VideoFormat("rgba" if picture.shape[2:] == (4,) else "rgb24")
        start = graph.add_buffer(
            width=width, height=height, format=form, time_base=Fraction(1, 100)
        )
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single")
        colours = graph.add("paletteuse", "new=1:dither=none")
        split_ends = graph.add("buffersink")
        start.link_to(split)
        split.link_to(colours, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(colours, 0, 1)
        colours.link_to(split_ends)
        graph.configure()
        self.graph = graph

    def write(self, picture: np.ndarray, frame: Frame) -> None:
        with _writing(self.output):
            if self.graph is None:
                self._start(picture)
            size = (picture.shape[1], picture.shape[0])
            if size != self.size:
                raise InputError(_other_size(f"frame {frame.name}", size, self.size))
            hundredths = round(frame.pts * frame.time_base * 100)
            if hundredths < self.last + 2:
                return
            self.last = hundredths
            made = _to_av(picture)
            made.pts, made.time_base = hundredths, Fraction(1, 100)
            self.graph.push(made)
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                frame = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            self.container.mux(self.stream.encode(frame))

    def close(self, *, stopped: bool = False) -> None:
        with _writing(self.output):
            try:
                if self.graph is not None:
                    self.graph.push(None)
                    self._drain()
                    self.container.mux(self.stream.encode(None))
            finally:
                self.container.close()
