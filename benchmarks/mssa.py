"""`python -m benchmarks mssa`: where MSSA spends its time, and what the attention op saves.

Stages are laps between hooks of one forward, so that their sum is the whole: "projections" of a
level are its norms before the attention, Q, K, V and output projections and the reduction;
"feed-forward" has the other norms and the residual sums; "decoder" has the upsampling.
Multiply-adds are counted without computing (torch's FLOP counter on fake tensors), those of the
op as 2 * B * H_g * N * N_g * D for each head group.  Weights are random: times do not depend on
them.

Both backends are checked before anything is timed: in float32 on a CPU against each other, else
(bfloat16, and a GPU's TF32) ours may be off the reference in float64 by no more than twice what the
reference in the same precision is, and its rounding.
"""

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vsod_ops import ShuntedAttention, backends

from . import BadInput, measure
from .arguments import add_common, begin, positive

OP = "attention op"
CHECK_SIZE = 224  # pixels; both backends must agree there before anything is timed
TRAINING_UP_TO = 448  # pixels; at 896 one step takes minutes
WIDE = 512  # channels of the other reading of the paper: counted, not run
# What is off at most, in float32: logits by their largest, the gradient of all parameters by norm.
TOLERANCES = {"logits": 1e-4, "gradient": 1e-3}
CHECKED = {"forward": "logits", "training": "gradient"}
# N x N_g matrices of one head group that the reference holds at the same time, at least.
REFERENCE_MATRICES = {"forward": 2, "training": 4}


class Wrong(Exception):
    """The two backends do not agree."""


# ---- stages


