"""Progress bars, on stderr and only where that is a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


def track(text: str) -> Callable[[Iterable, int], Iterable]:
    """A progress bar on stderr, where that is a terminal."""

    def tracked(items: Iterable, total: int) -> Iterable:
        from rich.console import Console
        from rich.progress import track as bar

        console = Console(stderr=True)
        hidden = not console.is_terminal
        return bar(items, text, total=total, console=console, disable=hidden, transient=True)

    return tracked


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal; gives what to call after each of `total` steps."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def frames_progress(
    frames: int | None, more: Callable[[], str] = str
) -> Iterator[Callable[[int], None]]:
    """A bar with frames/s and the time left, on a terminal; gives what `predict_file` calls.

    more: what stands behind the frames/s.
    """
    with _speed_bar(frames, more=more) as update:
        yield lambda done: update(done, done)


@contextlib.contextmanager
def videos_progress(
    videos: int, hidden: bool = False
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar of videos with frames/s and the time left; gives what takes rows of a manifest."""
    done = frames = 0
    with _speed_bar(videos, hidden) as update:

        def progress(row: Mapping[str, Any]) -> None:
            nonlocal done, frames
            done, frames = done + 1, frames + (0 if row["kept"] else row["frames"])
            update(done, frames)

        yield progress


@contextlib.contextmanager
def _speed_bar(
    total: int | None, hidden: bool = False, more: Callable[[], str] = str
) -> Iterator[Callable[[int, int], None]]:
    """Gives what takes how many are done, and how many frames so far."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    speed = TextColumn("{task.fields[speed]:.1f} frames/s{task.fields[more]}")
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(),
        console=console, disable=hidden or not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total, speed=0.0, more="")
        began = time.monotonic()

        def update(done: int, frames: int) -> None:
            speed = frames / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, speed=speed, more=more())

        yield update


def counted(number: int, what: str) -> str:
    """1 frame, 2 frames."""
    return f"{number} {what}{'' if number == 1 else 's'}"
