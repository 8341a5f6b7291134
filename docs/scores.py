"""Writes the tables of scores.md from JSON files of `vsod eval`: python docs/scores.py [RESULTS]"""

import json
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("scores.md")
RESULTS = PAGE.parent.parent / "benchmarks/results/amd-epyc-zen4-2-threads/reproduction"
MEASURES = ("MAE", "maxF", "S", "maxE", "wF")
PROTOCOLS = ("davsod", "frame")
METHODS = ("mtnet", "vsod-mobile", "mssa-tiny")
# What papers print of DAVIS-2016: paper -> the protocol its numbers are read as, of what, numbers.
PRINTED = {
    "MSSA (2023)": ("davsod", "all 20 sequences", {"MAE": 0.033, "S": 0.845}),
    "MSSA's baseline (2023)": ("davsod", "all 20 sequences", {"MAE": 0.041, "S": 0.828}),
    "MSST-ConvLSTM (2018)": ("frame", "a half of its own", {"MAE": 0.045}),
}


def table(protocol: str, results: Path) -> str:
    lines = ["| maps | frames | " + " | ".join(MEASURES) + " |"]
    lines.append("| --- |" + " ---: |" * (len(MEASURES) + 1))
    for method in METHODS:
        found = json.loads((results / f"scores-{method}-{protocol}.json").read_text())
        assert found["protocol"] == protocol
        cells = [f"{found['overall'][name]:.4f}" for name in MEASURES]
        lines.append(f"| {method} | {found['frames']} | " + " | ".join(cells) + " |")
    for paper, (read_as, what, printed) in PRINTED.items():
        if read_as == protocol:
            cells = [f"{printed[name]:.3f}" if name in printed else "" for name in MEASURES]
            lines.append(f"| printed: {paper} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    text = PAGE.read_text()
    for protocol in PROTOCOLS:
        begin, end = f"<!-- table:{protocol}:begin -->", f"<!-- table:{protocol}:end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{table(protocol, results)}\n\n{end}{after}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
