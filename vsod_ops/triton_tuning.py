"""What the Triton kernels of every op share: the device, timings that choose tile sizes, and
numbers in tuples."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it beside `number`

# Kernels run in Triton's interpreter, on CPU tensors.
INTERPRET = bool(triton.knobs.runtime.interpret)

Tile = TypeVar("Tile")


class Device(NamedTuple):
    """What a choice of tiles looks at."""

    major: int  # of the compute capability
    workers: int  # multiprocessors
    shared: int  # bytes of shared memory that a program may have


@functools.cache
def describe(index: int | None) -> Device:
    """The CUDA device of this index; None stands for the interpreter."""
    if index is None:
        return Device(9, 132, 232448)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.major,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def is_capturing() -> bool:
    """Whether launches go into a CUDA graph, so that nothing can be timed."""
    return not INTERPRET and torch.cuda.is_current_stream_capturing()


def precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are computed: "tf32" where torch allows it, else "ieee"."""
    # This one getter is right whichever of torch's three switches was set.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and not INTERPRET else "ieee"


def opaque(value):
    """A number, or a tuple of tuples of numbers, for kernels to read with `number`.

    Inside a tuple Triton compiles anew for every number that is 1 or a multiple of 16, whatever
    the kernel asks for.  4 n + 2 is neither.  Numbers must not be negative.
    """
    if isinstance(value, int):
        return 4 * value + 2
    numbers = map(opaque, value)
    return type(value)(*numbers) if hasattr(value, "_fields") else tuple(numbers)


@triton.jit
def number(value):
    """The number that `opaque` hid.  One operation: a second one costs registers that spill."""
    return value >> 2


class Timings:
    """Tiles timed once per shape class, and what that says for every shape of the class."""

    def __init__(self) -> None:
        # Shape class -> tile -> milliseconds a unit of its span.
        self.rates: dict[Hashable, dict] = {}
        self._lock = threading.Lock()

    def fastest(
        self,
        shape_class: Hashable,
        tiles: Sequence[Tile],
        span: Callable[[Tile], float],
        launch: Callable[[Tile], object],
        untimed: Callable[[], Tile],
    ) -> Tile:
        """The tile for a launch, timing all of them if its shape class is new.

        span gives how long a launch takes, up to a factor for the shape class and tile.  A launch
        may be repeated: no kernel overwrites what it reads.  untimed gives the tile to take while
        a CUDA graph is captured.
        """
        if len(tiles) == 1:
            return tiles[0]
        with self._lock:
            if shape_class not in self.rates:
                if is_capturing():
                    return untimed()
                self.rates[shape_class] = {t: _milliseconds(launch, t) / span(t) for t in tiles}
        rates = self.rates[shape_class]
        return min(rates, key=lambda t: rates[t] * span(t))


def _milliseconds(launch: Callable[[Tile], object], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:  # a smaller chip than the tile was chosen for
        return math.inf
