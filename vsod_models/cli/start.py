"""What makes a command of many large frames quick on a CPU, before torch is imported."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# glibc's numbers of mallopt's parameters
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Frames that are freed are used again, whichever thread freed them.

    glibc gives blocks of this size back to the system and fetches fresh pages for the next frame,
    which costs a quarter of the time of a fast model.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_ARENA_MAX, 1)
            mallopt(M_MMAP_THRESHOLD, 1 << 25)  # its upper limit
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def load_torch() -> threading.Thread | None:
    """Loads torch's largest library in a thread, without Python's lock; the import finds it there.

    Resolving its symbols is a sixth of the time that the import of torch takes.
    """
    torch = importlib.util.find_spec("torch")
    if sys.platform != "linux" or torch is None or torch.origin is None:
        return None
    library = Path(torch.origin).parent / "lib" / "libtorch_cpu.so"
    if not library.exists():
        return None
    call = ctypes.CDLL(None).dlopen  # as a foreign function, unlike `ctypes.CDLL(library)`
    call.argtypes, call.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    thread = threading.Thread(target=call, args=(os.fsencode(library), os.RTLD_NOW))
    thread.start()
    return thread


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Imports make half a million objects that stay: nothing to collect meanwhile or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(_thaw)


@contextlib.contextmanager
def shared_threads(shared: bool) -> Iterator[None]:
    """Half of the threads of torch and OpenCV where their callers run side by side.

    More would only wait for one another, which they do at full load.
    """
    import cv2
    import torch

    threads, of_cv2 = torch.get_num_threads(), cv2.getNumThreads()
    if shared:
        torch.set_num_threads(max(1, threads // 2))  # which threads that start later take over
        cv2.setNumThreads(max(1, of_cv2 // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(of_cv2)


def leave_at_once() -> Callable[[], None]:
    """Gives what to call when all is done: the process then ends with 0.

    Exit handlers that were registered since then run before; earlier ones do not run.

    Python would free the half a million objects of its modules one by one, for a quarter of a
    second.
    """
    done = threading.Event()

    def leave() -> None:
        if done.is_set():
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()  # if that fails, Python ends as it does then
            os._exit(0)

    atexit.register(leave)  # the first to come is the last to be called
    return done.set


def _thaw() -> None:
    """Triton's binding library reports what is not collected at the end as leaked."""
    if "triton" in sys.modules:
        gc.unfreeze()
