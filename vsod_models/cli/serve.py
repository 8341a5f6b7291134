"""`vsod serve`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .predict import predict

DEFAULT_MODEL = inspect.signature(predict).parameters["model"].default


def serve(
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8760,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs --token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None, typer.Option(help="What a browser has to know, 8 characters or more.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="To choose from on the page, repeatable; the first one is the default."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_mb: Annotated[float, typer.Option(help="Largest upload.")] = 500.0,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
) -> None:
    """A page to try models on a video or a picture, on this machine."""
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
        if not Path(name).exists() and not (shipped / name).is_dir():
            raise InputError(f"--model {name}: neither a folder or checkpoint nor a shipped model")
    settings = server.Settings(
        models, host, port, token, max_mb, device, ready=lambda a: print(f"vsod: {a}", flush=True)
    )
    server.serve(settings, open_browser=open_browser)
