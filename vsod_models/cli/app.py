"""The command `vsod`.  Each command reads its arguments and calls the module it is named for.

Imports of torch and the like happen inside the commands, so that `vsod --help` is instant.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..errors import InputError
from ..files import whole_file, whole_folder

app = typer.Typer(
    name="vsod",
    help="Video salient object detection: prepare data, train, evaluate, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check datasets and bring them into one layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")
prior_app = typer.Typer(help="Motion priors for MSST.", no_args_is_help=True)
app.add_typer(prior_app, name="prior")
label_app = typer.Typer(help="Labels where nobody drew any.", no_args_is_help=True)
app.add_typer(label_app, name="label")

DatasetName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="davis16, folder, fbms59, segtrackv2, repack, duts, stills or coco."
    ),
]
Splits = Annotated[list[str] | None, typer.Option("--split", help="Default: all; repeatable.")]


@data_app.command("check")
def data_check(
    name: DatasetName,
    root: Annotated[Path, typer.Argument(metavar="DIR")],
    split: Splits = None,
    strict: Annotated[bool, typer.Option(help="Counts that are not official are errors.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Count, decode and validate a dataset; every problem with its file.  Exit code 1 if any."""
    from ..data.check import check
    from ..data.readers import find_dataset

    failed = False
    for part in split or find_dataset(name).splits:
        report = check(name, root, part, jobs=jobs, track=_progress(f"{name} {part}"))
        print(
            f"{name} {part}: {report.sequences} sequences, {report.frames} frames, "
            f"{report.masks} masks"
        )
        for kind in ("problems", "warnings", "notes"):
            for line in getattr(report, kind):
                print(f"{kind[:-1]}: {line}")
        failed = failed or bool(report.problems) or (strict and bool(report.warnings))
    if failed:
        raise typer.Exit(1)
    print("no problems")


@data_app.command("prepare")
def data_prepare(
    name: DatasetName,
    source: Annotated[Path, typer.Argument(metavar="SRC")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")],
    split: Splits = None,
    partial: Annotated[bool, typer.Option(help="Accept counts that are not official.")] = False,
) -> None:
    """Convert a dataset to the layout of DAVIS-2016, which `folder` reads."""
    from ..data.check import count
    from ..data.prepare import prepare

    read = prepare(name, source, target, split, partial=partial, track=_progress("writing"))
    for part, records in read.items():
        print("{}: {} sequences, {} frames, {} masks".format(part, *count(records)))


@data_app.command("synthetic")
def data_synthetic(
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    clips: Annotated[int, typer.Option(help="Clips of the training split.")] = 20,
    val_clips: Annotated[int, typer.Option(help="Clips of the validation split.")] = 5,
    frames: Annotated[int, typer.Option(help="Frames a clip.")] = 24,
    height: int = 224,
    width: int = 224,
    seed: int = 0,
    photos: Annotated[bool, typer.Option(help="Also use scikit-image's pictures.")] = True,
) -> None:
    """Write synthetic clips with their masks in the layout of DAVIS-2016, to try things with."""
    from ..data import open_dataset
    from ..data.prepare import write

    read = {}
    for part, count in (("train", clips), ("val", val_clips)):
        options = dict(frames=frames, size=(height, width), seed=seed, photos=photos)
        read[part] = open_dataset("synthetic", None, part, clips=count, **options)
    write(read, target, _progress("writing"))
    print(f"{target}: {clips} + {val_clips} clips of {frames} frames, {width}x{height}")


def _progress(text: str) -> Callable[[Iterable, int], Iterable]:
    """A progress bar on stderr, where that is a terminal."""

    def track(items: Iterable, total: int) -> Iterable:
        from rich.console import Console
        from rich.progress import track as bar

        console = Console(stderr=True)
        hidden = not console.is_terminal
        return bar(items, text, total=total, console=console, disable=hidden, transient=True)

    return track


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="Recipe, such as recipes/mssa-pretrain.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as batch_size=2 seed=1."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
) -> None:
    """Train a model as a recipe says; the run folder is its key `out`."""
    from ..training.recipe import read_config
    from ..training.run import train

    folder = train(read_config(config, overrides or []), resume=resume)
    print(f"vsod train: the model is in {folder}")


