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
    from .training import read_config, train

    folder = train(read_config(config, overrides or []), resume=resume)
    print(f"vsod train: the model is in {folder}")


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


if __name__ == "__main__":
    main()
