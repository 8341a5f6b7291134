"""`vsod predict`."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .progress import counted, frames_progress, progress
from .start import without_collection


def predict(
    output: Annotated[
        str, typer.Option("--output", "-o", help=".mp4 .mov .webm .gif .png or a folder for PNG.")
    ],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="A video, a folder of frames, a picture or a glob.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of an input: a dataset, for `vsod eval`.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    model: Annotated[
        str,
        typer.Option(
            help="A shipped model, a folder of save_pretrained, a checkpoint, module:factory, "
            "hub:owner/name, onnx:FILE or transformers:owner/name."
        ),
    ] = "vsod-mobile",
    model_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of onnx: and transformers:, such as image_size=320,320."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the code in a transformers: repository."),
    ] = False,
    view: Annotated[
        str, typer.Option("--as", help="mask, overlay, matte, cutout, side-by-side.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    size: Annotated[str, typer.Option(help="What the model sees, WIDTHxHEIGHT.")] = "",
    overlap: Annotated[
        int | None, typer.Option(help="Frames that neighbouring windows share.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows that run at once.")] = None,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    crf: Annotated[
        str | None, typer.Option(help="Refine masks with a dense CRF: preset dss or deeplab.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Of MSST: flow-magnitude, or a folder of `prior train`; default: as trained."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Frames per second, for pictures.")] = 25.0,
    background: Annotated[str, typer.Option(help="Colour behind a cutout.")] = "#ffffff",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write what is salient in a video: masks, an overlay, a matte or a cut-out."""
    with without_collection():
        from .. import prediction
    from ..media.reading import open_source
    from ..media.views import check_view
    from ..media.writing import OUTPUT_ENDINGS, check_output

    if (dataset is None) == (not inputs):
        raise InputError("give an input (a video, a folder, a picture or a glob), or --dataset")
    if dataset is not None:
        from ..data import open_dataset

        records = open_dataset(dataset, data, split)
        if Path(output).suffix.lower() in OUTPUT_ENDINGS or Path(output).is_file():
            raise InputError(f"{output}: the masks of a dataset go into a folder")
        view = check_view(view or "mask", output)
    else:
        source = open_source(inputs or [], rate)
        view = check_view(view, output)
        check_output(Path(output), source, overwrite)  # before the model is loaded
    colour = parse_colour(background)
    predictor = prediction.load_predictor(
        model,
        device,
        parse_size(size) if size else None,
        prior=prior,
        options=parse_options(model_option or []),
        trust_remote_code=trust_remote_code,
        overlap=overlap,
        batch=batch,
        precision=precision,
        crf=crf,
    )
    print(predictor.describe(), flush=True)
    if dataset is not None:
        if isinstance(predictor.prior, functools.partial):
            from ..prior.cache import make_priors

            with progress("Motion priors", len(records)) as step:
                records = make_priors(records, predictor.prior.args[0], on_frame=step)
        with frames_progress(len(records)) as on_frames:
            frames = prediction.predict_dataset(
                predictor, records, output, view=view, overwrite=overwrite, progress=on_frames
            )
        sequences = counted(len(records.sequences), "sequence")
        print(f"{output}: {counted(frames, 'frame')} of {sequences}, {view}")
        return
    try:
        with frames_progress(source.frames) as on_frames:
            written = prediction.predict_file(
                predictor, source, output, view=view, background=colour, overwrite=overwrite,
                progress=on_frames,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped before the first frame: nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    for note in written.notes:
        print(f"note: {note}")
    if written.stopped:
        print(
            f"stopped: {output} has the {counted(written.frames, 'frame')} before that",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    print(f"{output}: {counted(written.frames, 'frame')}, {view}")


def parse_options(pairs: list[str]) -> dict[str, str]:
    """ "mean=0,0,0" -> {"mean": "0,0,0"}."""
    for pair in pairs:
        if not re.match(r"\w+=", pair):
            raise InputError(f"--model-option {pair}: KEY=VALUE is needed")
    return dict(pair.split("=", 1) for pair in pairs)


def parse_size(text: str) -> tuple[int, int]:
    """ "640x360" -> (360, 640), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InputError(f"--size must be WIDTHxHEIGHT such as 640x360, got {text}")
    return int(match[2]), int(match[1])


def parse_colour(text: str) -> tuple[int, int, int]:
    """ "#00ff00" or "green" -> (0, 255, 0) or (0, 128, 0)."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise InputError(f"--background must be a colour such as #00ff00, got {text}") from None