@app.command("eval")
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
    protocol: Annotated[str, typer.Option(help="davsod or frame.")] = "davsod",
    json: Annotated[Path | None, typer.Option(help="Write the numbers here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="And here.")] = None,
    curves: Annotated[
        Path | None, typer.Option(help="Draw the PR and F curves: .png, .svg or .pdf.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave out frames without a prediction.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one for each core where not said.")
    ] = None,
) -> None:
    """MAE, F, S, E and weighted F of saliency maps, under a named protocol."""
    from rich.console import Console
    from rich.progress import Progress

    from .. import evaluation
    from ..data import open_dataset

    evaluation.get_protocol(protocol)
    if curves is not None and curves.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--curves {curves}: has to end in .png, .svg or .pdf")
    folders = named_folders(pred)
    records = open_dataset(dataset, data, split)
    with contextlib.ExitStack() as outputs:
        # Opened first: what cannot be written is known before the work, not after it.
        writers = [
            (write, outputs.enter_context(whole_file(path)))
            for write, path in (
                (evaluation.write_json, json),
                (evaluation.write_csv, csv),
                (evaluation.draw_curves, curves),
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
                evaluations[name] = evaluation.evaluate_folder(
                    folder,
                    records,
                    protocol,
                    workers=evaluation.available_cores() if workers is None else workers,
                    allow_missing=allow_missing,
                    advance=functools.partial(progress.update, task),
                )
        evaluation.show(evaluations, Console())
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


@prior_app.command("train")
def prior_train(
    dataset: Annotated[str, typer.Argument(help="Such as davis16, or synthetic.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the prior.")],
    root: Annotated[Path | None, typer.Argument(help="Its folder; synthetic has none.")] = None,
    split: str = "train",
    backbone: Annotated[str, typer.Option(help="Torchvision network, or none.")] = "vgg16",
    weights: Annotated[
        str | None, typer.Option(help="Of the backbone: a name such as DEFAULT, or a file.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="To learn from, spread evenly.")] = 300,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    seed: int = 0,
) -> None:
    """Train the region network of the motion prior."""
    import torch

    from ..data import open_dataset
    from ..prior.fit import train_prior
    from ..prior.regions import MotionPrior

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder")
    if backbone != "none" and weights is None:
        raise InputError(
            f"--backbone {backbone} needs --weights (DEFAULT, or a file); --backbone none learns "
            "from the flow alone"
        )
    records = open_dataset(dataset, root, split)
    torch.manual_seed(seed)
    model = MotionPrior(None if backbone == "none" else backbone).eval()
    if weights is not None:
        model.load_backbone(weights)
    with progress("Training the prior", frames + epochs) as step:
        report = train_prior(model, records, frames=frames, epochs=epochs, seed=seed, on_step=step)
    with whole_folder(out) as part:
        model.save_pretrained(part)
    print(
        f"{out}: {report['regions']:.0f} regions of {report['frames']:.0f} frames, loss "
        f"{report['loss']:.4f} on them ({report['loss of the mean']:.4f} for always the mean)"
    )


@prior_app.command("make")
def prior_make(
    dataset: Annotated[str, typer.Argument(help="Such as davis16, or synthetic.")],
    root: Annotated[Path | None, typer.Argument(help="Its folder; synthetic has none.")] = None,
    split: str = "train",
    prior: Annotated[
        str, typer.Option(help="Folder of `prior train`; or flow-magnitude, a cheap substitute.")
    ] = "flow-magnitude",
    cache: Annotated[Path | None, typer.Option(help="Instead of the user's cache folder.")] = None,
) -> None:
    """Make the motion priors of a dataset ahead of training; sequences that have all are kept."""
    from ..data import open_dataset
    from ..prior.cache import default_cache, make_priors
    from ..prior.load import load_prior

    records, source = open_dataset(dataset, root, split), load_prior(prior)
    with progress("Motion priors", len(records)) as step:
        make_priors(records, source, cache, on_frame=step)
    print(f"{len(records)} priors by {prior} in {(cache or default_cache()) / source.key()}")


@label_app.command("coarse")
def label_coarse(
    dataset: Annotated[str, typer.Argument(help="Such as davis16, or synthetic.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for labels and manifest.")],
    root: Annotated[Path | None, typer.Argument(help="Its folder; synthetic has none.")] = None,
    split: str = "train",
    sequences: Annotated[
        str | None, typer.Option(help="Label only these, separated by commas.")
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Label only frames without ground truth.")
    ] = False,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder with <sequence>/<frame>.png, or spectral-residual, minimum-barrier, "
            "flow-contrast; give one --maps for each (default: these three)."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each --maps, separated by commas.")
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Fit the weights on ground truth; with --sequences, of the others."
        ),
    ] = False,
    erase: Annotated[
        Path | None, typer.Option(help="JSON list of regions that a person found wrong.")
    ] = None,
    auto_erase: Annotated[
        bool, typer.Option("--auto-erase", help="Erase regions that too few of the maps find.")
    ] = False,
    agree: Annotated[
        int | None, typer.Option(help="Maps that have to (default: more than half).")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Skip frames without one of their maps.")
    ] = False,
) -> None:
    """Make coarse labels from saliency maps."""
    from ..data import open_dataset
    from ..labels.coarse import fit_weights, make_labels
    from ..labels.maps import BUILT_IN, check_sources

    sources = maps or list(BUILT_IN)
    check_sources(sources)
    given = None
    if weights is not None:
        try:
            given = [float(w) for w in weights.split(",")]
        except ValueError:
            raise InputError(f"--weights {weights!r} is not numbers with commas") from None
    if fit and given is not None:
        raise InputError("--fit and --weights exclude one another")
    records = open_dataset(dataset, root, split)
    wanted = records
    if sequences is not None:
        wanted = records.of_sequences(sequences.split(","))
    if fit:
        rest = [name for name in records.sequences if name not in wanted.sequences]
        with progress("Fitting the weights", 200) as step:
            given = fit_weights(
                records.of_sequences(rest) if rest else records, sources, 200,
                allow_missing=allow_missing, on_frame=step,
            )  # fmt: skip
    with progress("Coarse labels", len(wanted)) as step:
        manifest = make_labels(
            wanted, out, sources, given, unlabelled=unlabelled, erase_list=erase,
            auto_erase=auto_erase, agree=agree, allow_missing=allow_missing, on_frame=step,
        )  # fmt: skip
    parts = [f"{w:.2f} {s}" for w, s in zip(manifest["weights"], sources, strict=True)]
    print(
        f"{out}: {len(manifest['frames'])} labels ({', '.join(parts)}), "
        f"{len(manifest['skipped'])} frames skipped"
    )


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where that is a terminal; gives what to call after each of `total` steps."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def describe(error: Exception) -> str:
    """One line for an error; the file first, where there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return " ".join(str(error).split())


@app.command()
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
    crf: Annotated[
        str | None, typer.Option(help="Refine masks with a dense CRF: preset dss or deeplab.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            help="Of MSST: flow-magnitude, or a folder of `prior train`; default: as trained."
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Frames a second, for pictures.")] = 25.0,
    background: Annotated[str, typer.Option(help="Colour behind a cutout.")] = "#ffffff",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write what is salient in a video: masks, an overlay, a matte or a cut-out."""
    from .. import prediction, zoo
    from ..media.reading import open_source
    from ..media.views import check_view
    from ..media.writing import check_output

    if (dataset is None) == (not inputs):
        raise InputError("give an input (a video, a folder, a picture or a glob), or --dataset")
    if dataset is not None:
        from ..data import open_dataset

        records = open_dataset(dataset, data, split)
        if Path(output).suffix:
            raise InputError(f"{output}: the masks of a dataset go into a folder")
        view = check_view(view or "mask", output)
    else:
        source = open_source(inputs or [], rate)
        view = check_view(view, output)
        check_output(Path(output), source, overwrite)  # before the model is loaded
    colour = prediction.parse_colour(background)
    loaded = zoo.load_model(model)
    if prior is not None and not loaded.needs_prior:
        raise InputError(f"--prior {prior}: model {model} takes no motion prior")
    make_prior, with_prior = None, ""
    if loaded.needs_prior:
        from ..prior.flow import frame_prior
        from ..prior.load import load_prior, prior_of

        name = prior or prior_of(model)
        make_prior, with_prior = functools.partial(frame_prior, load_prior(name)), f", prior {name}"
    predictor = prediction.VideoPredictor(
        loaded,
        device,
        prediction.parse_size(size) if size else None,
        overlap=overlap,
        batch=batch,
        precision=precision,
        crf=crf,
        prior=make_prior,
        name=Path(model).name,
    )
    print(predictor.describe() + with_prior, flush=True)
    if dataset is not None:
        with prediction.progress_bar(len(records)) as progress:
            frames = prediction.predict_dataset(
                predictor, records, output, view=view, overwrite=overwrite, progress=progress
            )
        print(f"{output}: {frames} frames of {len(records.sequences)} sequences, {view}")
        return
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
