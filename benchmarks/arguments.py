"""The arguments that all benchmarks take, and what they set."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import BadInput, measure


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def sizes(form: str) -> Callable[[str], tuple[int, ...]]:
    """A parser of sizes like 1x5x28x28 for a form like BxTxHxW."""
    count = form.count("x") + 1

    def parse(text: str) -> tuple[int, ...]:
        parts = text.lower().split("x")
        if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {form}, {count} positive whole numbers"
            )
        return tuple(int(part) for part in parts)

    return parse


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--dtype",
        action="append",
        choices=list(measure.DTYPES),
        help=f"may be given more than once (default: {default})",
    )


def add_baselines(parser: argparse.ArgumentParser, there: Iterable[str]) -> None:
    known = tuple(there)

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"no baseline {unknown[0]!r}; there are {', '.join(known)}"
            )
        return names

    parser.add_argument(
        "--baselines",
        type=parse,
        default=known,
        metavar="NAMES",
        help=f"rivals, separated by commas, out of {', '.join(known)} (default: all)",
    )


def add_common(
    parser: argparse.ArgumentParser,
    *,
    seconds: float | None = None,
    seconds_help: str = "",
    device: str | None = "cpu",
) -> None:
    """Device, threads, time, seed and the folder for results; `device` None: a GPU if there.

    seconds_help: none for a benchmark that takes the time it takes.
    """
    add = parser.add_argument
    default = device or "cuda where there is a GPU, else cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default: {default}")
    add("--threads", type=positive, help="CPU threads (default: those of torch)")
    if seconds_help:
        add("--seconds", type=duration, default=seconds, help=seconds_help)
    add("--seed", type=int, default=0)
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=measure.ROOT / "benchmarks" / "out",
        help="folder for JSON, CSV and plots (default: benchmarks/out)",
    )


def begin(args: argparse.Namespace) -> torch.device:
    """Sets the threads and the allocator, and gives the device.

    Raises:
        BadInput: there is no GPU.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no GPU here")
    measure.one_heap()
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
