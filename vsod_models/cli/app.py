"""The command `vsod`.  Each command reads its arguments and calls the module it is named for.

Imports of torch and the like happen inside the commands, so that `vsod --help` is instant.
"""

from __future__ import annotations

import re
import sys
from typing import NoReturn

import typer

from ..errors import InputError, describe
from .data import check, prepare, synthetic
from .evaluate import evaluate
from .example import example
from .label import coarse
from .predict import predict
from .prior import make
from .prior import train as train_prior
from .serve import serve
from .train import train

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

app.command("train")(train)
app.command("eval")(evaluate)
app.command("predict")(predict)
app.command("example")(example)
app.command("serve")(serve)
data_app.command("check")(check)
data_app.command("prepare")(prepare)
data_app.command("synthetic")(synthetic)
prior_app.command("train")(train_prior)
prior_app.command("make")(make)
label_app.command("coarse")(coarse)


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
        print(f"vsod: {in_flags(describe(error))}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def in_flags(message: str) -> str:
    """A message of the library, which names arguments, as one of the command."""
    message = re.sub(r"\b(\w+)=True\b", lambda m: "--" + m[1].replace("_", "-"), message)
    return re.sub(r"\bview='(\w+)'", r"--as \1", message).replace("view must", "--as must", 1)
