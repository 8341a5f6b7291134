"""`python -m benchmarks report`: write the tables of README.md from benchmarks/results/.

A section between `<!-- results:NAME:begin -->` and `<!-- results:NAME:end -->` takes every
results/MACHINE/NAME.json: its `markdown(document)`, the plots beside it, and links, also to further
runs of that benchmark there (NAME-*.json).
"""

import argparse
import importlib
import json
import os
import re
from pathlib import Path

from . import BadInput, measure

_SECTION = re.compile(r"(<!-- results:(\w+):begin -->\n).*?(<!-- results:\2:end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=Path, default=measure.ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=measure.ROOT / "benchmarks" / "results")


def run(args: argparse.Namespace) -> int:
    if not args.readme.is_file():
        raise BadInput(f"{args.readme} does not exist")
    documents = {path: json.loads(path.read_text()) for path in sorted(
        args.results.glob("*/*.json"), key=lambda path: (path.parent.name, path.stem)
    )}  # fmt: skip
    text = args.readme.read_text()
    if not _SECTION.search(text):
        raise BadInput(f"{args.readme} has no <!-- results:NAME:begin --> section")

    def rewrite(section: re.Match) -> str:
        begin, name, end = section.groups()
        found = {path: doc for path, doc in documents.items() if doc["benchmark"] == name}
        if not found:
            raise BadInput(f"{args.results} has no results of {name}")
        parts = [
            _part(path, doc, args.readme.parent) for path, doc in found.items() if path.stem == name
        ]
        return f"{begin}\n" + "\n\n".join(parts) + f"\n\n{end}"

    args.readme.write_text(_SECTION.sub(rewrite, text))
    print(f"wrote {args.readme.name} from {len(documents)} results")
    return 0


def _part(path: Path, document: dict, base: Path) -> str:
    """One results file: heading, table, plots, where the numbers come from."""

    def link(target: Path) -> str:
        return os.path.relpath(target, base).replace(os.sep, "/")

    commit = document["commit"]
    revision = f", commit {commit['revision'][:10]}" if commit else ""
    revision += " with changes" if commit and commit["dirty"] else ""
    further = sorted(path.parent.glob(f"{path.stem}-*.json"))
    plots = sorted(path.parent.glob(f"{path.stem}-*.svg"))
    lines = [
        f"**{path.stem}**, {document['machine']['line']}",
        "",
        importlib.import_module(f"benchmarks.{document['benchmark']}").markdown(document),
        "",
    ]
    for image in plots:
        if not any(image.stem.startswith(f"{other.stem}-") for other in further):
            lines += [f"![{image.stem}]({link(image)})", ""]
    files = ", ".join(f"[{p.name}]({link(p)})" for p in (path, path.with_suffix(".csv")))
    lines.append(f"Measured {document['date'][:10]}{revision}; every rival and number: {files}")
    if further:
        runs = ", ".join(f"[{p.stem}]({link(p.with_suffix('.csv'))})" for p in further)
        lines[-1] += f". Further runs on this machine: {runs}"
    return "\n".join(lines)
