"""`python -m benchmarks report`: write the tables of README.md and docs/ from benchmarks/results/.

A section between `<!-- results:NAME:begin -->` and `<!-- results:NAME:end -->` takes every
results/MACHINE/NAME.json: its `markdown(document)`, the plots beside it, and links, also to further
runs of that benchmark there (NAME-*.json).  The section `summary` takes five rows for each machine
that has the results for them.
"""

import argparse
import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import BadInput, measure, summary

_SECTION = re.compile(r"(<!-- results:(\w+):begin -->\n).*?(<!-- results:\2:end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pages", type=Path, nargs="+", help="default: README.md, and those of docs/ with tables")
    add("--results", type=Path, default=measure.ROOT / "benchmarks" / "results")


def run(args: argparse.Namespace) -> int:
    written = rewritten(args.pages or pages(), args.results)
    for page, text in written.items():
        page.write_text(text)
    print(f"wrote {', '.join(page.name for page in written)} from {args.results}")
    return 0


def rewritten(pages: Sequence[Path], results: Path) -> dict[Path, str]:
    """The text that each page is to have."""
    documents = {path: json.loads(path.read_text()) for path in sorted(
        results.glob("*/*.json"), key=lambda path: (path.parent.name, path.stem)
    )}  # fmt: skip
    return {page: _rewrite(page, results, documents) for page in pages}


def pages() -> list[Path]:
    """README.md and the pages of docs/ that have tables."""
    docs = sorted((measure.ROOT / "docs").glob("*.md"))
    return [measure.ROOT / "README.md", *(p for p in docs if _SECTION.search(p.read_text()))]


def _rewrite(page: Path, results: Path, documents: Mapping[Path, dict]) -> str:
    """The text of `page` with all of its sections filled."""
    if not page.is_file():
        raise BadInput(f"{page} does not exist")
    text = page.read_text()
    if not _SECTION.search(text):
        raise BadInput(f"{page} has no <!-- results:NAME:begin --> section")

    def section(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name == "summary":
            return f"{begin}\n{_summary(results, documents)}\n\n{end}"
        found = {path: doc for path, doc in documents.items() if doc["benchmark"] == name}
        if not found:
            raise BadInput(f"{results} has no results of {name}")
        parts = [_part(path, doc, page.parent) for path, doc in found.items() if path.stem == name]
        return f"{begin}\n" + "\n\n".join(parts) + f"\n\n{end}"

    return _SECTION.sub(section, text)


def _summary(results: Path, documents: Mapping[Path, dict]) -> str:
    parts = []
    for machine in dict.fromkeys(path.parent for path in documents):
        there = {name: documents.get(machine / f"{name}.json") for name in summary.NEEDED}
        known = {name: document for name, document in there.items() if document}
        if len(known) == len(there):
            parts += [known["attention"]["machine"]["line"] + ":", summary.markdown(known)]
    if not parts:
        raise BadInput(f"{results} has no machine with results of {', '.join(summary.NEEDED)}")
    return "\n\n".join(parts)


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
