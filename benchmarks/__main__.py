"""Measure the operators against their alternatives."""

import argparse
import importlib
import sys
from typing import NoReturn

from . import BadInput

# A command is a module of this package with `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "attention": "speed and peak memory of shunted_attention against every alternative",
    "dense_crf": "speed and peak memory of dense_crf against pydensecrf",
    "conv_lstm": "speed and peak memory of conv_lstm against every way to write it in torch",
    "msst": "MSST-ConvLSTM from frames to refined masks: time by stage, and of streaming",
    "mssa": "MSSA: time and multiply-adds by stage, and against materialised attention scores",
    "small": "calls of 49 to 490 tokens and on maps of 8x8 and 16x16, on one thread and two",
    "correct": "coarse labels cleaned on the page of vsod serve: what is left, what it takes",
    "serve": "how soon the pages of vsod serve answer",
    "predict": "frames a second of `vsod predict`, and where a frame's time goes",
    "batch": "clips an hour of `vsod batch`, and of a loop of `vsod predict`",
    "export": "what `vsod export` writes, in onnxruntime and as a package, against PyTorch",
    "report": "rewrite the result tables of README.md and docs/ from benchmarks/results/",
}
EXTRA_PACKAGES = ("av", "matplotlib", "rich", "torchvision")  # of the extra `bench`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    try:
        for name, text in COMMANDS.items():
            command = subparsers.add_parser(name, help=text, description=text)
            if argv[:1] == [name]:  # only the command that runs is imported
                importlib.import_module(f"benchmarks.{name}").add_arguments(command)
        args = parser.parse_args(argv)
        return importlib.import_module(f"benchmarks.{args.command}").run(args)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        message = f"{error.name} is missing: pip install -e '.[bench]'"
    except BadInput as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
