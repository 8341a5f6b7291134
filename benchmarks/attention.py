"""`python -m benchmarks attention`: shunted_attention against everything a user could call instead.

Each rival is checked against the float64 reference before it is timed; one that is wrong, fails or
cannot run here is listed with its reason.  Forward runs without gradients; forward + backward
returns the gradients of q, keys and values; backward is the difference of the two medians.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vsod_ops import backends

from . import BadInput, measure
from .arguments import (
    add_baselines,
    add_common,
    add_dtype,
    begin,
    duration,
    positive,
    sizes,
)
from .attention_report import case_table, left_out, markdown, plot, summary_table
from .attention_rivals import (
    OURS,
    RIVALS,
    Attention,
    Case,
    Inputs,
    Oracle,
    Rival,
    Skipped,
    Wrong,
    ours,
)
from .measure import AS_CALLED, BACKWARD, BOTH, FORWARD, IN_GRAPH, dtype_name

__all__ = ["add_arguments", "markdown", "run"]

PAPER = [((1, 5, 28, 28), (4, 128)), ((1, 5, 14, 14), (8, 64))]  # VGG16 stages 4, 5 at 224x224
HEADS = [(4, 128), (8, 64)]
SWEEP_SHAPES = [(1, 5, 7, 7), (1, 5, 14, 14), (1, 5, 28, 28), (1, 5, 56, 56), (1, 20, 56, 56)]
WARM_UP_LIMIT = 5.0  # seconds; no extra call before the check of what is expected to take longer


# ---- measuring one case


class Bench:
    """Measures cases; remembers rates reached, to leave out what would take too long."""

    def __init__(
        self,
        rivals: Mapping[str, Rival],
        *,
        seconds: float,
        limit: float,
        slow: Mapping[torch.dtype, float],
        step: Callable[[str], None],
    ) -> None:
        self.rivals = rivals
        self.seconds = seconds
        self.limit = limit
        self.slow = slow  # FLOP/s that the slowest rival is expected to reach
        self.step = step  # called with what is about to run
        self.rates: dict[tuple, float] = {}  # (rival, dtype, direction) -> FLOP/s reached
        self.memory: dict[tuple, tuple[int, int]] = {}  # the same -> peak bytes, scores then
        self.failures: list[str] = []  # of ours

    def run(self, case: Case, inputs: Inputs) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Rows of results, and rival (and direction) -> why it was left out."""
        oracle = Oracle.of(inputs)
        built, left_out = self._build(case)
        rows: list[dict[str, Any]] = []
        for direction in (FORWARD, BOTH):
            seconds: dict[str, float] = {}
            memory: dict[str, int | None] = {}
            for name in list(built):
                self.step(f"check {self.rivals[name].label}, {direction}")
                try:
                    seconds[name], memory[name] = self._check(
                        name, case, built[name], oracle, direction
                    )
                except Exception as error:
                    known = isinstance(error, (Wrong, Skipped))
                    left_out[f"{name}, {direction}"] = (
                        str(error) if known else measure.reason(error)
                    )
                    if name == OURS and not isinstance(error, Skipped):
                        why = left_out[f"{name}, {direction}"]
                        self.failures.append(f"{case.label}, {direction}: {why}")
                    if isinstance(error, Wrong):  # wrong once: nothing of it counts
                        rows = [row for row in rows if row["rival"] != name]
                        del built[name]
            checked = {name: built[name] for name in memory if name in built}
            for mode in (AS_CALLED, IN_GRAPH) if case.device.type == "cuda" else (AS_CALLED,):
                self.step(f"time {direction}, {mode}")
                works = self._works(checked, inputs, direction, mode, left_out)
                expected = None  # on a GPU one call says little about a sample, which is many
                if case.device.type == "cpu":
                    expected = sum(seconds[name] for name in works)
                timings = measure.interleave(works, self.seconds, case.device, expected)
                for name, timing in timings.items():
                    rate = case.flops(direction) / timing.median
                    self.rates[name, case.dtype, direction] = rate
                    rows.append(
                        {
                            "rival": name,
                            "label": self.rivals[name].label,
                            "direction": direction,
                            "mode": mode,
                            **{f"{k}_s": v for k, v in vars(timing).items() if k != "repeats"},
                            "repeats": timing.repeats,
                            "peak_extra_bytes": memory[name] if mode == AS_CALLED else None,
                        }
                    )
        rows += _derived_backward(rows)
        _compare(case, rows)
        return rows, left_out

    def _build(self, case: Case) -> tuple[dict[str, Attention], dict[str, str]]:
        # Each case compiles the same functions: start afresh, or torch stops at its limit (and in
        # 2.15 FlexAttention's second dynamic compilation on a CPU is invalid C++).
        torch.compiler.reset()
        built, left_out = {}, {}
        for name, rival in self.rivals.items():
            if case.device.type not in rival.devices:
                left_out[name] = f"does not run on {case.device.type}"
                continue
            try:
                built[name] = rival.build(case)
            except Exception as error:
                left_out[name] = measure.reason(error)
        return built, left_out

    def _check(
        self, name: str, case: Case, attention: Attention, oracle: Oracle, direction: str
    ) -> tuple[float, int | None]:
        """Check one rival; return its seconds and its peak extra memory in bytes."""
        rival = self.rivals[name]
        if direction == BOTH and case.device.type not in rival.backward_devices:
            raise Skipped(f"no backward on {case.device.type}")
        expected = self._skip_if_too_much(name, case, direction)
        call = oracle.inputs.call(attention, direction)
        if rival.compiled or expected < WARM_UP_LIMIT:
            call()  # compiles, tunes, sets up libraries: not part of the memory of one call
        results, seconds, peak = measure.call_and_peak(call, case.device)
        oracle.check(results)
        if seconds > self.limit:
            raise Skipped(f"one call took more than {self.limit:g} s")
        if peak is not None:
            self.memory[name, case.dtype, direction] = peak, sum(case.scores)
        return seconds, peak

    def _skip_if_too_much(self, name: str, case: Case, direction: str) -> float:
        """Raise Skipped where memory or time would not do; else return the expected seconds."""
        key = (name, case.dtype, direction)
        materialises = self.rivals[name].materialises
        needed = 0.0
        if key in self.memory:  # grows like the scores at most, like their root where none is kept
            peak, scores = self.memory[key]
            needed = peak * (sum(case.scores) / scores) ** (1 if materialises else 0.5)
        elif materialises:
            buffers = max(case.scores) * (2 if direction == FORWARD else 3)
            if direction == BOTH:  # the probabilities of every group wait for the backward
                buffers += sum(case.scores)
            needed = buffers * case.dtype.itemsize
        if needed > 0.8 * measure.free_memory(case.device):
            raise Skipped("might need more memory than there is")
        expected = case.flops(direction) / self.rates.get(key, self.slow[case.dtype])
        if expected > self.limit:
            raise Skipped(f"one call is expected to take more than {self.limit:g} s")
        return expected

    def _works(
        self,
        built: Mapping[str, Attention],
        inputs: Inputs,
        direction: str,
        mode: str,
        left_out: dict[str, str],
    ) -> dict[str, measure.Work]:
        count = measure.copies_past_cache(inputs.bytes, inputs.q.device)
        copies = [inputs, *(inputs.copy() for _ in range(count - 1))]
        calls = {name: [x.call(built[name], direction) for x in copies] for name in built}
        works, failed = measure.works_of(calls, mode)
        left_out |= {f"{name}, {direction}, {mode}": why for name, why in failed.items()}
        return works


