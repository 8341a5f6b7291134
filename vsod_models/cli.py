"""The command `vsod`.  Each command reads its arguments and calls the module it is named for.

Imports of torch and the like happen inside the commands, so that `vsod --help` is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import InputError

app = typer.Typer(
    name="vsod",
    help="Video salient object detection: prepare data, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check datasets and bring them into one layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main(argv: list[str] | None = None) -> NoReturn:
    """Bad input is one line on stderr and exit code 2; `--debug` anywhere shows the traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments, prog_name="vsod")
    except (InputError, OSError) as error:
        if debug:
            raise
        print(f"vsod: {describe(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def describe(error: Exception) -> str:
    """One line for an error; the file first, where there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return " ".join(str(error).split())


@app.command()
def predict(
    inputs: Annotated[
        list[str], typer.Argument(help="A video, a folder of frames, a picture or a glob.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help=".mp4 .mov .webm .gif .png or a folder for PNG.")
    ],
    model: Annotated[
        str, typer.Option(help="A shipped model, a folder of save_pretrained or a checkpoint.")
    ] = "mssa-tiny",
    view: Annotated[
        str, typer.Option("--as", help="mask, overlay, matte, cutout, side-by-side.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    size: Annotated[str, typer.Option(help="What the model sees, WIDTHxHEIGHT.")] = "",
    overlap: Annotated[
        int | None, typer.Option(help="Frames that neighbouring windows share.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows that run at once.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    crf: Annotated[bool, typer.Option("--crf", help="Refine masks with a dense CRF.")] = False,
    rate: Annotated[float, typer.Option(help="Frames a second, for pictures.")] = 25.0,
    background: Annotated[str, typer.Option(help="Colour behind a cutout.")] = "#ffffff",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write what is salient in a video: masks, an overlay, a matte or a cut-out."""
    from . import prediction, pretrained, video

    source = video.open_source(inputs, rate)
    view = prediction.check_view(view, output)
    video.check_output(Path(output), source, overwrite)  # before the model is loaded
    colour = prediction.parse_colour(background)
    predictor = prediction.VideoPredictor(
        pretrained.load_model(model),
        device,
        prediction.parse_size(size) if size else None,
        overlap=overlap,
        batch=batch,
        precision=precision,
        crf=crf,
        name=Path(model).name,
    )
    print(predictor.describe(), flush=True)
    try:
        with prediction.progress_bar(source.frames) as progress:
            written = prediction.predict_file(
                predictor, source, output, view=view, background=colour, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped before the first frame: nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    for note in written.notes:
        print(f"note: {note}")
    if written.stopped:
        print(f"stopped: {output} has the {written.frames} frames before that", file=sys.stderr)
        raise typer.Exit(130)
    print(f"{output}: {written.frames} frames, {view}")


if __name__ == "__main__":
    main()
