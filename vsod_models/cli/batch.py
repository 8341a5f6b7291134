"""`vsod batch`."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, Stopped
from ..workers import available_cores
from .predict import (
    DEFAULT_MODEL,
    Background,
    Crf,
    Device,
    ModelName,
    ModelOptions,
    Overlap,
    Precision,
    PriorName,
    Refine,
    Size,
    TrustRemoteCode,
    View,
    Windows,
    parse_colour,
    parse_options,
    parse_size,
)
from .progress import counted, videos_progress


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Videos, folders of videos, globs, lists (.txt, .csv, .parquet), or - for a list "
            "on standard input."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the outputs.")],
    form: Annotated[
        str, typer.Option("--format", help="mp4, mov, webm, gif, or png: a folder for each video.")
    ] = "mp4",
    model: ModelName = DEFAULT_MODEL,
    model_option: ModelOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    view: View = "",
    device: Device = "auto",
    size: Size = "",
    overlap: Overlap = None,
    windows: Windows = None,
    precision: Precision = "auto",
    crf: Crf = None,
    refine: Refine = None,
    prior: PriorName = None,
    background: Background = "#ffffff",
    actors: Annotated[
        int | None, typer.Option(help="Processes with the model; default: one a GPU, or core.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB that each may allocate; default: no limit.")
    ] = None,
    parts: Annotated[
        float | None,
        typer.Option(min=1, help="Cut videos that are longer into parts of so many seconds."),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Further attempts, where trying again can help.")
    ] = 2,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster.")] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help=".jsonl or .parquet; default: manifest.jsonl in the output."),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="A line of JSON for each video, when it ends.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs.")] = False,
) -> None:
    """Predict many videos, each whole or not at all; the same command goes on where it was stopped.

    Exit code 1 if any input failed: the others are done, and the manifest says why.
    """
    from ..batch import FORMATS, Cluster, Cut, Options, check_places, find_tasks, run_batch

    # What is wrong with the inputs is said before the libraries load, which takes seconds.
    for package in ("ray", "pyarrow"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"vsod batch needs {package}: pip install -e '.[models,batch]'")
    if form not in FORMATS:
        raise InputError(f"--format {form}: has to be one of {', '.join(FORMATS)}")
    if parts is not None and (form == "gif" or refine is not None):
        raise InputError("--parts does not go with --format gif, nor with --refine")
    manifest = manifest or output / "manifest.jsonl"
    check_places(output, manifest)
    colour = parse_colour(background)
    tasks = find_tasks(inputs, output, form)
    predictor: dict[str, Any] = dict(
        model=model, device=device, size=parse_size(size) if size else None, overlap=overlap,
        batch=windows, precision=precision, crf=crf, prior=prior, refine=refine,
        options=parse_options(model_option or []), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from ..media.views import check_view

    view = check_view(view or None, "out" if form == "png" else f"out.{form}")
    from ..prediction import choose_device, load_predictor

    # What is wrong with the model is known before anything starts.
    gpus = 0.0 if device == "cpu" or (not ray and choose_device(device).type == "cpu") else 1.0
    predictor["batch"] = windows or (4 if gpus else 1)  # whatever this machine has
    loaded = load_predictor(**{**predictor, "device": "cpu" if ray else device})
    described = loaded.describe()
    options = Options(
        predictor, str(output.resolve()), view, colour, overwrite, retries, threads, memory,
        Cut(parts, *loaded.reach()) if parts else None,
    )  # fmt: skip
    count = actors or _actors(threads, gpus)
    if not json_lines:
        print(f"{described}; {counted(len(tasks), 'video')}, {counted(count, 'actor')}", flush=True)
    seen: Counter[str] = Counter()
    try:
        with videos_progress(len(tasks), hidden=json_lines) as shown:

            def on_row(row: Mapping[str, Any]) -> None:
                seen["kept" if row["kept"] else row["state"]] += 1
                shown(row)
                if json_lines:
                    print(json.dumps(row), flush=True)

            rows = run_batch(tasks, options, Cluster(count, ray, gpus), manifest, on_row)
    except KeyboardInterrupt:
        done = seen["done"] + seen["kept"]
        raise Stopped(
            f"stopped: {done} of {counted(len(tasks), 'video')} are done; the same command goes on"
        ) from None
    failed = [row for row in rows if row["state"] != "done"]
    if not json_lines:
        for row in failed:
            print(f"failed: {row['input']}: {row['error']}")
        kept = f", {seen['kept']} of them before" if seen["kept"] else ""
        whole = counted(len(rows) - len(failed), "video")
        print(f"{output}: {whole} done{kept}, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _actors(threads: int, gpus: float) -> int:
    if gpus:
        import torch

        return max(1, torch.cuda.device_count())
    return max(1, available_cores() // threads)
