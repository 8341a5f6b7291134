"""`python -m benchmarks dense_crf`: dense_crf against pydensecrf, frame by frame and as a batch.

Both get the same probabilities and frames; pydensecrf takes numpy arrays, one frame at a time, and
its unary and the result's copy to an array are timed with it.  Its result is the check of ours.
On a GPU, where pydensecrf is not installed, dense_crf on the CPU of that machine takes its place.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsod_ops import backends, dense_crf
from vsod_ops.dense_crf import PRESETS

from . import BadInput, measure
from .arguments import add_common, begin, sizes
from .plots import Panel
from .plots import plot as draw

OURS, RIVAL, ON_CPU = "dense_crf", "pydensecrf", "dense_crf on the CPU"
SIZES = [(321, 321), (512, 512), (854, 480), (1920, 1080)]  # width, height
BATCHES = [1, 4]
MEAN_DIFFERENCE, SAME_SIDE = 1e-3, 0.999  # what ours must keep to
Inputs = tuple[Tensor, Tensor]  # prob (B, H, W) float32, image (B, 3, H, W) uint8


# ---- inputs


def synthetic(batch: int, width: int, height: int, seed: int) -> Inputs:
    """Shaded, grainy scenes with a few objects, and blurred, noisy maps of them."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    images, probs = [], []
    for _ in range(batch):
        image = torch.stack([90 + 50 * y, 110 + 40 * x * y, 80 - 60 * y + 20 * torch.sin(9 * x)])
        logit = torch.full_like(x, -4.0)
        for _ in range(3):
            cx, cy, a, b = (torch.rand(4, generator=generator) * 1.2 - 0.6).tolist()
            radius = ((x - cx) / (0.2 + abs(a))) ** 2 + ((y - cy) / (0.2 + abs(b))) ** 2
            colour = 255 * torch.rand(3, 1, 1, generator=generator)
            image = torch.where(radius < 1, colour + 30 * x, image)
            logit = torch.maximum(logit, 4 - 4 * radius)
        image = image + 5 * torch.randn(image.shape, generator=generator)
        images.append(image.round().clamp(0, 255).to(torch.uint8))
        probs.append((logit + torch.randn(logit.shape, generator=generator)).sigmoid())
    return torch.stack(probs), torch.stack(images)


def noise(batch: int, width: int, height: int, seed: int) -> Inputs:
    """Uniform noise: every pixel has vertices of its own, the worst case of a lattice."""
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(batch, height, width, generator=generator)
    image = torch.randint(256, (batch, 3, height, width), generator=generator)
    return prob, image.to(torch.uint8)


