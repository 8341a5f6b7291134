"""`vsod serve`."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..files import read_json
from .predict import DEFAULT_MODEL

if TYPE_CHECKING:
    from ..serve.correct import Labels


def serve(
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8760,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(help="Secret that a browser has to give, 8 characters or more.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="To choose from on the page, repeatable; the first one is the default."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_mb: Annotated[float, typer.Option(help="Largest upload.")] = 500.0,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of `vsod label coarse` to correct by hand.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset of --labels.")] = None,
    dataset: Annotated[str, typer.Option(help="Its name; default: what --labels says.")] = "",
    split: Annotated[str, typer.Option(help="Its split; default: what --labels says.")] = "",
    erase: Annotated[
        Path | None,
        typer.Option(help="File that corrections are written to; default: LABELS.erase.json."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
) -> None:
    """A page to try models on a video or a picture, and to correct coarse labels by hand."""
    try:
        from ..serve import server
    except ImportError as error:
        raise InputError(
            f"vsod serve needs {error.name}: pip install -e '.[models,serve]'"
        ) from None
    shipped = Path(__file__).parents[1] / "weights"
    models = list(dict.fromkeys([*(model or []), DEFAULT_MODEL]))
    models += [p.name for p in sorted(shipped.iterdir()) if p.is_dir() and p.name not in models]
    for name in model or []:
        named = ":" in name or name in entry_points(group="vsod.models").names
        if not named and not Path(name).exists() and not (shipped / name).is_dir():
            raise InputError(f"--model {name}: neither a folder or checkpoint nor a shipped model")
    read = None
    if labels is not None:
        if not (labels / "manifest.json").is_file():
            raise InputError(f"--labels {labels}: not a folder of `vsod label coarse`")
        listed = erase or labels.resolve().with_name(f"{labels.resolve().name}.erase.json")
        read = functools.partial(_labels, labels, data, dataset, split, listed)
    elif data or dataset or split or erase:
        raise InputError("--data, --dataset, --split and --erase go with --labels")
    settings = server.Settings(
        models, host, port, token, max_mb, device, read,
        ready=lambda address: print(f"vsod: {address}", flush=True),
    )  # fmt: skip
    server.serve(settings, open_browser=open_browser)


def _labels(labels: Path, data: Path | None, dataset: str, split: str, erase: Path) -> Labels:
    from ..data import open_dataset
    from ..serve.correct import Labels

    file = labels / "manifest.json"
    manifest = read_json(file, "manifest of `vsod label coarse`")
    try:
        dataset, split = dataset or manifest["dataset"], split or manifest["split"]
    except (KeyError, TypeError):
        raise InputError(f"{file}: not a manifest of `vsod label coarse`") from None
    return Labels(labels, open_dataset(dataset, data, split), erase)
