"""The command `vsod`.  Each command reads its arguments and calls the module it is named for.

Imports of torch and the like happen inside the commands, so that `vsod --help` is instant.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from ..errors import InputError, Stopped, describe, one_line
from ..workers import interrupt
from . import start
from .batch import batch
from .data import check, prepare, synthetic
from .evaluate import evaluate
from .example import example
from .export import export
from .label import coarse
from .predict import predict
from .prior import make
from .prior import train as train_prior
from .serve import serve
from .train import train

app = typer.Typer(name="vsod", no_args_is_help=True, pretty_exceptions_enable=False)
data_app = typer.Typer(help="Check datasets and bring them into one layout.", no_args_is_help=True)
app.add_typer(data_app, name="data")
prior_app = typer.Typer(help="Motion priors for MSST.", no_args_is_help=True)
app.add_typer(prior_app, name="prior")
label_app = typer.Typer(help="Labels where nobody drew any.", no_args_is_help=True)
app.add_typer(label_app, name="label")


def print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"vsod {importlib.metadata.version('vsod-ops')}")
        except importlib.metadata.PackageNotFoundError:
            print("vsod, run from its sources")
        raise typer.Exit


@app.callback(epilog="Example: vsod predict clip.mp4 -o masks.mp4")
def vsod(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True),
    ] = False,
) -> None:
    """Video salient object detection: prepare data, train, evaluate, predict."""


def add(group: typer.Typer, name: str, command: Callable[..., Any], example: str) -> None:
    """A command that ends in one line when it is stopped, with an example in its help."""

    @functools.wraps(command)
    def stoppable(**arguments: Any) -> Any:
        try:
            return command(**arguments)
        except KeyboardInterrupt:
            raise Stopped("stopped: what was not finished is not kept") from None

    group.command(name, epilog=f"Example: vsod {example}")(stoppable)


add(app, "train", train, "train --config mssa-pretrain out=runs/1 data.roots.coco=COCO")
add(app, "eval", evaluate, "eval --pred maps --dataset davis16 --data DAVIS")
add(app, "predict", predict, "predict clip.mp4 -o cutout.mp4 --as cutout")
add(app, "export", export, "export vsod-mobile -o model.onnx")
add(app, "batch", batch, "batch clips/ -o masks --as mask --actors 2")
add(app, "example", example, "example clip.mp4")
add(app, "serve", serve, "serve --labels labels --data DAVIS")
add(data_app, "check", check, "data check davis16 DAVIS --split val")
add(data_app, "prepare", prepare, "data prepare fbms59 FBMS prepared")
add(data_app, "synthetic", synthetic, "data synthetic clips --clips 4 --frames 8")
add(prior_app, "train", train_prior, "prior train davis16 DAVIS -o prior --backbone none")
add(prior_app, "make", make, "prior make davis16 DAVIS --prior prior")
add(label_app, "coarse", coarse, "label coarse folder frames -o labels --auto-erase")


def main(argv: list[str] | None = None) -> NoReturn:
    """Bad input is one line on stderr and exit code 2; `--debug` anywhere shows the traceback.

    Ctrl-C and SIGTERM are the same everywhere, and exit with 130.  What nobody foresaw is one
    line, too, and exits with 70.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    done: Callable[[], None] | None = None
    if argv is None and arguments[:1] == ["predict"]:  # the process is the command's own
        start.keep_memory()
        start.load_torch()
        done = start.leave_at_once()
    if threading.current_thread() is threading.main_thread():
        # Whatever waits for the end of a frame on Ctrl-C then does so here.
        signal.signal(signal.SIGTERM, interrupt)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is an error
    try:
        app(arguments, prog_name="vsod")
    except SystemExit as ended:
        if done is not None and not ended.code:
            done()
        raise
    except Exception as error:
        if debug:
            raise
        code, text = explained(error)
        print(f"vsod: {in_flags(text)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)


# What the library calls an argument, and the command a flag of another look.
FLAGS = (
    (r"\bview='(\w+)'", r"--as \1"),
    (r"^view must", "--as must"),
    (r"^refine (\S+)", r"--refine \1"),
    (r"^prior (\S+): model", r"--prior \1: model"),
    (r"^max_mb must", "--max-mb must"),
    (r"^token has", "--token has"),
    (r"^host (\S+) needs a token", r"--host \1 needs --token"),
)


def in_flags(message: str) -> str:
    """A message of the library, which names arguments, as one of the command."""
    message = re.sub(r"\b(\w+)=True\b", lambda m: "--" + m[1].replace("_", "-"), message)
    for argument, flag in FLAGS:
        message = re.sub(argument, flag, message)
    return message


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and one line of an error."""
    if isinstance(error, Stopped):
        return 130, str(error)
    if isinstance(error, (InputError, OSError)):
        return 2, describe(error)
    memory = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
    if isinstance(error, MemoryError) or any(m in str(error).lower() for m in memory):
        return 2, f"out of memory ({one_line(error)})"
    kind = type(error).__name__
    return 70, f"{kind}: {one_line(error)}; a fault of vsod's own: --debug shows where"
