"""`vsod prior`: train the motion prior of MSST, or make the priors of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..files import whole_folder
from .progress import counted, progress


def train(
    dataset: Annotated[str, typer.Argument(help="Such as davis16, or synthetic.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the prior.")],
    root: Annotated[Path | None, typer.Argument(help="Its folder; synthetic has none.")] = None,
    split: str = "train",
    backbone: Annotated[str, typer.Option(help="Torchvision network, or none.")] = "vgg16",
    weights: Annotated[
        str | None, typer.Option(help="Of the backbone: a name such as DEFAULT, or a file.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="To learn from, spread evenly.")] = 300,
    level_classifiers: Annotated[
        bool,
        typer.Option("--level-classifiers", help="One network for each scale, as the paper's."),
    ] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
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
    model = MotionPrior(
        None if backbone == "none" else backbone, level_classifiers=level_classifiers
    ).eval()
    if weights is not None:
        model.load_backbone(weights)
    with progress("Training the prior", frames + epochs) as step:
        report = train_prior(model, records, frames=frames, epochs=epochs, seed=seed, on_step=step)
    with whole_folder(out) as part:
        model.save_pretrained(part)
    print(
        f"{out}: {counted(int(report['regions']), 'region')} of "
        f"{counted(int(report['frames']), 'frame')}, loss "
        f"{report['loss']:.4f} on them ({report['loss of the mean']:.4f} for always the mean)"
    )


def make(
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
    made = counted(len(records), "prior")
    print(f"{made} by {prior} in {(cache or default_cache()) / source.key()}")
