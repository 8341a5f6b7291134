"""`vsod example`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .progress import counted


def example(
    output: Annotated[Path, typer.Argument(help=".mp4 .mov .webm .gif, or a folder for PNG.")],
    photo: Annotated[str, typer.Option(help="coffee, astronaut or cat.")] = "coffee",
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 3.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write a short clip with sound, to try `vsod predict` with: a camera over a photograph."""
    from ..media.example import write_example

    frames = write_example(output, photo, seconds, overwrite=overwrite)
    print(f"{output}: {counted(frames, 'frame')} of {photo}")
