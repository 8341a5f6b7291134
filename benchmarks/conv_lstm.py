"""`python -m benchmarks conv_lstm`: conv_lstm against everything a user could write instead.

Each rival is checked against the float64 definition before it is timed.  Forward runs without
gradients; forward + backward returns the gradients of x, weights and bias; backward is the
difference of the two medians.  On a CPU, "fresh" runs give freed memory back to the system before
each call, so that every large buffer is new pages; "reused" ones let the allocator keep it.  On a
GPU everything is timed as called from Python and as one CUDA graph, by turns on copies of the
inputs that exceed the L2 cache; cuDNN picks its fastest algorithm and, by torch's default, computes
float32 in TF32, which conv_lstm does not.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vsod_ops import backends, conv_lstm
from vsod_ops.conv_lstm import op

from . import BadInput, measure
from .arguments import add_baselines, add_common, add_dtype, begin, sizes
from .measure import AS_CALLED, BACKWARD, BOTH, FORWARD, IN_GRAPH, dtype_name

IN_MEMORY = REUSED, FRESH = "reused", "fresh"
OURS, CONVOLUTIONS = "ours", "convolutions"
FIELD = ((1, 4, 4, 4, 512, 512), (1, 4, 4, 16, 512, 512), (4, 10, 64, 64, 64, 64))
FEW_CHANNELS = tuple((4, 4, 4, hidden, 512, 512) for hidden in (4, 16, 32))
MANY_CHANNELS = tuple((16, 10, channels, channels, 64, 64) for channels in (64, 128))
FIELD_ON_GPU = (
    *((shape, torch.bfloat16) for shape in FEW_CHANNELS + MANY_CHANNELS),
    *((shape, torch.float32) for shape in FEW_CHANNELS),
)
SHAPE_FORM = "BxTxCxMxHxW"

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, weight_ih, weight_hh, bias
Rival = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # -> out


def definition(x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    return conv_lstm(x, None, weight_ih, weight_hh, bias, backend="reference")[0]


def pointwise(sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = sums.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def cell_loop(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor,
    *, finish: Callable = pointwise, memory_format: torch.memory_format | None = None,
    hoist: bool = False,
) -> Tensor:  # fmt: skip
    """The usual implementation: for each step cat, one convolution, chunk, gates."""
    batch, _, _, height, width = x.shape
    hidden, padding = weight_hh.shape[1], weight_hh.shape[2] // 2
    h = c = x.new_zeros(batch, hidden, height, width)
    weight, from_x = torch.cat([weight_ih, weight_hh], 1), None
    if hoist:
        frames = F.conv2d(x.flatten(0, 1), weight_ih, bias, padding=padding)
        weight, bias, from_x = weight_hh, None, frames.unflatten(0, x.shape[:2])
    if memory_format is not None:
        weight = weight.to(memory_format=memory_format)
    out = []
    for t in range(x.shape[1]):
        read = h if hoist else torch.cat([x[:, t], h], 1)
        if memory_format is not None:
            read = read.to(memory_format=memory_format)
        sums = F.conv2d(read, weight, bias, padding=padding)
        h, c = finish(sums if from_x is None else sums + from_x[:, t], c)
        out.append(h)
    return torch.stack(out, 1)


def rivals() -> dict[str, tuple[str, Callable[[], Rival]]]:
    """name -> label and what makes the rival."""
    channels_last = {"memory_format": torch.channels_last}

    def fused(**options: Any) -> Rival:
        finish = torch.compile(pointwise, dynamic=False)
        return lambda *inputs: cell_loop(*inputs, finish=finish, **options)

    return {
        "eager": ("eager cell", lambda: cell_loop),
        "compile": ("torch.compile of the loop", lambda: torch.compile(cell_loop, dynamic=False)),
        "pointwise": ("eager convolution, compiled gates", fused),
        "pointwise-cl": (
            "eager convolution, channels-last, compiled gates", lambda: fused(**channels_last)
        ),
        "hoisted": ("input convolution hoisted, compiled gates", lambda: fused(hoist=True)),
        "hoisted-cl": (
            "input convolution hoisted, channels-last, compiled gates",
            lambda: fused(hoist=True, **channels_last)
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]  # B, T, C, M, H, W
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> str:
        b, t, c, m, h, w = self.shape
        return f"{c} -> {m}, {h}x{w}, B={b}, T={t}, {dtype_name(self.dtype)}"

    def flops(self, direction: str) -> float:
        """Of all convolutions, that of the zero state included."""
        b, t, c, m, h, w = self.shape
        forward = 2.0 * b * t * 4 * m * (c + m) * 9 * h * w
        return forward * {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]

    def inputs(self, seed: int) -> Inputs:
        b, t, c, m, h, w = self.shape
        generator = torch.Generator().manual_seed(seed)
        bound = (9 * (c + m)) ** -0.5
        shapes = ((b, t, c, h, w), (4 * m, c, 3, 3), (4 * m, m, 3, 3), (4 * m,))
        return tuple(
            (torch.randn(shape, generator=generator) * (1.0 if i == 0 else bound))
            .to(self.dtype).to(self.device).requires_grad_()
            for i, shape in enumerate(shapes)
        )  # fmt: skip


def call_of(rival: Rival, inputs: Inputs, direction: str) -> Callable[[], Sequence[Tensor]]:
    if direction == FORWARD:

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [rival(*inputs)]

        return forward
    grad = torch.ones((), dtype=inputs[0].dtype, device=inputs[0].device)

    def both() -> Sequence[Tensor]:
        out = rival(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.expand(out.shape))]

    return both


def convolution_calls(case: Case, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The convolutions of all steps alone, without and with their backward: the fastest format."""
    b, t, c, m, h, w = case.shape
    weight = torch.cat(inputs[1:3], 1).detach()
    calls = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        read = torch.randn(b, c + m, h, w, device=case.device).to(case.dtype)
        read = read.to(memory_format=memory_format).requires_grad_()
        kernel = weight.to(memory_format=memory_format).requires_grad_()

        def forward(read: Tensor = read, kernel: Tensor = kernel) -> None:
            with torch.no_grad():
                for _ in range(t):
                    F.conv2d(read, kernel, padding=1)

        def both(read: Tensor = read, kernel: Tensor = kernel) -> None:
            for _ in range(t):
                out = F.conv2d(read, kernel, padding=1)
                torch.autograd.grad(out, (read, kernel), torch.ones_like(out))

        name = str(memory_format).removeprefix("torch.")
        calls[f"{CONVOLUTIONS}, {name}", FORWARD] = forward
        calls[f"{CONVOLUTIONS}, {name}", BOTH] = both
    return calls


