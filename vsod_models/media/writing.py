"""Videos, GIFs and PNGs, written frame by frame, whole or not at all; a stream to a pipe."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ..errors import InputError
from ..files import inside, temporary_prefix, whole_file, whole_folder
from .planes import Planes, planes_of
from .reading import Frame, PathLike, Pictures, Source, open_container
from .sound import Sound

OUTPUT_ENDINGS = (".mp4", ".mov", ".webm", ".gif", ".png")
STANDARD_OUTPUT = "-"


class Writer(Protocol):
    """Takes (H, W), (H, W, 3) or (H, W, 4) uint8 pictures, each with the frame it was made of."""

    notes: list[str]  # what the user should know of the file, one line each

    def write(self, picture: np.ndarray, frame: Frame) -> None: ...

    def close(self, *, stopped: bool = False) -> None:
        """Ends the file, which is then playable; stopped: the sound ends with the last frame."""


@contextlib.contextmanager
def open_writer(output: PathLike, source: Source, *, overwrite: bool = False) -> Iterator[Writer]:
    """A writer to `output`, by its ending: .mp4, .mov, .webm, .gif, one .png, none for a folder.

    "-" is MPEG-TS to standard output, each frame as soon as it is written (Path("-") is a folder).
    Any other output appears under its name when the block ends after `close()`; when the block
    raises, nothing is left and what was there before is untouched.

    Raises InputError when the output is an input, exists (without `overwrite`), cannot hold the
    frames of `source`, or cannot be written.
    """
    check_output(output, source, overwrite)
    ending = ".mpegts" if output == STANDARD_OUTPUT else Path(output).suffix.lower()
    output = Path(output)
    part: contextlib.AbstractContextManager[Path]
    if ending == ".mpegts":
        part = contextlib.nullcontext(Path("pipe:1"))
    elif ending in OUTPUT_ENDINGS:
        part = whole_file(output, new=not overwrite)
    elif output.is_dir() and any(output.iterdir()):
        part = _into_folder(output)
    else:
        part = whole_folder(output)
    with contextlib.ExitStack() as stack:
        with _writing(output):
            path = stack.enter_context(part)
        writer: Writer
        if ending in (".mp4", ".mov", ".webm", ".mpegts"):
            writer = Video(path, output, source, ending)
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


def check_output(output: PathLike, source: Source, overwrite: bool) -> None:
    """Raises InputError when `output` cannot be written from `source`, before any work is done."""
    if output == STANDARD_OUTPUT:
        if os.isatty(1):
            raise InputError(
                "-: standard output is a terminal; pipe it into a player, or to a file"
            )
        if isinstance(source, Pictures):
            _check_same_size(source)
        return
    output = Path(output)
    ending = output.suffix.lower()
    folder = output.is_dir() or not ending
    if not folder and ending not in OUTPUT_ENDINGS:
        known = " ".join(OUTPUT_ENDINGS)
        raise InputError(
            f"{output}: cannot write {ending}, only {known}, or a folder of PNG, which has to "
            "exist where its name has a dot"
        )
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
        raise InputError(f"{output}: exists already; give another name or overwrite=True")
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
        except Exception:  # Pillow raises many kinds
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
    except BrokenPipeError:
        raise InputError(f"{output}: was closed by its reader") from None
    except (OSError, av.error.FFmpegError) as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{output}: cannot be written: {reason}") from None


@contextlib.contextmanager
def _into_folder(path: Path) -> Iterator[Path]:
    """As `whole_folder`, for one with files in it: those of the same name are replaced."""
    prefix = temporary_prefix(path)
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".part", dir=path) as part:
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
            path = inside(self.path, f"{frame.name}.png") if self.folder else self.path
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
    """The picture as a frame of FFmpeg's, without a copy."""
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    form = "rgba" if picture.shape[2] == 4 else "rgb24"
    return av.VideoFrame.from_numpy_buffer(np.ascontiguousarray(picture), format=form)


def _colours(height: int) -> Colorspace:
    """What players assume of an untagged file, and said as well."""
    return Colorspace.ITU709 if height >= 720 else Colorspace.SMPTE170M


