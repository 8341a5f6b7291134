"""`python -m benchmarks small`: calls so small that the way to the kernel costs as much as it.

Each case is ours against one rival, checked before it is timed: five runs, in each of which the two
take turns.  A ratio is the median over the runs of (median of the rival / median of ours); one of
at least 0.97 counts as 1.0.  Everything runs on the CPU, on one thread and on two.  Sections may be
measured one after another: what is in the folder from the same commit and machine stays.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vsod_ops import ShuntedAttention

from . import attention_rivals, conv_lstm, dense_crf, measure
from .arguments import add_out, duration, positive
from .measure import BOTH, FORWARD, dtype_name

CPU = torch.device("cpu")
RUNS = 5
AS_FAST = 0.97  # what two runs of the same code may differ by

# Tokens T x H x W, each length with its number of keys at reduction 2 rounded up: 16 to 80.
TOKENS = ((1, 7, 7), (4, 5, 5), (4, 7, 7), (5, 7, 7), (10, 7, 7))
HEADS = ((4, 128), (8, 64), (8, 32))
LAYERS = ((64, 2), (256, 4), (512, 8))  # channels, heads
CHANNELS = (16, 32, 64, 128, 256)
MAPS = (8, 16)
STEPS = 4
BATCHES = (1, 8)

Call = Callable[[], Any]


class Wrong(Exception):
    """A result that is not the definition's."""


@dataclass(frozen=True)
class Case:
    section: str
    row: str
    column: str
    rival: str
    bar: float | None  # the least ratio; None: reported only
    make: Callable[[], tuple[Call, Call]]  # ours and the rival's, both checked


# ---- the cases


def attention(
    shape: tuple[int, int, int, int], heads: int, dim: int, dtype: torch.dtype, direction: str
) -> tuple[Call, Call]:
    case = attention_rivals.Case(shape, heads, dim, ((1, 1, 1), (2, 2, 2)), dtype, CPU)
    inputs = attention_rivals.Inputs.random(case, seed=0)
    oracle = attention_rivals.Oracle.of(inputs)
    calls = []
    for rival in (attention_rivals.ours(None), attention_rivals.RIVALS["sdpa"]):
        function = rival.build(case)
        try:
            oracle.check(oracle.inputs.call(function, direction)())
        except attention_rivals.Wrong as error:
            raise Wrong(f"{rival.label}: {error}") from None
        calls.append(inputs.call(function, direction))
    return calls[0], calls[1]


def attention_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for heads, dim in HEADS:
            for batch in BATCHES:
                for direction in (FORWARD, BOTH):
                    row = f"{dtype_name(dtype)}, {heads} x {dim}, B={batch}, {direction}"
                    for t, h, w in TOKENS:
                        arguments = ((batch, t, h, w), heads, dim, dtype, direction)
                        yield Case(
                            "attention", row, str(t * h * w), "SDPA a group + cat", AS_FAST,
                            lambda arguments=arguments: attention(*arguments),
                        )  # fmt: skip


def overhead_cases() -> Iterator[Case]:
    """16 tokens, 2 heads of 8: the kernels have next to nothing to do."""
    for direction, bar in ((FORWARD, 27 / 30), (BOTH, 167 / 170)):
        yield Case(
            "overhead", f"16 tokens, 2 x 8, {direction}", "", "SDPA a group + cat", bar,
            lambda direction=direction: attention((1, 1, 4, 4), 2, 8, torch.float32, direction),
        )  # fmt: skip


def layer(
    tokens: tuple[int, int, int], channels: int, heads: int, reductions: tuple[int, ...]
) -> tuple[Call, Call]:
    """Both layers with the same weights; with reductions they are no longer the same function."""
    torch.manual_seed(0)
    ours = ShuntedAttention(channels, heads, reductions).eval()
    theirs = nn.MultiheadAttention(channels, heads, batch_first=True).eval()
    x = torch.randn(1, *tokens, channels)
    flat = x.flatten(1, 3)

    def our_call() -> Tensor:
        with torch.no_grad():
            return ours(x)

    def their_call() -> Tensor:
        with torch.no_grad():
            return theirs(flat, flat, flat, need_weights=False)[0]

    wide = copy.deepcopy(ours).double()
    wide.backend = "reference"
    with torch.no_grad():
        results = {"ShuntedAttention": our_call()}
        if reductions == (1,):
            parts = (ours.query, ours.key_value[0])
            theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
            theirs.out_proj.load_state_dict(ours.out.state_dict())
            results["MultiheadAttention"] = their_call().view_as(x)
        expected = wide(x.double())
    check(results, expected, 1e-5)
    return our_call, their_call


