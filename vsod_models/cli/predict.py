"""`vsod predict`."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .progress import counted, frames_progress, progress
from .start import shared_threads, without_collection

if TYPE_CHECKING:
    from ..media.reading import Source
    from ..media.window import Window
    from ..prediction import VideoPredictor

ModelName = Annotated[
    str,
    typer.Option(
        help="A shipped model, a folder of save_pretrained, a checkpoint, module:factory, "
        "hub:owner/name, onnx:FILE, aoti:FILE or transformers:owner/name."
    ),
]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE of onnx: and transformers:, such as image_size=320,320."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code in a transformers: repository."),
]
View = Annotated[str, typer.Option("--as", help="mask, overlay, matte, cutout, side-by-side.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Size = Annotated[str, typer.Option(help="What the model sees, WIDTHxHEIGHT.")]
Overlap = Annotated[int | None, typer.Option(help="Frames that neighbouring windows share.")]
Windows = Annotated[int | None, typer.Option("--batch", help="Windows that run at once.")]
Precision = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Crf = Annotated[
    str | None, typer.Option(help="Refine masks with a dense CRF: preset dss or deeplab.")
]
Refine = Annotated[
    str | None,
    typer.Option(help="sam2:owner/name: SAM 2 tracks the surest masks over the frames."),
]
PriorName = Annotated[
    str | None,
    typer.Option(
        help="Of MSST: flow-magnitude, or a folder of `prior train`; default: as trained."
    ),
]
Background = Annotated[str, typer.Option(help="Colour behind a cutout.")]
DEFAULT_MODEL = "vsod-mobile"


def predict(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="A video, a folder of frames, a picture or a glob; camera:0, rtsp://... or - (a "
            "pipe)."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help=".mp4 .mov .webm .gif .png, a folder for PNG, or - (MPEG-TS to standard output).",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Also, or only, in a window on this screen.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of an input: a dataset, for `vsod eval`.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "val",
    model: ModelName = DEFAULT_MODEL,
    model_option: ModelOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    view: View = "",
    device: Device = "auto",
    size: Size = "",
    overlap: Overlap = None,
    batch: Windows = None,
    precision: Precision = "auto",
    crf: Crf = None,
    refine: Refine = None,
    prior: PriorName = None,
    rate: Annotated[float, typer.Option(help="Frames per second, for pictures.")] = 25.0,
    background: Background = "#ffffff",
    drop: Annotated[
        bool, typer.Option("--drop", help="Live: leave frames out when the model is slower.")
    ] = False,
    causal: Annotated[
        bool, typer.Option("--causal", help="Mask a frame as soon as it comes.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write what is salient in a video: masks, an overlay, a matte or a cut-out."""
    # What needs no torch comes first: its library is being loaded, and bad input is soon told.
    from ..media.live import Live, is_live
    from ..media.reading import open_source
    from ..media.views import check_view
    from ..media.window import Window
    from ..media.writing import OUTPUT_ENDINGS, STANDARD_OUTPUT, check_output

    if (dataset is None) == (not inputs):
        raise InputError("give an input (a video, a folder, a picture or a glob), or --dataset")
    if output is None and not show:
        raise InputError("give an output, -o FILE, or a window, --show")
    if dataset is not None:
        from ..data import open_dataset

        if output is None or show:
            raise InputError("--show: the masks of a dataset go into a folder")
        file = Path(output).suffix.lower() in OUTPUT_ENDINGS or Path(output).is_file()
        if file or output == STANDARD_OUTPUT:
            raise InputError(f"{output}: the masks of a dataset go into a folder")
        records = open_dataset(dataset, data, split)
        view = check_view(view or "mask", output)
    else:
        live = [name for name in inputs or [] if is_live(name)]
        if live and len(inputs or []) > 1:
            raise InputError(f"{live[0]}: goes on while it is read, and is the only input then")
        if drop and not live:
            raise InputError("--drop goes with camera:0, rtsp://... or -, which do not wait")
        if live:
            _prediction()  # what does not wait is opened when all is there
        source = Live(live[0], drop) if live else open_source(inputs or [], rate)
        view = check_view(view, output)
        if output is not None:
            check_output(output, source, overwrite)  # before the model is loaded
    colour = parse_colour(background)
    prediction = _prediction()
    with contextlib.ExitStack() as stack:
        if output == STANDARD_OUTPUT:  # where nothing but the video goes
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        window = None
        if show:
            window = stack.enter_context(contextlib.closing(Window(f"vsod {source.name}")))
        with shared_threads(True):  # small work, for which a second thread would mostly wait
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
                refine=refine,
                causal=causal,
            )
        print(predictor.describe(), flush=True)
        if dataset is None:
            _predict_file(predictor, source, output, view, colour, overwrite, window)
            return
        assert output is not None
        if isinstance(predictor.prior, functools.partial):
            from ..prior.cache import make_priors

            with progress("Motion priors", len(records)) as step:
                records = make_priors(records, predictor.prior.args[0], on_frame=step)
        shared = predictor.device.type == "cpu" and predictor.side_by_side(records)
        with shared_threads(shared), frames_progress(len(records)) as on_frames:
            frames = prediction.predict_dataset(
                predictor, records, output, view=view, overwrite=overwrite, progress=on_frames
            )
        sequences = counted(len(records.sequences), "sequence")
        print(f"{output}: {counted(frames, 'frame')} of {sequences}, {view}")


def _prediction() -> ModuleType:
    with without_collection():
        from .. import prediction
    return prediction


def _predict_file(
    predictor: VideoPredictor,
    source: Source,
    output: str | None,
    view: str,
    colour: tuple[int, int, int],
    overwrite: bool,
    window: Window | None,
) -> None:
    from ..media.live import Live
    from ..prediction import predict_file

    def latency() -> str:
        return f", latency {source.latest} ms" if isinstance(source, Live) else ""

    shared = predictor.device.type == "cpu" and predictor.side_by_side(source)
    try:
        with shared_threads(shared), frames_progress(source.frames, latency) as on_frames:
            written = predict_file(
                predictor, source, output, view=view, background=colour, overwrite=overwrite,
                progress=on_frames, window=window,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped before the first frame: nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    for note in written.notes:
        print(f"note: {note}")
    frames = counted(written.frames, "frame")
    pace = written.pace and f"; {written.pace}"
    if written.stopped and output is not None:
        print(f"stopped: {output} has the {frames} before that{pace}", file=sys.stderr)
        raise typer.Exit(130)
    print(f"{output or 'window'}: {frames}, {view}{pace}")


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