class Video:
    """MP4, MPEG-TS or MOV (H.264; ProRes 4444 for RGBA in MOV), WebM (VP9); the source's sound.

    Times are the source's own (WebM counts in milliseconds).  H.264 gets no B-frames, so that
    the duration of the last frame survives where the frame rate varies.
    """

    def __init__(self, path: Path, output: Path, source: Source, ending: str):
        self.output, self.source, self.ending = output, source, ending
        options = {}
        if ending in (".mp4", ".mov"):
            # The start of a stream is stored in the film's clock, 1/1000 s if nothing is said.
            scale = min(source.time_base.denominator, 10**6)
            options = {"movflags": "+faststart", "movie_timescale": str(max(1000, scale))}
        with _writing(output):
            self.container: Any = av.open(
                str(path), "w", format=ending[1:], container_options=options
            )
        self.convert = VideoReformatter()  # as in reading
        self.stream: Any = None
        self.sound: Sound | None = None
        self.appended: bytes | None = None  # how the files are coded that are appended
        self.size: tuple[int, int] | None = None
        self.notes: list[str] = []

    def _start(self, size: tuple[int, int], alpha: bool, frame: Frame) -> None:
        self.size = width, height = size
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
            # As the preset veryfast, in three quarters of its time, for files an eighth larger.
            options = {"crf": "18", "bf": "0", "preset": "superfast"}
            if self.ending == ".mpegts":
                options["tune"] = "zerolatency"  # what looks ahead holds frames back
            else:
                options["x264-params"] = "mbtree=1:rc-lookahead=10"
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
        context.colorspace = _colours(height)
        context.color_range = ColorRange.MPEG
        self.stream = stream
        self._start_sound()

    def _start_sound(self) -> None:
        if self.source.sound is not None:
            self.sound = Sound(self.source.sound, self.container, self.ending)
            if self.sound.left_out:
                self.notes.append(
                    f"{self.source.name}: sound that {self.ending} cannot hold is left out"
                )

    def write(self, picture: np.ndarray, frame: Frame) -> None:
        with _writing(self.output):
            alpha = picture.ndim == 3 and picture.shape[2] == 4
            self._check_size((picture.shape[1], picture.shape[0]), alpha, frame)
            made = self.convert.reformat(
                _to_av(picture),
                format=self.stream.pix_fmt,
                dst_colorspace=_colours(picture.shape[0]),
                dst_color_range=ColorRange.MPEG,
                threads=1,
            )
            self._encode(made, frame)

    def planes(self, frame: Frame) -> Planes | None:
        """A copy of the frame as it would be coded, to be drawn on; None: it is coded otherwise."""
        return planes_of(frame.decoded, _colours(frame.picture.shape[0]))

    def write_planes(self, planes: Planes, frame: Frame) -> None:
        """Writes what `planes` gave, without the way through RGB that a picture takes."""
        with _writing(self.output):
            self._check_size(planes.size, False, frame)
            self._encode(planes.frame, frame)

    def _check_size(self, size: tuple[int, int], alpha: bool, frame: Frame) -> None:
        if self.stream is None:
            self._start(size, alpha, frame)
        if size != self.size:
            raise InputError(_other_size(f"frame {frame.name}", size, self.size or size))

    def _encode(self, made: Any, frame: Frame) -> None:
        made.pts, made.time_base, made.duration = frame.pts, frame.time_base, frame.duration
        if self.sound is not None:
            self.sound.copy(frame.time)
        self.container.mux(self.stream.encode(made))
        self.last = frame

    def append(self, path: Path) -> None:
        """The pictures of a file that such a writer wrote, as they are coded."""
        with _writing(self.output), open_container(path) as part:
            stream = part.streams.video[0]
            if self.stream is None:
                self.stream = self.container.add_stream_from_template(stream)
                self.stream.codec_context.framerate = self.source.rate
                self.stream.metadata.update(stream.metadata)  # of VP9, that it has alpha
                self.appended = bytes(stream.codec_context.extradata or b"")
                self._start_sound()
            if bytes(stream.codec_context.extradata or b"") != self.appended:
                raise InputError(f"{self.output}: its parts are coded differently")
            for packet in part.demux(stream):
                if packet.pts is not None:
                    if self.sound is not None:
                        self.sound.copy(float(packet.pts * packet.time_base))
                    packet.stream = self.stream
                    self.container.mux(packet)

    def close(self, *, stopped: bool = False) -> None:
        with _writing(self.output):
            try:
                if self.stream is not None:
                    if self.sound is not None:
                        self.sound.copy(self.last.time if stopped else None)
                        self.sound.close()
                    if self.appended is None:
                        self.container.mux(self.stream.encode(None))
            finally:
                self.container.close()


def join(parts: Sequence[Path], output: Path, source: Source, *, overwrite: bool = False) -> None:
    """Lays what `open_writer` wrote for parts of `source` end to end, with the source's sound.

    parts: files of the output's kind (not GIF), or folders; nothing of them is coded again.
    """
    with open_writer(output, source, overwrite=overwrite) as writer:
        for part in parts:
            if isinstance(writer, Video):
                writer.append(part)
            else:
                assert isinstance(writer, Png)
                for file in part.iterdir():
                    with _writing(output):
                        shutil.copyfile(file, writer.path / file.name)
        writer.close()


class Gif:
    """GIF with a palette of its own for each frame; RGBA becomes transparent below alpha 128.

    Times are in 1/100 s, and players slow down frames shorter than 2 of them: frames that come
    sooner after the one before are left out.
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