def real(root: Path) -> Callable[[int, int, int, int], Inputs]:
    """Saliency maps of a published method with their frames, resized: a sequence a frame."""
    maps_folder, frames = root / "mtnet-davis16-maps", root / "davis16-270p/JPEGImages/480p"
    sequences = sorted(p for p in maps_folder.glob("*") if (frames / p.name).is_dir())
    if not sequences:
        raise BadInput(f"{root.name} has no mtnet-davis16-maps with frames in davis16-270p")
    import numpy
    from PIL import Image

    def make(batch: int, width: int, height: int, seed: int) -> Inputs:
        probs, images = [], []
        for i in range(batch):
            maps = sorted(sequences[(seed + i) % len(sequences)].glob("*.png"))
            path = maps[len(maps) // 2]
            frame = Image.open(frames / path.parent.name / f"{path.stem}.jpg").convert("RGB")
            saliency = Image.open(path).convert("L")
            size, how = (width, height), Image.Resampling.BILINEAR
            images.append(numpy.array(frame.resize(size, how)).transpose(2, 0, 1))
            probs.append(numpy.array(saliency.resize(size, how)).astype("float32") / 255)
        return torch.from_numpy(numpy.stack(probs)), torch.from_numpy(numpy.stack(images))

    return make


# ---- the rivals


def pydensecrf(prob: Tensor, image: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    """What a user of pydensecrf writes, for probabilities of the foreground or of classes."""
    import numpy
    from pydensecrf import densecrf
    from pydensecrf.utils import unary_from_softmax

    height, width = image.shape[2:]
    out = torch.empty(prob.shape)
    for i, (p, frame) in enumerate(zip(prob.numpy(), image, strict=True)):
        classes = p if p.ndim == 3 else numpy.stack([1 - p, p])
        crf = densecrf.DenseCRF2D(width, height, len(classes))
        crf.setUnaryEnergy(unary_from_softmax(classes))
        crf.addPairwiseGaussian(sxy=numbers["gaussian_sxy"], compat=numbers["gaussian_weight"])
        crf.addPairwiseBilateral(
            sxy=numbers["bilateral_sxy"],
            srgb=numbers["bilateral_srgb"],
            rgbim=frame.permute(1, 2, 0).contiguous().numpy(),
            compat=numbers["bilateral_weight"],
        )
        marginals = numpy.array(crf.inference(numbers["iterations"]))
        out[i] = torch.from_numpy(marginals if p.ndim == 3 else marginals[1]).view(p.shape)
    return out


def on_cpu(prob: Tensor, image: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    return dense_crf(prob, image, **numbers)


RIVALS = {RIVAL: pydensecrf, ON_CPU: on_cpu}


def find_rival(device: torch.device) -> str:
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        if device.type == "cpu":
            raise BadInput("pydensecrf is missing: pip install pydensecrf2") from None
        return ON_CPU
    return RIVAL


# ---- measuring


def _measure(
    inputs: Inputs, rival: str, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One case: the differences of the two results, and a row of times and memory of each."""
    prob, image = inputs
    count = measure.copies_past_cache(prob.nbytes + image.nbytes, device)
    copies = [(prob.to(device, copy=True), image.to(device, copy=True)) for _ in range(count)]

    def ours(copy: Inputs = copies[0]) -> Tensor:
        return dense_crf(*copy, preset=args.preset, backend=args.backend)

    def theirs() -> Tensor:
        return RIVALS[rival](prob, image, PRESETS[args.preset])

    cpu = torch.device("cpu")
    ours()  # loads libraries
    actual, our_seconds, our_peak = measure.call_and_peak(ours, device)
    expected, seconds, peak = measure.call_and_peak(theirs, cpu)
    actual = actual.cpu()
    difference = (actual - expected).abs().mean().item()
    same = ((actual > 0.5) == (expected > 0.5)).float().mean().item()
    found = {"mean_difference": difference, "same_side": same, "rows": []}
    if not (difference <= MEAN_DIFFERENCE and same >= SAME_SIDE):
        return found
    if device.type == "cpu":
        works = {OURS: measure.Work(ours), rival: measure.Work(theirs)}
        timings = measure.interleave(works, args.seconds, cpu, our_seconds + seconds)
    else:
        work = measure.one_after_another([partial(ours, copy) for copy in copies])
        timings = measure.interleave({OURS: work}, args.seconds, device)
        timings |= measure.interleave({rival: measure.Work(theirs)}, args.seconds, cpu, seconds)
    base = timings[OURS].median
    for name, extra in ((OURS, our_peak), (rival, peak)):
        timing = timings[name]
        found["rows"].append(
            {
                "rival": name,
                "median_s": timing.median,
                "p20_s": timing.p20,
                "p80_s": timing.p80,
                "repeats": timing.repeats,
                "peak_extra_bytes": extra,
                "speedup_of_ours": timing.median / base,
            }
        )
    return found


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--size",
        type=sizes("WxH"),
        action="append",
        metavar="WxH",
        help="may be given more than once (default: 321x321, 512x512, 854x480, 1920x1080)",
    )
    add(
        "--batch",
        type=int,
        action="append",
        choices=range(1, 65),
        metavar="B",
        help="frames in one call; may be given more than once (default: 1 and 4)",
    )
    add(
        "--images",
        choices=("synthetic", "noise", "real"),
        default="synthetic",
        help="real: saliency maps and frames from the folder that VSOD_DATA names",
    )
    add("--preset", choices=list(PRESETS), default="dss")
    add("--backend", choices=backends.BACKENDS, help="backend of dense_crf")
    add_common(parser, seconds=5.0, seconds_help="time for one case (default: 5)")


def _maker(images: str) -> Callable[[int, int, int, int], Inputs]:
    if images != "real":
        return {"synthetic": synthetic, "noise": noise}[images]
    if not (root := os.environ.get("VSOD_DATA")):
        raise BadInput("--images real needs VSOD_DATA, the folder with the data sets")
    return real(Path(root))


def run(args: argparse.Namespace) -> int:
    device = begin(args)
    rival = find_rival(device)
    try:
        chosen = backends.choose("dense_crf", args.backend, device.type, torch.float32)
    except ValueError as error:
        raise BadInput(str(error)) from None
    make = _maker(args.images)
    document = measure.record("dense_crf", device, vars(args))
    document["backend"] = chosen
    document["load_before"] = measure.load_average()
    print(f"{document['machine']['line']}; dense_crf runs on {chosen}; the rival is {rival}")
    document["cases"], failures = [], 0
    for batch, (width, height) in _cases(args):
        case = {"images": args.images, "batch": batch, "width": width, "height": height}
        case |= _measure(make(batch, width, height, args.seed), rival, args, device)
        document["cases"].append(case)
        if case["rows"]:
            print(" ".join(_line(case)), flush=True)
        else:
            failures += 1
            print(
                f"{_label(case)}: WRONG, mean difference {case['mean_difference']:.1e}, "
                f"{case['same_side']:.3%} on the same side of 0.5: not timed"
            )
    document["load_after"] = measure.load_average()
    stem = "dense_crf" if args.images == "synthetic" else f"dense_crf-{args.images}"
    facts = ("images", "batch", "width", "height", "mean_difference", "same_side")
    rows = [{k: c[k] for k in facts} | row for c in document["cases"] for row in c["rows"]]
    paths = measure.write_results(document, rows, args.out, stem)
    paths += plot(document, args.out, stem)
    print("wrote " + ", ".join(path.name for path in paths))
    return 1 if failures else 0


def _cases(args: argparse.Namespace) -> Iterator[tuple[int, tuple[int, int]]]:
    for size in args.size or SIZES:
        for batch in args.batch or BATCHES:
            yield batch, size


# ---- tables and plots


def _columns(rival: str) -> list[str]:
    return ["frames", OURS, rival, "speed-up", "peak memory", f"of {rival}", "mean difference"]


def _label(case: Mapping[str, Any]) -> str:
    return f"{case['batch']} x {case['width']}x{case['height']}"


def _line(case: Mapping[str, Any]) -> list[str]:
    ours, theirs = case["rows"]
    return [
        _label(case),
        measure.seconds_text(ours["median_s"]),
        measure.seconds_text(theirs["median_s"]),
        f"{theirs['speedup_of_ours']:.1f}x",
        measure.bytes_text(ours["peak_extra_bytes"]),
        measure.bytes_text(theirs["peak_extra_bytes"]),
        f"{case['mean_difference']:.0e}",
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of one results document, as a Markdown table."""
    timed = [case for case in document["cases"] if case["rows"]]
    columns = _columns(timed[0]["rows"][1]["rival"] if timed else RIVAL)
    table = measure.markdown_table(columns, [_line(case) for case in timed], left=1)
    options = document["options"]
    note = f"Images: {options['images']}; preset {options['preset']}; times are of one call."
    return f"{table}\n\n{note}"


def plot(document: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Time and memory of both, as bars."""
    line = document["machine"]["line"]
    paths = []
    for field, factor, name, y_label in (
        ("median_s", 1e3, "time", "ms, lower is better"),
        ("peak_extra_bytes", 1e-6, "memory", "peak extra memory, MB"),
    ):
        series: dict[str, list[tuple[Any, float]]] = {}
        for case in document["cases"]:
            for row in case["rows"]:
                if row[field] is not None:
                    series.setdefault(row["rival"], []).append((_label(case), row[field] * factor))
        panel = Panel(document["options"]["images"], series)
        paths += draw(
            [panel] if series else [], folder / f"{stem}-{name}", kind="bars", title=line,
            x_label="", y_label=y_label, columns=1,
        )  # fmt: skip
    return paths
