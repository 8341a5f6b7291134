"""`vsod label`: labels where nobody drew any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .progress import counted, progress


def coarse(
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
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Label only so many, spread evenly over those to label."),
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
        bool,
        typer.Option(
            "--fit",
            help="Fit the weights on ground truth; with --sequences, on the others.",
        ),
    ] = False,
    erase: Annotated[
        Path | None,
        typer.Option(help="What a person found wrong: a JSON list, as of `vsod serve --labels`."),
    ] = None,
    only_looked_over: Annotated[
        bool, typer.Option("--only-looked-over", help="Label only what --erase marks or corrects.")
    ] = False,
    auto_erase: Annotated[
        bool, typer.Option("--auto-erase", help="Erase regions that too few of the maps find.")
    ] = False,
    agree: Annotated[
        int | None, typer.Option(help="How many maps have to (default: more than half).")
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
            raise InputError(
                f"--weights {weights!r} is not a list of numbers separated by commas"
            ) from None
    if fit and given is not None:
        raise InputError("--fit and --weights are mutually exclusive")
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
            wanted, out, sources, given, unlabelled=unlabelled, count=frames, erase_list=erase,
            only_looked_over=only_looked_over, auto_erase=auto_erase, agree=agree,
            allow_missing=allow_missing, on_frame=step,
        )  # fmt: skip
    parts = [f"{w:.2f} {s}" for w, s in zip(manifest["weights"], sources, strict=True)]
    print(
        f"{out}: {counted(len(manifest['frames']), 'label')} ({', '.join(parts)}), "
        f"{counted(len(manifest['skipped']), 'frame')} skipped"
    )
