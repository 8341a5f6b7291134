"""Progress bars, on stderr and only where that is a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator


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
def frames_progress(frames: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with frames/s and the time left, on a terminal; gives what `predict_file` calls."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    speed = TextColumn("{task.fields[speed]:.1f} frames/s")
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("frames", total=frames, speed=0.0)
        began = time.monotonic()

        def progress(done: int) -> None:
            bar.update(task, completed=done, speed=done / max(time.monotonic() - began, 1e-9))

        yield progress


def counted(number: int, what: str) -> str:
    """1 frame, 2 frames."""
    return f"{number} {what}{'' if number == 1 else 's'}"