def layer_cases() -> Iterator[Case]:
    for reductions in ((1,), (1, 2)):
        for channels, heads in LAYERS:
            for tokens in TOKENS:
                length = tokens[0] * tokens[1] * tokens[2]
                # What a reduction costs is more than what it saves where there are few tokens.
                bar = AS_FAST if reductions == (1,) or length >= 196 else None
                arguments = (tokens, channels, heads, reductions)
                yield Case(
                    "layer", f"reductions={reductions}, C={channels}", str(length),
                    "nn.MultiheadAttention", bar,
                    lambda arguments=arguments: layer(*arguments),
                )  # fmt: skip


def lstm(shape: tuple[int, ...], direction: str) -> tuple[Call, Call]:
    case = conv_lstm.Case(shape, torch.float32, CPU)
    inputs = case.inputs(0)
    ours = lstm_call(inputs, direction)
    theirs = conv_lstm.call_of(conv_lstm.cell_loop, inputs, direction)
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    oracle = conv_lstm.call_of(conv_lstm.definition, wide, direction)()
    for name, call in (("conv_lstm", ours), ("eager", theirs)):
        if (error := conv_lstm.errors(call(), oracle)) > conv_lstm.limit(name, case):
            raise Wrong(f"{name}: relative error {error:.1e}")
    return ours, theirs


def lstm_call(inputs: conv_lstm.Inputs, direction: str) -> Call:
    return conv_lstm.call_of(
        lambda *tensors: conv_lstm.conv_lstm(tensors[0], None, *tensors[1:])[0], inputs, direction
    )


def lstm_cases() -> Iterator[Case]:
    for size in MAPS:
        for batch in BATCHES:
            for direction in (FORWARD, BOTH):
                for channels in CHANNELS:
                    shape = (batch, STEPS, channels, channels, size, size)
                    yield Case(
                        "conv_lstm", f"{size}x{size}, B={batch}, {direction}", str(channels),
                        "eager cell", AS_FAST,
                        lambda shape=shape, direction=direction: lstm(shape, direction),
                    )  # fmt: skip


def lstm_bfloat16() -> tuple[Call, Call]:
    """Ours in bfloat16 and in float32, of the same numbers."""
    shape = (1, STEPS, 64, 64, 64, 64)
    half = conv_lstm.Case(shape, torch.bfloat16, CPU)
    inputs = half.inputs(0)
    single = tuple(x.detach().float() for x in inputs)
    wide = conv_lstm.call_of(conv_lstm.definition, tuple(x.double() for x in single), FORWARD)
    ours, theirs = lstm_call(inputs, FORWARD), lstm_call(single, FORWARD)
    oracle = wide()
    if (error := conv_lstm.errors(ours(), oracle)) > conv_lstm.limit("ours", half):
        raise Wrong(f"conv_lstm: relative error {error:.1e}")
    check({"conv_lstm, float32": theirs()[0]}, oracle[0], 1e-4)
    return ours, theirs


def crf() -> tuple[Call, Call]:
    prob, image = dense_crf.synthetic(1, 64, 64, 0)

    def ours() -> Tensor:
        return dense_crf.dense_crf(prob, image, preset="dss")

    def theirs() -> Tensor:
        return dense_crf.pydensecrf(prob, image, dense_crf.PRESETS["dss"])

    if (ours() - theirs()).abs().mean().item() > dense_crf.MEAN_DIFFERENCE:
        raise Wrong("dense_crf and pydensecrf differ")
    return ours, theirs


def single_cases() -> Iterator[Case]:
    level = measure.machine(CPU)["vector_level"]
    yield Case(
        "conv_lstm, bfloat16", "64 -> 64, 64x64, B=1, forward", "", "conv_lstm, float32",
        1.5 if level == "avx512bf16" else None, lstm_bfloat16,
    )  # fmt: skip
    yield Case("dense_crf", "one frame of 64x64", "", "pydensecrf", None, crf)


SECTIONS: dict[str, Callable[[], Iterable[Case]]] = {
    "attention": attention_cases,
    "overhead": overhead_cases,
    "layer": layer_cases,
    "conv_lstm": lstm_cases,
    "single": single_cases,
}


def check(results: Mapping[str, Tensor], expected: Tensor, limit: float) -> None:
    """Raise Wrong where one is off by more than `limit` of the largest number expected."""
    for name, result in results.items():
        error = ((result.double() - expected).abs().max() / expected.abs().max()).item()
        if not error <= limit:
            raise Wrong(f"{name}: relative error {error:.1e}")


# ---- measuring