def _compare(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Add FLOP/s and the speed-up of ours to `rows`."""
    mine = {(r["direction"], r["mode"]): r["median_s"] for r in rows if r["rival"] == OURS}
    for row in rows:
        row["flops"] = case.flops(row["direction"])
        row["gflops_per_second"] = row["flops"] / row["median_s"] / 1e9
        ours_s = mine.get((row["direction"], row["mode"]))
        row["speedup_of_ours"] = None if ours_s is None else row["median_s"] / ours_s


def _derived_backward(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Backward = forward + backward less forward, of the medians; it has no percentiles."""
    forward = {(r["rival"], r["mode"]): r["median_s"] for r in rows if r["direction"] == FORWARD}
    derived = []
    for row in rows:
        before = forward.get((row["rival"], row["mode"]))
        if row["direction"] == BOTH and before is not None and row["median_s"] > before:
            derived.append(
                {
                    **row,
                    "direction": BACKWARD,
                    "median_s": row["median_s"] - before,
                    "p20_s": None,
                    "p80_s": None,
                    "peak_extra_bytes": None,
                }
            )
    return derived


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shape",
        type=sizes("BxTxHxW"),
        action="append",
        metavar="BxTxHxW",
        help="video tokens; may be given more than once (default: 1x5x28x28 with 4 heads of 128 "
        "and 1x5x14x14 with 8 of 64)",
    )
    add("--full", action="store_true", help="the default shapes, each with 4 and with 8 heads")
    add("--heads", type=positive, help="number of heads (default: 512 / dim, or 4 and 8)")
    add("--dim", type=positive, help="size of one head (default: 512 / heads)")
    add(
        "--reductions",
        type=_reductions,
        default=((1, 1, 1), (2, 2, 2)),
        metavar="1,2",
        help="reduction rate of each head group, r or TxHxW (default: 1,2)",
    )
    add_dtype(parser, "float32 and bfloat16")
    add("--sweep", action="store_true", help="lengths from 245 to 62,720 tokens, 4 heads of 128")
    add(
        "--clip",
        type=Path,
        metavar="PATH",
        help="q, k and v from the frames of a video or of a folder of images, in place of random "
        "numbers: VGG16 features of stages 4 and 5 through ShuntedAttention's projections",
    )
    add("--frames", type=positive, default=5, help="frames taken from --clip (default: 5)")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="state dict of torchvision's vgg16 for --clip (default: random weights)",
    )
    add_baselines(parser, RIVALS)
    add("--backend", choices=backends.BACKENDS, help="backend of shunted_attention")
    add(
        "--limit",
        type=duration,
        default=60.0,
        help="leave a rival out where one call takes more than these seconds (default: 60)",
    )
    add_common(
        parser, device=None, seconds=None,
        seconds_help="time for one case and direction (default: 1; sweep: 10)",
    )  # fmt: skip