def errors(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """Largest error of any result, relative to the largest number in it; out comes first."""
    return max(
        ((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        for a, e in zip(results, oracle, strict=False)
    )


def run_case(
    case: Case, built: Mapping[str, tuple[str, Callable[[], Rival]]], args: argparse.Namespace,
    show: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Rows of results, and rival -> why it was left out."""
    torch.compiler.reset()
    inputs, left_out, rows = case.inputs(args.seed), {}, []
    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    size = sum(x.nbytes for x in inputs)
    copies = [inputs]
    for _ in range(measure.copies_past_cache(size, case.device) - 1):
        copies.append(tuple(x.detach().clone().requires_grad_() for x in inputs))
    functions = {}
    for name, (_, make) in built.items():
        try:
            functions[name] = make()
        except Exception as error:
            left_out[name] = measure.reason(error)
    torch.backends.cudnn.benchmark = False  # in float64 the search takes longer than the calls
    oracle = call_of(definition, wide, BOTH)()
    torch.backends.cudnn.benchmark = True
    for direction in (FORWARD, BOTH):
        calls, memory = {}, {}
        for name in list(functions):
            show(f"check {name}, {direction}")
            call = call_of(functions[name], inputs, direction)
            try:
                call()  # compiles, makes workspaces
                results, _, memory[name] = measure.call_and_peak(call, case.device)
                if (error := errors(results, oracle)) > limit(name, case):
                    raise ValueError(f"wrong: relative error {error:.1e}")
            except Exception as error:
                left_out[f"{name}, {direction}"] = measure.reason(error)
                del functions[name]
                continue
            calls[name] = [call_of(functions[name], x, direction) for x in copies]
        for (name, of), call in convolution_calls(case, inputs).items():
            if of == direction:
                calls[name] = [call]
        for way in ways_on(case.device):
            show(f"time {direction}, {way}")
            timings, failed = time_calls(calls, args.seconds, case.device, way)
            left_out |= {f"{name}, {direction}, {way}": why for name, why in failed.items()}
            for name, timing in timings.items():
                label = built[name][0] if name in built else name
                rows.append({
                    "rival": name, "label": label, "direction": direction,
                    **({"memory": way} if way in IN_MEMORY else {"memory": REUSED, "mode": way}),
                    "median_s": timing.median, "p20_s": timing.p20, "p80_s": timing.p80,
                    "repeats": timing.repeats,
                    "peak_extra_bytes": memory.get(name) if way in (REUSED, AS_CALLED) else None,
                })  # fmt: skip
    return finish_rows(case, rows), left_out


def limit(name: str, case: Case) -> float:
    """Of errors(): rivals in float32 may use TF32 on a GPU, as torch lets cuDNN by default."""
    if case.dtype.itemsize < 4:
        return 5e-2
    return 1e-2 if case.device.type == "cuda" and not name.startswith(OURS) else 1e-4


def ways_on(device: torch.device) -> tuple[str, str]:
    return (AS_CALLED, IN_GRAPH) if device.type == "cuda" else IN_MEMORY


def way_of(row: Mapping[str, Any]) -> str:
    """The one of `ways_on` in which `row` was timed."""
    return row.get("mode", row["memory"])


def time_calls(
    calls: Mapping[str, Sequence[Callable[[], object]]], seconds: float, device: torch.device,
    way: str,
) -> tuple[dict[str, measure.Timing], dict[str, str]]:  # fmt: skip
    """Timings, and rival -> why it could not be timed in that way."""
    if way != FRESH:
        works, failed = measure.works_of(calls, IN_GRAPH if way == IN_GRAPH else AS_CALLED)
        return measure.interleave(works, seconds, device), failed
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    while spent < seconds or len(next(iter(samples.values()))) < measure.MIN_REPEATS:
        for name, (call,) in calls.items():
            measure.give_memory_back()
            samples[name].append(measure.seconds_of(call, device))
            spent += samples[name][-1]
    return {name: measure.Timing.of(times) for name, times in samples.items()}, {}


def finish_rows(case: Case, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the backward (a difference of medians), rates, speed-ups and the convolution's share."""
    median = {(r["rival"], r["direction"], way_of(r)): r["median_s"] for r in rows}
    for row in list(rows):
        before = median.get((row["rival"], FORWARD, way_of(row)))
        if row["direction"] == BOTH and before is not None and row["median_s"] > before:
            rest = {"median_s": row["median_s"] - before, "p20_s": None, "p80_s": None}
            rows.append({**row, "direction": BACKWARD, **rest, "peak_extra_bytes": None})
    for row in rows:
        where = (row["direction"], way_of(row))
        same = [r for r in rows if (r["direction"], way_of(r)) == where]
        ours = next((r["median_s"] for r in same if r["rival"] == OURS), None)
        alone = min(
            (r["median_s"] for r in same if r["rival"].startswith(CONVOLUTIONS)), default=None
        )
        row["gflops_per_second"] = case.flops(row["direction"]) / row["median_s"] / 1e9
        row["convolution_share"] = None if alone is None else alone / row["median_s"]
        row["speedup_of_ours"] = None if ours is None else row["median_s"] / ours
    return rows


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--shape",
        type=sizes(SHAPE_FORM),
        action="append",
        metavar=SHAPE_FORM,
        help="may be given more than once (default: 4 -> 4 and 4 -> 16 channels at 512x512, T=4; "
        "64 -> 64 at 64x64, B=4, T=10; on a GPU, without --dtype, 4 -> 4, 16 and 32 at 512x512, "
        "B=4, T=4, in float32 and bfloat16, 64 -> 64 and 128 -> 128 at 64x64, B=16, T=10, in "
        "bfloat16)",
    )
    add_dtype(parser, "float32")
    add_baselines(parser, rivals())
    add("--backend", choices=backends.BACKENDS, help="backend of conv_lstm")
    add_common(
        parser, device=None, seconds=2.0,
        seconds_help="time for one case, direction and kind of memory (default: 2)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 130)
    device = begin(args)
    there = rivals()
    cases = cases_of(args, device)
    for case in cases:
        _, _, channels, hidden, _, _ = case.shape
        try:
            op.choose(args.backend, device.type, case.dtype, channels, hidden)
        except ValueError as error:
            raise BadInput(str(error)) from None

    def ours(recompute: bool) -> Rival:
        return lambda x, *weights: conv_lstm(
            x, None, *weights, recompute=recompute, backend=args.backend
        )[0]

    built = {
        OURS: ("conv_lstm", lambda: ours(False)),
        f"{OURS}-recompute": ("conv_lstm, recompute=True", lambda: ours(True)),
        **{name: there[name] for name in args.baselines},
    }
    document = measure.record("conv_lstm", device, vars(args))
    console.print(document["machine"]["line"], soft_wrap=True)
    document |= {"peak": {}, "cases": []}
    for case in cases:
        name = dtype_name(case.dtype)
        if name not in document["peak"]:
            document["peak"][name] = measure.peak_flops(device, case.dtype)
        with console.status(case.label) as status:
            rows, left_out = run_case(case, built, args, status.update)
        for row in rows:
            row["share_of_peak"] = (
                row["gflops_per_second"] * 1e9 / document["peak"][name]["flops_per_second"]
            )
        document["cases"].append({
            "label": case.label, "shape": list(case.shape), "dtype": name, "device": device.type,
            "rows": rows, "left_out": left_out,
        })  # fmt: skip
        console.print(_table(document["cases"][-1]))
        for who, why in left_out.items():
            console.print(f"left out: {who}: {why}")
        document["load_average"] = measure.load_average()
        flat = [{"case": c["label"], **row} for c in document["cases"] for row in c["rows"]]
        # After each case, so that what is done is there where the rest takes too long.
        paths = measure.write_results(document, flat, args.out, "conv_lstm")
    console.print("wrote " + ", ".join(path.name for path in paths))
    wrong = [who for case in document["cases"] for who in case["left_out"] if who.startswith(OURS)]
    return 1 if wrong else 0


def cases_of(args: argparse.Namespace, device: torch.device) -> list[Case]:
    if device.type == "cuda" and not args.shape and not args.dtype:
        return [Case(shape, dtype, device) for shape, dtype in FIELD_ON_GPU]
    dtypes = [measure.DTYPES[name] for name in args.dtype or ("float32",)]
    return [Case(shape, dtype, device) for dtype in dtypes for shape in args.shape or FIELD]


def _table(case: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=case["label"], title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("median", "p20 to p80", "GFLOP/s", "of peak", "conv. alone", "ours is", "memory"):
        table.add_column(name, justify="right")
    sections = dict.fromkeys((row["direction"], way_of(row)) for row in case["rows"])
    for direction, way in sections:
        table.add_section()
        name = f"{way} memory" if way in IN_MEMORY else way
        table.add_row(f"{direction}, {name}", style="bold italic")
        for row in case["rows"]:
            if (row["direction"], way_of(row)) != (direction, way):
                continue
            ends = [row["p20_s"], row["p80_s"]]
            ratio, share = row["speedup_of_ours"], row["convolution_share"]
            table.add_row(
                row["label"],
                measure.seconds_text(row["median_s"]),
                "" if None in ends else " to ".join(map(measure.seconds_text, ends)),
                f"{row['gflops_per_second']:.0f}",
                f"{row['share_of_peak']:.0%}",
                "" if share is None else f"{share:.0%}",
                "" if ratio is None or row["rival"] == OURS else f"{ratio:.2f}x",
                measure.bytes_text(row["peak_extra_bytes"]),
                style="green" if row["rival"].startswith(OURS) else None,
            )
    return table


COLUMNS = ("case", "direction", "ours", "of peak", "vs eager", "vs best rival", "memory",
           "recompute", "of eager")  # fmt: skip


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of one results document, as a Markdown table (reused memory)."""
    lines = []
    for case in document["cases"]:
        ways = dict.fromkeys(way_of(row) for row in case["rows"] if way_of(row) != FRESH)
        for direction, way in itertools.product((FORWARD, BOTH), ways):
            found = {
                row["rival"]: row for row in case["rows"]
                if (row["direction"], way_of(row)) == (direction, way)
                and not row["rival"].startswith(CONVOLUTIONS)
            }  # fmt: skip
            ours, recompute = found.pop(OURS, None), found.pop(f"{OURS}-recompute", None)
            if ours is None:
                continue
            best = min(found.values(), key=lambda row: row["median_s"], default=None)
            eager = found.get("eager")
            cells = [
                case["label"],
                direction if way == REUSED else f"{direction}, {way}",
                measure.seconds_text(ours["median_s"]),
                f"{ours['share_of_peak']:.0%}",
                f"{eager['speedup_of_ours']:.2f}x" if eager else "",
                f"{best['speedup_of_ours']:.2f}x ({best['label']})" if best else "",
                measure.bytes_text(ours["peak_extra_bytes"]),
                measure.bytes_text(recompute["peak_extra_bytes"]) if recompute else "",
                measure.bytes_text(eager["peak_extra_bytes"]) if eager else "",
            ]
            lines.append(cells)
    return measure.markdown_table(COLUMNS, lines, left=2)
