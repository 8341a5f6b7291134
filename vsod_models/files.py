"""Files: order and kinds of names, names that stay inside a folder, writing whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np

PICTURE_ENDINGS = (
    ".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
Name = TypeVar("Name", str, Path)


def is_picture(path: Path) -> bool:
    """Whether its name has the ending of a picture."""
    return path.suffix.lower() in PICTURE_ENDINGS


def natural_order(names: Iterable[Name]) -> list[Name]:
    """frame2 before frame10."""
    from natsort import natsorted

    return natsorted(sorted(names), key=str)  # sorted first: frame1 and frame01 are equal to it


def is_plain(name: str) -> bool:
    """Whether this is the name of something in a folder, and so leads nowhere else."""
    return name not in ("", ".", "..") and not any(c in "/\\\0\n\r" for c in name)


def inside(folder: str | os.PathLike[str], *names: str) -> Path:
    """`folder/name/...`, where every name is plain; InputError for one that leads outside."""
    path = Path(folder)
    for name in names:
        if not is_plain(name):
            raise InputError(f"{path}: {name!r} is not the name of a file or folder in it")
        path /= name
    return path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same ending, to write to.

    When the block succeeds, the file is flushed to the disk and takes the name `path`, in one
    step; when it raises, nothing is left behind and what lay at `path` is untouched.

    new: FileExistsError where `path` exists when the block ends, whoever made it meanwhile.
    """
    path = Path(path)
    with _folder(path.parent):
        yield from _whole_file(path, new)


def _whole_file(path: Path, new: bool) -> Iterator[Path]:
    try:
        handle, name = tempfile.mkstemp(
            prefix=temporary_prefix(path), suffix=".part" + path.suffix, dir=path.parent
        )
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        if new:
            _claim(part, path)
        else:
            os.replace(part, path)
    except OSError as error:  # a full disk: writing does not say where
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


def _claim(part: Path, path: Path) -> None:
    """Renames, in one step and only where there is nothing yet."""
    try:
        os.link(part, path)  # unlike a rename it replaces nothing
    except FileExistsError:
        raise FileExistsError(
            errno.EEXIST, "was made by another program meanwhile", str(path)
        ) from None
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """As `whole_file`, for a folder that does not exist yet or is empty.

    replace: a folder that is there is removed once the new one is whole.
    """
    path = Path(path)
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")
    with _folder(path.parent):
        yield from _whole_folder(path, replace)


def _whole_folder(path: Path, replace: bool) -> Iterator[Path]:
    part = Path(tempfile.mkdtemp(prefix=temporary_prefix(path), suffix=".part", dir=path.parent))
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        try:
            if replace and path.exists():
                os.replace(path, former := part.with_name(part.name + ".part"))
                try:
                    os.replace(part, path)
                except OSError:
                    os.replace(former, path)
                    raise
                shutil.rmtree(former, ignore_errors=True)
            else:
                os.replace(part, path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def temporary_folder(name: str) -> Path:
    """A new folder for what lives as long as its process; what dead ones left of theirs goes."""
    parent = Path(tempfile.gettempdir())
    _clear(parent)
    prefix = temporary_prefix(parent / name)
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=parent))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Makes a folder to write to; if the block fails, those that are empty again go."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    _clear(path)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@functools.cache
def _machine() -> str:
    """Where process numbers mean the same: this machine, or this container of it."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def temporary_prefix(path: Path) -> str:
    """Of a temporary name beside `path`, or in it: whose it is, so that it can be cleared away."""
    return f".{path.stem[:40]}-{_machine()}-{os.getpid()}-"


@functools.cache  # once for each folder: listing a large one for every file would be slow
def _clear(folder: Path) -> None:
    """Removes what processes of this machine that are dead left behind in a folder."""
    for left in folder.glob(f".*-{_machine()}-*.part*"):
        owner = re.search(rf"-{_machine()}-(\d+)-[^-]*\.part", left.name)
        if owner is None or _alive(int(owner[1])):
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """One process at a time: InputError where another one holds `folder`, for the same `what`.

    The lock goes with its process, however that ends; its file `.lock` stays, except in a folder
    that was new and that nothing came into.
    """
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{folder}: {what} is running in it already") from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        if new and set(folder.glob("*")) <= {folder / ".lock"}:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def need_file(path: Path) -> None:
    """InputError for what exists but is not a file: reading a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, not a file"
        )


def read_json(file: Path, what: str) -> Any:
    """What a JSON file holds; if it is not JSON, InputError names it and `what` it should be."""
    need_file(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such {what}") from None
    except (ValueError, RecursionError) as error:  # also of UTF-8, and numbers without end
        raise InputError(f"{file}: not JSON, so not the {what} ({error})") from None


def write_png(path: Path, picture: np.ndarray) -> None:
    """A picture, uint8 (H, W), whole or not at all; cv2.imwrite is silent about a full disk."""
    import cv2

    _, data = cv2.imencode(".png", picture)
    with whole_file(path) as part:
        part.write_bytes(data.tobytes())
