"""The command `vsod`.  Each command reads its arguments and calls the module it is named for.

Imports of torch and the like happen inside the commands, so that `vsod --help` is instant.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import InputError
from .files import whole_folder

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

    from .data import open_dataset
    from .motion_prior import MotionPrior, train_prior

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
    """Make the motion priors of a dataset ahead of training; those that are there are kept."""
    from .data import open_dataset
    from .motion_prior import default_cache, load_prior, make_priors

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
        bool, typer.Option("--fit", help="Fit the weights on ground truth of frames not labelled.")
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
    from .coarse_labels import BUILT_IN, check_sources, fit_weights, make_labels
    from .data import open_dataset

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
                records.of_sequences(rest) if rest else records, sources, 200, on_frame=step
            )
    with progress("Coarse labels", len(wanted)) as step:
        manifest = make_labels(
            wanted, out, sources, given, erase_list=erase, auto_erase=auto_erase, agree=agree,
            allow_missing=allow_missing, on_frame=step,
        )  # fmt: skip
    parts = [f"{w:.2f} {s}" for w, s in zip(manifest["weights"], sources, strict=True)]
    print(
        f"{out}: {len(manifest['frames'])} labels ({', '.join(parts)}), "
        f"{len(manifest['skipped'])} frames skipped"
    )


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; gives a function to call after each of `total` steps."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def describe(error: Exception) -> str:
    """One line for an error; the file first, where there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
