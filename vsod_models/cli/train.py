"""`vsod train`."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Option(help="Recipe: a file, or a name of the package, such as mssa-pretrain.")
    ],
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
    from .progress import progress
    from .training_bar import TrainingBar

    recipe = read_config(config, overrides or [])
    bar = TrainingBar(recipe.out)
    folder = train(recipe, resume=resume, callbacks=[bar], progress=progress)
    print(f"vsod train: the model is in {folder}")