def run_case(case: Case, calls: tuple[Call, Call], seconds: float) -> dict[str, Any]:
    ours, theirs = calls
    start = time.perf_counter()
    ours(), theirs()
    expected = time.perf_counter() - start
    works = {"ours": measure.Work(ours), "rival": measure.Work(theirs)}
    runs = [measure.interleave(works, seconds / RUNS, CPU, expected) for _ in range(RUNS)]
    ratios = [run["rival"].median / run["ours"].median for run in runs]
    ratio = statistics.median(ratios)
    return {
        "section": case.section,
        "row": case.row,
        "column": case.column,
        "threads": torch.get_num_threads(),
        "rival": case.rival,
        "ours_s": statistics.median(run["ours"].median for run in runs),
        "rival_s": statistics.median(run["rival"].median for run in runs),
        "ratio": ratio,
        "lowest": min(ratios),
        "highest": max(ratios),
        "repeats": runs[0]["ours"].repeats,
        "bar": case.bar,
        "met": None if case.bar is None else ratio >= case.bar,
    }


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--section",
        action="append",
        choices=list(SECTIONS),
        help="may be given more than once (default: all)",
    )
    add("--match", metavar="TEXT", help="only cases whose row and column have TEXT in them")
    add(
        "--threads",
        type=positive,
        action="append",
        metavar="N",
        help="may be given more than once (default: 1 and 2)",
    )
    add(
        "--seconds",
        type=duration,
        default=0.25,
        help="time for one case, all of its five runs (default: 0.25)",
    )
    add_out(parser)


def run(args: argparse.Namespace) -> int:
    measure.one_heap()
    document = measure.record("small", CPU, vars(args))
    print(document["machine"]["line"])
    document |= {"cases": [], "left_out": {}}
    kept = measured_before(args.out, document)
    before, wrong = torch.get_num_threads(), False
    counts = args.threads or [1, 2]
    try:
        for case in cases_of(args):
            label = ", ".join(filter(None, (case.section, case.row, case.column)))
            torch.set_num_threads(max(counts))
            try:
                calls = case.make()
            except (Wrong, ImportError) as error:
                wrong |= isinstance(error, Wrong)
                document["left_out"][label] = measure.reason(error)
                print(f"left out: {label}: {error}", flush=True)
                continue
            for threads in counts:
                torch.set_num_threads(threads)
                document["cases"].append(run_case(case, calls, args.seconds))
                print(_line(label, document["cases"][-1]), flush=True)
    finally:
        torch.set_num_threads(before)
    document["load_average"] = measure.load_average()
    again = {(place(row), row["threads"]) for row in document["cases"]}
    document["cases"] += [row for row in kept if (place(row), row["threads"]) not in again]
    order = [place(vars(case)) for cases in SECTIONS.values() for case in cases()]
    document["cases"].sort(key=lambda row: (order.index(place(row)), row["threads"]))
    paths = measure.write_results(document, document["cases"], args.out, "small")
    print("wrote " + ", ".join(path.name for path in paths))
    return 1 if wrong else 0


def measured_before(folder: Path, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in `folder` that the same machine measured at the same commit."""
    path = folder / "small.json"
    if not path.is_file():
        return []
    old = json.loads(path.read_text())
    same = all(old[name] == document[name] for name in ("commit", "machine"))
    return old["cases"] if same else []


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["section"], row["row"], row["column"]


def cases_of(args: argparse.Namespace) -> Iterator[Case]:
    for name, cases in SECTIONS.items():
        for case in cases() if name in (args.section or SECTIONS) else ():
            if not args.match or args.match in f"{case.row}, {case.column}":
                yield case


def _line(label: str, row: Mapping[str, Any]) -> str:
    verdict = {None: "", True: "", False: "  behind"}[row["met"]]
    return (
        f"{label}, {row['threads']} thread{'s' * (row['threads'] > 1)}: "
        f"{measure.seconds_text(row['ours_s'])} against {measure.seconds_text(row['rival_s'])}, "
        f"{row['ratio']:.2f}x ({row['lowest']:.2f} to {row['highest']:.2f}){verdict}"
    )


def markdown(document: Mapping[str, Any]) -> str:
    """A table a section: ratios, one column a number of threads within each size."""
    tables = []
    for section in dict.fromkeys(row["section"] for row in document["cases"]):
        rows = [row for row in document["cases"] if row["section"] == section]
        columns = list(dict.fromkeys(row["column"] for row in rows))
        lines = []
        for name in dict.fromkeys(row["row"] for row in rows):
            of_row = [row for row in rows if row["row"] == name]
            cells = [
                " / ".join(_cell(row) for row in of_row if row["column"] == column)
                for column in columns
            ]
            lines.append([name, *cells])
        heads = [column or "ratio" for column in columns]
        tables.append(f"`{section}` against {rows[0]['rival']}:")
        tables.append(measure.markdown_table([section, *heads], lines, left=1))
    judged = [row for row in document["cases"] if row["bar"] is not None]
    behind = sum(not row["met"] for row in judged)
    threads = " and ".join(str(n) for n in dict.fromkeys(r["threads"] for r in document["cases"]))
    tables.append(
        f"Times of the rival / times of ours, on {threads} threads; in bold what is behind its "
        f"bar: {behind} of {len(judged)}."
    )
    return "\n\n".join(tables)


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{row['ratio']:.2f}"
    return f"**{text}**" if row["met"] is False else text