@contextmanager
def laps(
    model: Any, mark: Callable[[], Any], between: Callable[[Any, Any], float]
) -> Iterator[dict[str, float]]:
    """Charge what lies between the marks of one forward of `model` to its stages.

    The dictionary is filled at the end: a mark of a GPU can be read once that has come by.
    """
    charged: dict[str, float] = {}
    marks: list[tuple[str | None, Any]] = []  # of None, the start, on

    def charge(stage: str | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks.append((stage, mark()))

        return hook

    handles = [
        model.register_forward_pre_hook(charge(None)),
        model.backbone.register_forward_hook(charge("backbone")),
        *(lift.register_forward_hook(charge("lift")) for lift in model.lift),
    ]
    strides = model.backbone.strides[-len(model.lift) :]
    for stride, transformer in zip(strides, model.transformers, strict=True):
        level = f"stride {stride}: "
        *blocks, norm = transformer
        for block in blocks:
            attention = block.attention
            handles += [
                attention.key_value[-1].register_forward_hook(charge(level + "projections")),
                attention.out.register_forward_pre_hook(charge(level + OP)),
                attention.out.register_forward_hook(charge(level + "projections")),
                block.register_forward_hook(charge(level + "feed-forward")),
            ]
        handles.append(norm.register_forward_hook(charge(level + "feed-forward")))
    handles.append(model.register_forward_hook(charge("decoder")))
    try:
        yield charged
    finally:
        for handle in handles:
            handle.remove()
    for (_, earlier), (stage, later) in pairwise(marks):
        if stage is not None:
            charged[stage] = charged.get(stage, 0.0) + between(earlier, later)


# ---- arithmetic


def build(args: argparse.Namespace, **options: Any) -> Any:
    from vsod_models.networks.mssa import MSSA

    torch.manual_seed(args.seed)
    narrow = None if args.width == 1 else {"width": args.width}
    return MSSA(backbone_options=narrow, **options).eval()


@dataclass
class Count:
    """Multiply-adds of a forward by stage, and elements of the op's largest score matrix."""

    macs: dict[str, int] = field(default_factory=dict)
    scores: int = 0

    @property
    def total(self) -> int:
        return sum(self.macs.values())

    @property
    def op(self) -> int:
        return sum(macs for stage, macs in self.macs.items() if stage.endswith(OP))


def count(args: argparse.Namespace, size: int, **options: Any) -> Count:
    """Of one clip of `size` x `size` pixels, without computing it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    result = Count()

    def op_flops(q: Any, keys: Any, *_: Any, **__: Any) -> int:
        flops = 0
        batch, _heads, queries, head_dim = q
        for _, heads, length, _ in keys:
            scores = batch * heads * queries * length
            result.scores = max(result.scores, scores)
            flops += 2 * 2 * scores * head_dim
        return flops

    mapping = {torch.ops.vsod_ops.shunted_attention: op_flops}
    with FakeTensorMode(), torch.no_grad():
        model, frames = build(args, **options), torch.empty(1, args.frames, 3, size, size)
        with (
            FlopCounterMode(display=False, custom_mapping=mapping) as counter,
            laps(model, counter.get_total_flops, lambda begin, end: end - begin) as flops,
        ):
            model(frames)
    result.macs = {stage: int(value) // 2 for stage, value in flops.items()}
    return result


# ---- what is measured


class Network:
    """MSSA on one random clip of (H, W) = (size, size), with either backend of the op."""

    def __init__(self, model: Any, args: argparse.Namespace, size: int):
        from vsod_models.networks.inference import for_inference, with_fused_activations

        generator = torch.Generator().manual_seed(args.seed)
        self.model, self.device = model, torch.device(args.device)
        self.precision = measure.DTYPES[args.precision]
        self.ready = for_inference(model, self.precision)  # as prediction runs it
        if self.device.type == "cpu":
            with_fused_activations(self.ready, self.precision)
        self.frames = torch.rand(1, args.frames, 3, size, size, generator=generator)
        self.frames = self.frames.to(self.device)
        self.mask = torch.zeros(1, args.frames, 1, size, size, device=self.device)
        self.mask[..., size // 4 : size // 2, size // 4 : size // 2] = 1
        self.stages: list[dict[str, float]] = []  # seconds, of each forward with our op

    def use(self, backend: str) -> None:
        for module in [*self.model.modules(), *self.ready.modules()]:
            if isinstance(module, ShuntedAttention):
                module.backend = backend

    def logits(self, model: Any) -> Tensor:
        enabled = self.precision.itemsize == 2
        with torch.autocast(self.device.type, self.precision, enabled=enabled):
            return model(self.frames)

    def forward(self, backend: str) -> Tensor:
        self.use(backend)
        with torch.inference_mode(), laps(self.ready, *measure.clock(self.device)) as stages:
            logits = self.logits(self.ready)
        if backend != "reference":
            self.stages.append(stages)
        return logits

    def training(self, backend: str) -> list[Tensor]:
        """Forward and backward of one clip: the gradients of all parameters."""
        from vsod_models.networks.losses import mssa_loss

        self.use(backend)
        self.model.train()
        mssa_loss(self.logits(self.model), self.mask).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return gradients

    def result(self, direction: str, backend: str) -> Tensor:
        """What is checked: the logits of "forward", all gradients of "training"."""
        if direction == "forward":
            return self.forward(backend).double()
        return torch.cat([g.flatten().double() for g in self.training(backend)])

    def in_float64(self) -> "Network":
        from vsod_models.networks.inference import for_inference

        wide = copy.copy(self)
        wide.model, wide.precision = copy.deepcopy(self.model).double(), torch.float64
        wide.ready = for_inference(wide.model)
        wide.frames, wide.mask = self.frames.double(), self.mask.double()
        return wide

    def check(self, backend: str, directions: Sequence[str]) -> dict[str, Any]:
        """How far `backend` is off, relative to the oracle; raises Wrong where that is too far."""
        same = self.precision == torch.float32 and self.device.type == "cpu"
        wide, tolerances, off = None if same else self.in_float64(), {}, {}
        for direction in directions:
            name = CHECKED[direction]
            ours, theirs = (self.result(direction, b) for b in (backend, "reference"))
            if wide is None:
                oracle, tolerances[name] = theirs, TOLERANCES[name]
            else:
                oracle = wide.result(direction, "reference")
                eps = torch.finfo(self.precision).eps
                tolerances[name] = 2 * (relative(name, theirs, oracle) + eps)
            off[name] = relative(name, ours, oracle)
            if not off[name] <= tolerances[name]:
                raise Wrong(
                    f"{name} are off by {off[name]:.2g} of the reference's, at most "
                    f"{tolerances[name]:.2g} will do"
                )
        named = {} if same else {"oracle": "float64"}
        return {"size": self.frames.shape[-1], "off": off, "tolerances": tolerances, **named}


def relative(name: str, actual: Tensor, oracle: Tensor) -> float:
    """Logits by their largest, gradients by norm."""
    difference = actual - oracle
    if name == "logits":
        return (difference.abs().max() / oracle.abs().max()).item()
    return (difference.norm() / oracle.norm()).item()


def run_direction(
    network: Network, direction: str, backend: str, needed: int, seconds: float
) -> list[dict[str, Any]]:
    """Time and peak memory with our op and with the reference, which may need too much memory.

    The call that measures memory is the only sample where all calls together exceed `seconds`.
    """
    device, call = network.device, getattr(network, direction)
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, measure.Work] = {}
    first: dict[str, float] = {}
    peak: int | None = None
    if device.type == "cuda":  # where the first call of a shape compiles and tunes
        call(backend)
        network.stages.clear()
    for name in (backend, "reference"):
        rows[name] = {"direction": direction, "backend": name}
        if name == "reference":
            rows[name]["needed_bytes"] = needed
            free = measure.free_memory(device)
            if needed + (peak or 0) > 0.9 * free:
                rows[name]["free_bytes"] = int(free)
                continue
        works[name] = measure.Work(partial(call, name))
        _, first[name], peak = measure.call_and_peak(works[name].run, device)
        rows[name]["peak_extra_bytes"] = peak
    if sum(first.values()) > seconds:
        timings = {name: measure.Timing.of([value]) for name, value in first.items()}
    else:
        network.stages.clear()  # those of the first call, which warms up
        timings = measure.interleave(works, seconds, device, sum(first.values()))
    for name, t in timings.items():
        rows[name] |= {"median_s": t.median, "p20_s": t.p20, "p80_s": t.p80, "repeats": t.repeats}
        rows[name]["frames_per_second"] = network.frames.shape[1] / t.median
    return list(rows.values())


def run_size(
    args: argparse.Namespace, model: Any, size: int, backend: str, directions: Sequence[str]
) -> dict[str, Any]:
    counted, wide = count(args, size), count(args, size, dim=WIDE)
    network = Network(model, args, size)
    rows = []
    for direction in directions:
        if direction == "training" and size > TRAINING_UP_TO:
            continue
        needed = REFERENCE_MATRICES[direction] * network.precision.itemsize * counted.scores
        rows += run_direction(network, direction, backend, needed, args.seconds)
        gc.collect()
    seconds = {s: statistics.median(lap[s] for lap in network.stages) for s in counted.macs}
    total = sum(seconds.values())
    return {
        "size": size,
        "tokens": [
            args.frames * (size // stride) ** 2
            for stride in model.backbone.strides[-len(model.lift) :]
        ],
        "macs": counted.total,
        "op_share": counted.op / counted.total,
        "stages": [
            {
                "stage": stage,
                "macs": macs,
                "share_of_macs": macs / counted.total,
                "median_s": seconds[stage],
                "share_of_time": seconds[stage] / total,
            }
            for stage, macs in counted.macs.items()
        ],
        "rows": rows,
        f"dim_{WIDE}": {"macs": wide.total, "op_macs": wide.op, "op_share": wide.op / wide.total},
    }


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[224, 448, 896], metavar="S",
        help="side of the frames in pixels (default: 224 448 896)")  # fmt: skip
    add("--frames", type=positive, default=5, help="T, frames of a clip (default: 5, as the paper)")
    add("--width", type=float, default=1.0, help="factor on VGG's channels (default: 1)")
    add("--precision", choices=("float32", "bfloat16"), default="float32",
        help="by autocast (default: float32)")  # fmt: skip
    add("--no-backward", action="store_true", help="inference alone")
    add_common(
        parser, seconds=15.0,
        seconds_help="time for each size and direction; at least one call each (default: 15)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    try:
        import vsod_models.networks.mssa  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[models]'") from None
    if min(args.sizes) < 16:
        raise BadInput(f"--sizes must be at least 16 pixels, got {min(args.sizes)}")
    if not 0 < args.width <= 1:
        raise BadInput(f"--width must be in (0, 1], got {args.width}")
    device, sizes = begin(args), sorted(set(args.sizes))
    directions = ["forward"] if args.no_backward else ["forward", "training"]
    dtype = measure.DTYPES[args.precision]
    backend = backends.choose("shunted_attention", None, device.type, dtype)
    if backend == "reference":
        raise BadInput("shunted_attention has no compiled backend here: nothing to compare")

    document = measure.record("mssa", device, vars(args))
    document["method"]["time"] = measure.SINGLE_CALLS[device.type]
    document |= {"backend": backend, "load_before": measure.load_average()}
    print(f"{document['machine']['line']}; shunted_attention runs on {backend}")
    model = build(args).to(device)
    checked = Network(model, args, min(CHECK_SIZE, sizes[0]))
    try:
        document["check"] = checked.check(backend, directions)
    except Wrong as error:
        print(f"WRONG, not timed: {error}")
        return 1
    document["cases"] = []
    for size in sizes:
        document["cases"].append(run_size(args, model, size, backend, directions))
        print(f"{size}: done", flush=True)
    document["load_after"] = measure.load_average()
    print(markdown(document))
    rows = [
        {"size": case["size"], **row}
        for case in document["cases"]
        for row in [*case["stages"], *case["rows"]]
    ]
    paths = measure.write_results(document, rows, args.out, "mssa")
    print("wrote " + ", ".join(path.name for path in paths))
    return 0


# ---- tables


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of one results document, as Markdown tables."""
    text, cases, options = measure.seconds_text, document["cases"], document["options"]
    narrow = "" if options["width"] == 1 else f" with {options['width']:g} of its channels"
    if options.get("precision", "float32") != "float32":
        narrow += f", {options['precision']}"
    lines = [
        f"| forward, {options['frames']} frames, VGG16-BN{narrow}: share of multiply-adds / time |"
        + "".join(f" {case['size']}x{case['size']} |" for case in cases),
        "| --- |" + " ---: |" * len(cases),
    ]
    for stages in zip(*(case["stages"] for case in cases), strict=True):
        cells = (f" {s['share_of_macs']:.1%} / {s['share_of_time']:.1%} |" for s in stages)
        lines.append(f"| {stages[0]['stage']} |" + "".join(cells))
    totals = (
        f" {case['macs'] / 1e9:.3g} GMAC / {text(sum(s['median_s'] for s in case['stages']))} |"
        for case in cases
    )
    lines += [
        "| all |" + "".join(totals),
        "",
        "| | tokens | time | reference | speed-up | memory | reference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        for ours, reference in zip(case["rows"][::2], case["rows"][1::2], strict=True):
            cells = [f"{ours['direction']}, {case['size']}x{case['size']}"]
            cells += [" + ".join(f"{n:,}" for n in case["tokens"]), text(ours["median_s"])]
            if "median_s" in reference:
                cells.append(text(reference["median_s"]))
                cells.append(f"{reference['median_s'] / ours['median_s']:.2f}x")
                theirs = measure.bytes_text(reference["peak_extra_bytes"])
            else:
                cells += ["does not fit", ""]
                theirs = (
                    f"at least {measure.bytes_text(reference['needed_bytes'])} "
                    f"({measure.bytes_text(reference['free_bytes'])} free)"
                )
            cells += [measure.bytes_text(ours["peak_extra_bytes"]), theirs]
            lines.append("| " + " | ".join(cells) + " |")
    wide = ", ".join(
        f"{case[f'dim_{WIDE}']['op_share']:.1%} of {case[f'dim_{WIDE}']['macs'] / 1e9:.3g} GMAC "
        f"at {case['size']}"
        for case in cases
    )
    shares = ", ".join(f"{case['op_share']:.1%} at {case['size']}" for case in cases)
    check = document["check"]
    off = ", ".join(f"{name} by {value:.1g}" for name, value in check["off"].items())
    if "oracle" in check:
        allowed = ", ".join(f"{value:.1g}" for value in check["tolerances"].values())
        off = f"ours is off the reference in {check['oracle']}: {off} (at most {allowed})"
    else:
        off = f"the two differ relative to the reference: {off}"
    speeds = ", ".join(
        f"{row['frames_per_second']:,.0f} in {row['direction']} at {case['size']}"
        for case in cases
        for row in case["rows"][::2]
        if "frames_per_second" in row
    )
    single = [
        f"{row['direction']} at {case['size']}"
        for case in cases
        for row in case["rows"][::2]
        if row["repeats"] == 1
    ]
    note = (
        'The reference is the same network with materialised scores (`backend="reference"`). '
        f"The op's share of the multiply-adds: {shares}; with {WIDE} channels (counted, not run): "
        f"{wide}. Before timing, at {check['size']} pixels, {off}."
    )
    if speeds:
        note += f" Frames a second: {speeds}."
    if single:
        note += f" One call each, without warm-up: {', '.join(single)}."
    return "\n".join([*lines, "", note])
