"""Worker processes of a command: how many, and what Ctrl-C does while they start."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


def available_cores() -> int:
    """What this process may use, which can be less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def interrupt(number: int, frame: Any) -> None:
    """SIGTERM and Ctrl-C do the same, but that shells ignore Ctrl-C in the background."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)
    elif number == signal.SIGTERM:
        raise KeyboardInterrupt


@contextlib.contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Ctrl-C, and SIGTERM where it is as good as that, wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda *signals: waiting.append(signals))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    for one in waiting:
        interrupt(*one)


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that start in the block never see Ctrl-C, which a terminal sends to all of them.

    The first one ends them, and sees it when the block is over: a process that is half started
    would complain.
    """
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if not masks or threading.current_thread() is not threading.main_thread():
        yield
        return
    with ctrl_c_later():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what children inherit
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
