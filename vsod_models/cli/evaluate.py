"""`vsod eval`."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..files import whole_file


def evaluate(
    pred: Annotated[
        list[str],
        typer.Option(
            help="Folder of <sequence>/<frame>.png, or NAME=FOLDER; several are compared."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    dataset: Annotated[str, typer.Option(help="Its name, as `vsod data` takes it.")],
    split: Annotated[str, typer.Option(help="Its split.")] = "val",
    protocol: Annotated[str, typer.Option(help="davsod, davsod-raw or frame.")] = "davsod",
    json: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write them to this CSV file.")] = None,
    curves: Annotated[
        Path | None, typer.Option(help="Draw the PR and F curves: .png, .svg or .pdf.")
    ] = None,
    scatter: Annotated[
        Path | None, typer.Option(help="Draw S against MAE, a point for each --pred.")
    ] = None,
    bars: Annotated[Path | None, typer.Option(help="Draw MAE, a bar for each --pred.")] = None,
    grid: Annotated[
        Path | None,
        typer.Option(help="Draw frames, ground truth and maps of each --pred: also .jpg."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out frames without a prediction.")
    ] = False,
    flicker: Annotated[
        bool, typer.Option("--flicker", help="Also how much masks change along the optical flow.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes (default: one for each core).")
    ] = None,
) -> None:
    """MAE, F, S, E and weighted F of saliency maps, under a named protocol."""
    from rich.console import Console
    from rich.progress import Progress

    from ..data import open_dataset
    from ..evaluation.evaluator import evaluate_folder
    from ..evaluation.figures import draw_bars, draw_curves, draw_grid, draw_scatter
    from ..evaluation.flicker import flicker_of_folder
    from ..evaluation.protocols import get_protocol
    from ..evaluation.report import write_csv, write_json
    from ..workers import available_cores
    from .tables import show

    get_protocol(protocol)
    drawings = {"--curves": curves, "--scatter": scatter, "--bars": bars, "--grid": grid}
    for flag, path in drawings.items():
        endings = (".png", ".svg", ".pdf", *([".jpg"] if flag == "--grid" else []))
        if path is not None and path.suffix.lower() not in endings:
            known = f"{', '.join(endings[:-1])} or {endings[-1]}"
            raise InputError(f"{flag} {path}: has to end in {known}")
    folders = named_folders(pred)
    records = open_dataset(dataset, data, split)
    with contextlib.ExitStack() as outputs:
        # Opened first: what cannot be written is known before the work, not after it.
        writers = [
            (write, outputs.enter_context(whole_file(path)))
            for write, path in (
                (write_json, json),
                (write_csv, csv),
                (draw_curves, curves),
                (draw_scatter, scatter),
                (draw_bars, bars),
                (functools.partial(draw_grid, folders=folders, records=records), grid),
            )
            if path is not None
        ]
        evaluations = {}
        terminal = Console(stderr=True)
        with Progress(
            console=terminal, transient=True, disable=not terminal.is_terminal
        ) as progress:
            for name, folder in folders.items():
                task = progress.add_task(name, total=None)
                evaluations[name] = evaluate_folder(
                    folder,
                    records,
                    protocol,
                    workers=available_cores() if workers is None else workers,
                    allow_missing=allow_missing,
                    advance=functools.partial(progress.update, task),
                )
                if flicker:
                    task = progress.add_task(f"{name} flicker", total=None)
                    step = functools.partial(progress.update, task)
                    found = flicker_of_folder(folder, records, step)
                    evaluations[name] = replace(evaluations[name], flicker=found)
        show(evaluations, Console())
        for write, path in writers:
            write(path, evaluations)


def named_folders(arguments: list[str]) -> dict[str, Path]:
    """FOLDER, by the name of the folder, or NAME=FOLDER."""
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if not name or name in folders:
            raise InputError(f"--pred {argument}: give it a name of its own, as in NAME={folder}")
        folders[name] = Path(folder)
    return folders
