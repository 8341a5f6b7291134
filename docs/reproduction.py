"""Writes the tables of reproduction.md from the JSON files of `vsod eval`.

python docs/reproduction.py [RESULTS]               fills them in
python docs/reproduction.py --print NAME [RESULTS]  prints those of recipes/NAME.sh
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

PAGE = Path(__file__).with_name("reproduction.md")
RESULTS = PAGE.parent.parent / "benchmarks/results/amd-epyc-zen4-2-threads/reproduction"
MEASURES = ("MAE", "maxF", "S", "maxE", "wF")


def row(title: str, path: Path) -> str:
    overall = json.loads(path.read_text())["overall"]
    return f"| {title} | " + " | ".join(f"{overall[name]:.4f}" for name in MEASURES) + " |"


def table(first: str, rows: list[tuple[str, str]], results: Path) -> str:
    head = [f"| {first} | " + " | ".join(MEASURES) + " |", "| --- |" + " ---: |" * len(MEASURES)]
    there = [(title, results / f"{name}.json") for title, name in rows]
    return "\n".join(head + [row(title, path) for title, path in there if path.exists()])


TABLES = {
    "mssa": ("model, gamma, seed", [
        (f"{title}, {gamma}, {seed}", f"{model}-{gamma}-{seed}")
        for gamma in ("balanced", "paper")
        for model, title in (("baseline", "baseline (r = 1)"), ("mssa", "MSSA (r = 1, 2)"))
        for seed in (0, 1)
    ]),
    "msst": ("configuration, seed", [
        (f"{name}{title}, {seed}", f"{name}-{seed}{ending}")
        for title, ending in (("", ""), (" + CRF", "-crf"))
        for name in ("os", "st", "full")
        for seed in (0, 1)
    ]),
    "coarse": ("labels, seed", [
        (f"{title}, {seed}", f"{name}-{seed}")
        for name, title in (
            ("half", "half of the sequences, fine"),
            ("coarse", "and the other half coarse, of training-free maps"),
            ("own-coarse", "and the other half coarse, with a trained model's maps"),
        )
        for seed in (0, 1)
    ]),
    "small": ("clips", [("held out, 4 clips, + CRF", "msst-small")]),
    "mobile": ("data, protocol", [
        ("DAVIS val, 10 sequences, davsod", "mobile-davis-overlap0"),
        ("the same, windows that share 1 frame", "mobile-davis-overlap1"),
        ("the same, windows that share 2 frames", "mobile-davis-overlap2"),
        ("the same, `--causal`", "mobile-davis-causal"),
        ("the same, frames of 256x448", "mobile-davis-448"),
        ("the same, zeros in place of the motion", "mobile-davis-no-motion"),
        ("BMS-26, 5 sequences that were left out of training, davsod", "mobile-bms26"),
        ("the same, zeros in place of the motion", "mobile-bms26-no-motion"),
        ("ECSSD 0301 to 1000, 700 stills, frame", "mobile-ecssd"),
        ("DUTS-TE, 5,019 stills, frame", "mobile-duts-te"),
        ("second version, DAVIS val, davsod", "mobile-2-davis"),
        ("second version, BMS-26, davsod", "mobile-2-bms26"),
        ("second version, ECSSD, frame", "mobile-2-ecssd"),
        ("second version, DUTS-TE, frame", "mobile-2-duts-te"),
        ("first version, DAVIS val, davsod", "mobile-1-davis"),
        ("first version, frames of 256x448", "mobile-1-davis-448"),
        ("first version, BMS-26, davsod", "mobile-1-bms26"),
        ("first version, ECSSD, frame", "mobile-1-ecssd"),
        ("first version trained on larger frames, DAVIS val, davsod", "mobile-1-larger-davis"),
        ("first version trained on larger frames, ECSSD, frame", "mobile-1-larger-ecssd"),
    ]),
    "tiny": ("clips", [
        ("DAVIS val, 10 sequences", "tiny-davis"),
        ("synthetic val, 20 clips", "tiny-synthetic"),
    ]),
}  # fmt: skip


# What recipes/table1.sh and recipes/msst.sh leave: (name of the table and of its file, title).
OF_SCRIPTS = {
    "table1": (
        ("table1-davis16", "DAVIS-2016"),
        ("table1-segtrackv2", "SegTrack-V2"),
        ("table1-fbms59", "FBMS-59"),
    ),
    "msst": (("msst-ablation", "configuration"), ("msst-coarse", "labels")),
}


def compared(title: str, file: Path) -> str:
    """A row for each method of an evaluation of several; NAME-SEED are seeds of one method.

    Over seeds it is their mean and half of the range.
    """
    methods = defaultdict(list)
    for name, evaluation in json.loads(file.read_text()).items():
        methods[re.sub(r"-\d+", "", name)].append(evaluation)
    lines = [f"| {title} | " + " | ".join(MEASURES) + " |", "| --- |" + " ---: |" * len(MEASURES)]
    for name, seeds in methods.items():
        cells = []
        for measure in MEASURES:
            values = [seed["overall"][measure] for seed in seeds]
            spread = f" ± {(max(values) - min(values)) / 2:.4f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.4f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = seeds[0]
    count = max(map(len, methods.values()))
    means = f"; means of {count} seeds ± half of their range" if count > 1 else ""
    lines += ["", f"{first['frames']} frames, protocol {first['protocol']}{means}."]
    return "\n".join(lines)


def print_tables(script: str, results: Path) -> None:
    tables = [
        compared(title, results / f"{name}.json")
        for name, title in OF_SCRIPTS[script]
        if (results / f"{name}.json").exists()
    ]
    labels = [
        f"{name} labels: {json.loads(file.read_text())['overall']['MAE']:.1%} of the pixels wrong."
        for name in ("coarse", "person")
        if script == "msst" and (file := results / f"msst-labels-{name}.json").exists()
    ]
    print("\n\n".join([*tables, *labels]))


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--print"]:
        print_tables(arguments[1], Path(arguments[2]) if len(arguments) > 2 else RESULTS)
        return
    results = Path(arguments[0]) if arguments else RESULTS
    text = PAGE.read_text()
    for name, (first, rows) in TABLES.items():
        begin, end = f"<!-- table:{name}:begin -->", f"<!-- table:{name}:end -->"
        between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        filled = f"{begin}\n\n{table(first, rows, results)}\n\n{end}"
        text = between.sub(lambda _, filled=filled: filled, text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
