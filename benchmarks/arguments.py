"""The arguments that all benchmarks take, and what they set."""

import argparse
import math
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


def add_common(
    parser: argparse.ArgumentParser,
    *,
    seconds: float | None,
    seconds_help: str,
    device: str | None = "cpu",
) -> None:
    """Device, threads, time, seed and the folder for results; `device` None: a GPU if there."""
    add = parser.add_argument
    default = device or "cuda where there is a GPU, else cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default: {default}")
    add("--threads", type=positive, help="CPU threads (default: those of torch)")
    add("--seconds", type=duration, default=seconds, help=seconds_help)
    add("--seed", type=int, default=0)
    add(
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
