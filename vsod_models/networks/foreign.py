"""Models that somebody else wrote: what a factory returns, checked; networks of single frames."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, one_line
from ..limits import MOST_PIXELS
from .contract import SaliencyModel

DEFAULT_SIZE = (384, 384)  # of a network that does not say


class PerFrame(SaliencyModel):
    """A network of single frames: (N, 3, H, W) RGB -> logits (N, 1, h, w) or (N, h, w).

    Args:
        network: sees frames in [0, 1], less `mean`, over `std`.
        source: who wrote it, for errors.
        image_size, side_multiple: see `SaliencyModel`.
        mean, std: of the three channels.
    """

    clip_length, outputs = 1, "all"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        source: str,
        image_size: Sequence[int] = DEFAULT_SIZE,
        *,
        side_multiple: int | None = None,
        mean: Sequence[float] = (0, 0, 0),
        std: Sequence[float] = (1, 1, 1),
    ):
        super().__init__()
        self.network, self.source = network, source
        self.image_size = (image_size[0], image_size[1])
        self.side_multiple = side_multiple
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])
        if not self.mean.shape == self.std.shape == (3, 1, 1) or not self.std.all():
            raise ValueError("three numbers each are needed, and none of std is 0")

    def encode(self, frames: Tensor, prior: Tensor | None = None) -> list[Tensor]:
        flat = (frames.flatten(0, 1) - self.mean) / self.std
        logits = self.network(flat)
        if isinstance(logits, Tensor) and logits.ndim == 3:
            logits = logits[:, None]
        if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[:2] != (len(flat), 1):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"model {self.source}: gives {got} for frames {tuple(flat.shape)}; logits "
                f"({len(flat)}, 1, H, W) are needed"
            )
        return [logits.unflatten(0, frames.shape[:2])]

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        (logits,) = maps
        flat = logits.flatten(0, 1).float()
        resized = F.interpolate(flat, tuple(size), mode="bilinear", align_corners=False)
        return resized.unflatten(0, logits.shape[:2])


def read_numbers(
    source: str, said: Mapping[str, str], key: str, count: int, kind: Any, default: str = ""
) -> list[Any]:
    """ "0.5,0.5,0.5" under `key`, or else `default`, -> `count` finite numbers of this kind."""
    text = said.get(key, default)
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"model {source}: {key} is {text!r}; {count} numbers with commas are needed"
        )
    return numbers


def import_factory(source: str) -> Any:
    """The object that "module:name" names; the current folder is searched, too, and last.

    Raises:
        InputError: there is no such module or name, or importing it fails.
    """
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:  # last: a file here takes no library's place
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise InputError(
                f"model {source}: no module {error.name} is installed or in {os.getcwd()}"
            ) from None
        raise InputError(f"model {source}: {module} needs {error.name}") from error
    except (Exception, SystemExit) as error:
        raise InputError(
            f"model {source}: importing {module} fails: {type(error).__name__}: {one_line(error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            where = getattr(sys.modules[module], "__file__", None) or module
            raise InputError(f"model {source}: there is no {name} in {where}")
        found = getattr(found, part)
    return found


def from_factory(factory: Callable[[], Any] | nn.Module, source: str) -> SaliencyModel:
    """What a factory returns: a `SaliencyModel`, or an `nn.Module` that is wrapped by `PerFrame`.

    An `nn.Module` may say its `image_size`, `side_multiple`, `mean` and `std`.

    Raises:
        InputError: it fails, returns something else, or what it returns promises nonsense.
    """
    made = factory
    if isinstance(factory, type) or not isinstance(factory, nn.Module):
        if not callable(factory):
            raise InputError(f"model {source}: is {type(factory).__name__}, not a function")
        try:
            made = factory()
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(
                f"model {source}: {type(error).__name__}: {one_line(error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise InputError(
            f"model {source}: returns {type(made).__name__}; a SaliencyModel or an nn.Module of "
            "frames to logits is needed"
        )
    if not isinstance(made, SaliencyModel):
        size = getattr(made, "image_size", DEFAULT_SIZE)
        _check_size(size, source)
        try:
            made = PerFrame(
                made, source, size,
                side_multiple=getattr(made, "side_multiple", None),
                mean=getattr(made, "mean", (0, 0, 0)), std=getattr(made, "std", (1, 1, 1)),
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(f"model {source}: mean and std: {one_line(error)}") from None
    made.source = source
    _check(made, source)
    return made


def _check(model: SaliencyModel, source: str) -> None:
    _check_size(getattr(model, "image_size", None), source)
    length, outputs = getattr(model, "clip_length", None), getattr(model, "outputs", None)
    if not isinstance(length, int) or not 1 <= length <= 1024:
        raise InputError(f"model {source}: clip_length is {length!r}; 1 to 1024 frames are needed")
    if outputs not in ("all", "last"):
        raise InputError(f"model {source}: outputs is {outputs!r}; it has to be 'all' or 'last'")
    multiple = model.side_multiple
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise InputError(f"model {source}: side_multiple is {multiple!r}; 1 or more is needed")


def _check_size(size: Any, source: str) -> None:
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(n, int) and n > 0 for n in size):
        raise InputError(f"model {source}: image_size is {size!r}; (height, width) is needed")
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(f"model {source}: image_size is {size!r}; at most {MOST_PIXELS} pixels")
