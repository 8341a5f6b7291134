"""What people drop on the page: kept under names of ours, and looked at before it is decoded."""

from __future__ import annotations

import re
import secrets
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

MAX_PIXELS = 2**26  # of a frame; a few kB of PNG can hold many more
MAX_FRAMES = 100_000

# What a file is, by its first bytes: FFmpeg and Pillow also open playlists and programs, which
# name other files.
PICTURES = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    *((b"P%d" % kind, ".pnm") for kind in range(1, 7)),
)
VIDEOS = (
    (0, b"\x1aE\xdf\xa3", ".mkv"),
    (0, b"GIF8", ".gif"),
    (0, b"OggS", ".ogv"),
    (0, b"FLV", ".flv"),
    (0, b"\0\0\x01\xba", ".mpg"),
    (0, b"\0\0\x01\xb3", ".mpg"),
    (0, b"0&\xb2u", ".wmv"),
    (0, b"G", ".ts"),
    (4, b"ftyp", ".mp4"),
    (4, b"moov", ".mov"),
    (4, b"mdat", ".mov"),
    (4, b"wide", ".mov"),
    (4, b"free", ".mov"),
    (8, b"AVI ", ".avi"),
)


@dataclass
class Clip:
    """A video or a picture that was uploaded."""

    id: str
    name: str  # as the user calls it: shown, and part of what downloads are called; never a path
    path: Path
    picture: bool
    frames: int | None
    width: int
    height: int
    rate: float
    sound: bool

    def about(self) -> dict[str, Any]:
        kept = ("id", "name", "picture", "frames", "width", "height", "rate", "sound")
        return {key: getattr(self, key) for key in kept}


def shown_name(given: str) -> str:
    """The last part of a name, without what no file name should have."""
    last = re.split(r"[/\\]", given)[-1]
    return re.sub(r"[^\w .()+-]", "_", last).strip(" .")[:100] or "clip"


def ending_of(head: bytes) -> tuple[str, bool] | None:
    """Ending, and whether it is a picture; None for what is neither."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp", True
    for magic, ending in PICTURES:
        if head.startswith(magic):
            return ending, True
    for at, magic, ending in VIDEOS:
        if head[at:].startswith(magic):
            return ending, False
    return None


class Clips:
    """The clips of a running server, each in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of: dict[str, Clip] = {}

    def new_file(self) -> Path:
        """Where an upload is written before anybody knows what it is."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder / "upload"

    def add(self, upload: Path, name: str) -> Clip:
        """Takes what was written to `new_file()`.

        Raises InputError, and removes it, where it is no picture or video or is too large a one.
        """
        name = shown_name(name)
        path = upload
        try:
            with upload.open("rb") as file:
                found = ending_of(file.read(16))
            if found is None:
                raise InputError(f"{name}: neither a picture nor a video that can be read")
            path = upload.rename(upload.with_name("source" + found[0]))
            clip = _look(path, name, found[1])
        except InputError as error:
            shutil.rmtree(upload.parent, ignore_errors=True)
            raise InputError(str(error).replace(str(path), name)) from None
        self.of[clip.id] = clip
        return clip

    def add_example(self) -> Clip:
        """The clip of `vsod example`."""
        from ..media.example import write_example

        upload = self.new_file()
        made = upload.with_name("made.mp4")
        write_example(made)
        return self.add(made.rename(upload), "example.mp4")

    def remove(self, clip: Clip) -> None:
        self.of.pop(clip.id, None)
        shutil.rmtree(clip.path.parent, ignore_errors=True)


def _look(path: Path, name: str, picture: bool) -> Clip:
    from ..media.reading import open_source

    width, height = _picture_size(path) if picture else _video_size(path)
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width}x{height} is more than {MAX_PIXELS // 2**20} megapixels")
    source: Any = open_source(path)
    if (source.frames or 0) > MAX_FRAMES:
        raise InputError(f"{name}: has {source.frames} frames, at most {MAX_FRAMES} are taken")
    first = next(iter(source)).picture
    return Clip(
        path.parent.name, name, path, picture, source.frames, first.shape[1], first.shape[0],
        float(source.rate), source.sound is not None,
    )  # fmt: skip


def _picture_size(path: Path) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:  # reads the header only
                return opened.size
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_PIXELS // 2**20} megapixels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def _video_size(path: Path) -> tuple[int, int]:
    import av

    from ..media.reading import open_container

    try:
        with open_container(path) as container:
            sizes = [
                (s.codec_context.width, s.codec_context.height)
                for s in container.streams.video
                if s.codec_context is not None
            ]
    except (av.error.FFmpegError, OSError):
        raise InputError(f"{path}: neither a picture nor a video that can be read") from None
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