def _reductions(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        sizes("TxHxW")(part) if "x" in part.lower() else (positive(part),) * 3
        for part in text.split(",")
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=130)
    device = begin(args)
    dtypes = [measure.DTYPES[name] for name in args.dtype or ("float32", "bfloat16")]
    ours_runs_on = {}
    for dtype in dtypes:
        try:
            ours_runs_on[dtype] = backends.choose(
                "shunted_attention", args.backend, device.type, dtype
            )
        except ValueError as error:
            raise BadInput(str(error)) from None

    record = measure.record("attention", device, vars(args))
    chosen = ", ".join(sorted(set(ours_runs_on.values())))
    line = record["machine"]["line"]
    console.print(f"{line}; shunted_attention runs on {chosen}", soft_wrap=True)

    cases = list(_cases(args, device, dtypes))
    rivals = {OURS: ours(args.backend), **{name: RIVALS[name] for name in args.baselines}}
    what = TextColumn("{task.description}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what)
    shown = console.is_terminal
    progress = Progress(*columns, console=console, transient=True, disable=not shown)
    with progress as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rival that cannot run says why in the results
        task = bar.add_task("peak of the machine", total=len(cases))
        peaks = {dtype: measure.peak_flops(device, dtype) for dtype in dtypes}
        bench = Bench(
            rivals,
            seconds=args.seconds or (10 if args.sweep else 1),
            limit=args.limit,
            slow={dtype: 0.1 * peak["flops_per_second"] for dtype, peak in peaks.items()},
            step=lambda text: bar.update(task, description=text),
        )
        results: list[dict[str, Any]] = []

        def written() -> tuple[dict[str, Any], list[Path]]:
            document = {
                **record,
                "peak": {dtype_name(dtype): peak for dtype, peak in peaks.items()},
                "seconds_total": round(time.perf_counter() - start, 1),
                "load_average": measure.load_average(),
                "cases": results,
            }
            flat = [
                {k: v for k, v in case.items() if k not in ("rows", "left_out")} | row
                for case in results
                for row in case["rows"]
            ]
            return document, measure.write_results(document, flat, args.out, _stem(args))

        for case, make_inputs in cases:
            rows, absent = bench.run(case, make_inputs())
            results.append(_describe(case, args.seed, ours_runs_on[case.dtype], rows, absent))
            again = measure.peak_flops(device, case.dtype)  # the best of several moments
            peaks[case.dtype] = max(peaks[case.dtype], again, key=lambda p: p["flops_per_second"])
            for row in rows:
                peak = peaks[case.dtype]["flops_per_second"] / 1e9
                row["share_of_peak"] = row["gflops_per_second"] / peak
            if rows:
                console.print(case_table(results[-1]))
            document, paths = written()  # so far: the rest may take too long
            bar.advance(task)

    paths += plot(document, args.out, _stem(args))
    console.print(summary_table(document))
    for text in left_out(document):
        console.print(f"left out: {text}", soft_wrap=True)
    for name, peak in document["peak"].items():
        rate = peak["flops_per_second"] / 1e9
        console.print(f"peak {name}: {rate:.0f} GFLOP/s ({peak['how']})")
    console.print(f"wrote {', '.join(path.name for path in paths)} to {args.out}", soft_wrap=True)
    console.print(f"{document['seconds_total']:.0f} s in all")
    for failure in bench.failures:
        console.print(f"shunted_attention FAILED: {failure}", style="red", soft_wrap=True)
    return 1 if bench.failures else 0


def _cases(
    args: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[Case, Callable[[], Inputs]]]:
    """Each case with what makes its inputs."""
    if sum(map(bool, (args.shape, args.full, args.sweep, args.clip))) > 1:
        raise BadInput("take one of --shape, --full, --sweep and --clip")
    if args.weights and not args.clip:
        raise BadInput("--weights is for --clip")
    if args.heads and args.dim:
        heads = [(args.heads, args.dim)]
    elif args.heads or args.dim:
        given = args.heads or args.dim
        if 512 % given:
            raise BadInput(f"512 is not divisible by {given}: give both --heads and --dim")
        heads = [(args.heads or 512 // given, args.dim or 512 // given)]
    else:
        heads = HEADS[:1] if args.sweep else HEADS
    for count, _ in heads:
        if count % len(args.reductions):
            raise BadInput(f"{count} heads cannot be shared by {len(args.reductions)} reductions")

    def case(shape: tuple, pair: tuple[int, int], dtype: torch.dtype, source: str) -> Case:
        return Case(shape, *pair, args.reductions, dtype, device, source)

    if not args.clip:
        shapes = SWEEP_SHAPES if args.sweep else args.shape or [shape for shape, _ in PAPER]
        problems = [(shape, pair) for shape in shapes for pair in heads]
        if not (args.shape or args.full or args.sweep or args.heads or args.dim):
            problems = PAPER
        for shape, pair in problems:
            for dtype in dtypes:
                one = case(shape, pair, dtype, "random")
                yield one, lambda one=one: Inputs.random(one, args.seed)
        return

    from . import clip

    for count, size in heads:
        if count * size != clip.CHANNELS:
            raise BadInput(
                f"--clip has {clip.CHANNELS} channels; {count} heads of {size} do not fit"
            )
    frames = clip.read_frames(args.clip, args.frames)
    for level, x in clip.vgg16_maps(frames, args.weights, args.seed).items():
        for pair in heads:
            projected = clip.project(x, pair[0], args.reductions, args.seed)
            for dtype in dtypes:
                one = case(tuple(x.shape[:4]), pair, dtype, f"{args.clip.name}, VGG16 {level}")
                yield one, lambda one=one, projected=projected: Inputs.of(one, projected)


def _stem(args: argparse.Namespace) -> str:
    if args.clip:
        return f"attention-clip-{args.clip.stem}"
    return "attention-sweep" if args.sweep else "attention"


def _describe(
    case: Case, seed: int, backend: str, rows: list[dict[str, Any]], left_out: dict[str, str]
) -> dict[str, Any]:
    return {
        "label": case.label,
        "source": case.source,
        "seed": seed,
        "shape": list(case.shape),
        "queries": case.queries,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "heads_per_group": case.group_heads,
        "reductions": [list(r) for r in case.reductions],
        "key_counts": case.key_counts,
        "dtype": dtype_name(case.dtype),
        "device": case.device.type,
        "backend": backend,
        "rows": rows,
        "left_out": left_out,
    }
