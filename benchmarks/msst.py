"""`python -m benchmarks msst`: MSST-ConvLSTM from decoded frames to a refined mask, by stage.

One window is T = 4 frames and gives the mask of the last.  Stages run one after another on the
results of those before them; "window by window" runs all of them.  A video is measured per frame
in three ways: each window anew, the same with the priors of the frames before kept, and streaming,
which carries the branch maps of the frames before.
Weights are random: times do not depend on them.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vsod_ops import backends, dense_crf
from vsod_ops.conv_lstm import op as conv_lstm_op

from . import BadInput, measure
from .arguments import add_common, begin, sizes

STAGES = ("flow", "prior", "spatial", "temporal", "ConvLSTM", "fusion", "CRF")
WAYS = ("window by window", "window by window, priors kept", "streaming")
NETWORK = "network alone, "
NETWORK_AND_CRF = "networks, ConvLSTM, fusion and CRF, in one run"
PAPER = {"machine": "TITAN X, 2018", "network_s": 2.1, "crf_s": 0.8, "window_s": 2.9}


# ---- what is measured


class Pipeline:
    """MSST with its motion prior and the CRF, in the stages of the paper.

    Args:
        frames: (T + 1, H, W, 3) uint8: a window, and the frame after it, for its last flow.
    """

    def __init__(self, args: argparse.Namespace, frames: Any, device: torch.device):
        from vsod_models.networks.msst import MSST
        from vsod_models.prior.flow import FlowMagnitude
        from vsod_models.prior.regions import MotionPrior

        torch.manual_seed(args.seed)
        self.model = MSST(
            backbone=args.backbone,
            width=args.width,
            full_resolution=args.full_resolution,
            backend=args.backend,
        )
        self.model.to(device).eval()
        self.source: Any = FlowMagnitude()
        if args.prior == "regions":
            options = {"width": args.width} if args.backbone.startswith("vgg") else None
            self.source = MotionPrior(args.backbone, options).to(device).eval()
        self.device, self.pictures = device, frames
        self.precision = measure.DTYPES[args.precision]
        self.frames = torch.from_numpy(frames[:-1]).movedim(-1, 1)  # (T, 3, H, W) uint8
        self.size = tuple(self.frames.shape[-2:])

    def narrow(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)`, of the networks, the ConvLSTM or the fusion, in their precision."""
        enabled = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=enabled):
            return call(*arguments)

    def flow(self, count: int | None = None) -> list[Any]:
        """Of the last `count` frames of the window, to their next ones."""
        from vsod_models.prior.flow import optical_flow

        pairs = list(zip(self.pictures, self.pictures[1:], strict=False))
        return [optical_flow(a, b, self.source.side) for a, b in pairs[-(count or len(pairs)) :]]

    def prior(self, flows: list[Any]) -> Tensor:
        """(1, T, 1, H, W) in [0, 1]."""
        small = torch.stack([torch.from_numpy(self.source.from_flow(flow)) for flow in flows])
        prior = torch.nn.functional.interpolate(small[:, None], self.size, mode="bilinear")
        return prior.clamp(0, 1)[None].to(self.device)

    def images(self, count: int) -> Tensor:
        """The last `count` frames as the model takes them, (1, count, 3, H, W)."""
        return self.frames[-count:].to(self.device)[None].float() / 255

    def spatial(self, images: Tensor) -> Tensor:
        x = (images[0] - self.model.mean) / self.model.std
        return self.model.spatial(x)[None]

    def temporal(self, images: Tensor, prior: Tensor) -> Tensor:
        x = (images[0] - self.model.mean) / self.model.std
        return self.model.temporal(torch.cat([x, 4 * prior[0] - 2], 1))[None]

    def refined(self, logits: Tensor) -> Tensor:
        image = self.frames[-1:].to(self.device)
        return dense_crf(logits.float().sigmoid()[:, 0], image)

    @torch.inference_mode()  # its memory is measured in a thread of its own
    def window(self, flows: int | None = None, prior: Tensor | None = None) -> Tensor:
        """From decoded frames to a refined mask.

        With `flows` = 1 it makes the prior of its new frame alone: those of the others, `prior`,
        are kept.
        """
        new = self.prior(self.flow(flows))
        prior = new if prior is None else torch.cat([prior[:, flows:], new], 1)
        return self.network_and_crf(prior)

    def network_and_crf(self, prior: Tensor) -> Tensor:
        return self.refined(self.narrow(self.model, self.images(len(self.frames)), prior))

    def streamed(self, carried: list[Tensor]) -> Tensor:
        """The same mask from the maps of the frames before and the one new frame."""
        return self.refined(self.network_streamed(self.prior(self.flow(1)), carried))

    def network_streamed(self, prior: Tensor, carried: list[Tensor]) -> Tensor:
        return self.narrow(self._network_streamed, prior, carried)

    def _network_streamed(self, prior: Tensor, carried: list[Tensor]) -> Tensor:
        maps = self.model.encode(self.images(1), prior)
        maps = [torch.cat([c[:, 1:], m], 1) for c, m in zip(carried, maps, strict=True)]
        return self.model.decode(maps, self.size)


def calls(pipeline: Pipeline) -> dict[str, Callable[[], object]]:
    """What is timed, by name; raises AssertionError where two ways give two masks."""
    model, narrow, size = pipeline.model, pipeline.narrow, pipeline.size
    count, flows = len(pipeline.frames), pipeline.flow()
    images, prior = pipeline.images(count), pipeline.prior(flows)
    maps = [narrow(pipeline.spatial, images), narrow(pipeline.temporal, images, prior)]
    o_last = narrow(model.recur, maps, size)
    logits = narrow(model.fuse, maps, o_last, size)
    mask = pipeline.refined(logits)
    carried = [torch.cat([m[:, :1], m[:, :-1]], 1) for m in maps]  # as after the frame before
    exact = pipeline.device.type == "cpu" and pipeline.precision == torch.float32
    off = (1e-4 if exact else 2e-2) * logits.abs().max().item()  # bfloat16, or TF32 by default
    for anew in (narrow(model, images, prior), pipeline.network_streamed(prior[:, -1:], carried)):
        torch.testing.assert_close(anew, logits, atol=off, rtol=0)
    torch.testing.assert_close(pipeline.window(), mask, atol=1e-3, rtol=0)
    torch.testing.assert_close(pipeline.streamed(carried), mask, atol=1e-3, rtol=0)
    return {
        "flow": pipeline.flow,
        "prior": partial(pipeline.prior, flows),
        "spatial": lambda: narrow(pipeline.spatial, pipeline.images(count)),
        "temporal": partial(narrow, pipeline.temporal, images, prior),
        "ConvLSTM": partial(narrow, model.recur, maps, size),
        "fusion": partial(narrow, model.fuse, maps, o_last, size),
        "CRF": partial(pipeline.refined, logits),
        WAYS[0]: pipeline.window,
        WAYS[1]: partial(pipeline.window, 1, prior),
        WAYS[2]: partial(pipeline.streamed, carried),
        NETWORK + WAYS[0]: partial(narrow, model, images, prior),
        NETWORK + WAYS[2]: partial(pipeline.network_streamed, prior[:, -1:], carried),
        NETWORK_AND_CRF: partial(pipeline.network_and_crf, prior),
    }


# ---- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=sizes("WxH"), default=(512, 512), metavar="WxH", help="default: 512x512")
    add("--frames", type=int, default=4, help="T, frames of a window (default: 4, as the paper)")
    add("--backbone", choices=("vgg16", "vgg16_bn", "mobilenet_v2"), default="vgg16")
    add("--width", type=float, default=1.0, help="factor on VGG's channels (default: 1)")
    add("--prior", choices=("regions", "flow-magnitude"), default="regions",
        help="regions: the paper's; flow-magnitude: the cheap substitute")  # fmt: skip
    add("--precision", choices=("float32", "bfloat16"), default="float32",
        help="of the networks, the ConvLSTM and the fusion (default: float32)")  # fmt: skip
    add("--full-resolution", action="store_true", help="ConvLSTM at the size of the frames")
    add("--backend", choices=backends.BACKENDS, help="backend of conv_lstm")
    add_common(parser, seconds=60.0, seconds_help="time for all (default: 60)")


def run(args: argparse.Namespace) -> int:
    try:
        import cv2

        from vsod_models.data.synthetic import synthetic_clip
        from vsod_models.errors import InputError
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[models]'") from None
    if args.frames < 2:
        raise BadInput(f"--frames must be at least 2, got {args.frames}")
    if not 0 < args.width <= 1 or (args.width != 1 and not args.backbone.startswith("vgg")):
        raise BadInput(f"--width must be in (0, 1], and is for VGG; got {args.width}")
    device, (width, height) = begin(args), args.size
    cv2.setNumThreads(torch.get_num_threads())
    try:
        # MSST's ConvLSTM goes from 4 maps to 32 channels.
        chosen = conv_lstm_op.choose(
            args.backend, device.type, measure.DTYPES[args.precision], 4, 32
        )
        frames, _ = synthetic_clip(
            args.seed, 0, args.frames + 1, (height, width), split="val", photos=False
        )
    except (ValueError, InputError) as error:
        raise BadInput(str(error)) from None

    document = measure.record("msst", device, vars(args))
    document["method"]["time"] = measure.SINGLE_CALLS[device.type]
    document |= {"backend": chosen, "paper": PAPER, "load_before": measure.load_average()}
    print(f"{document['machine']['line']}; conv_lstm runs on {chosen}")
    with torch.inference_mode():
        pipeline = Pipeline(args, frames, device)
        try:
            works = {name: measure.Work(call) for name, call in calls(pipeline).items()}
        except AssertionError as error:
            print(f"WRONG, not timed: {measure.reason(error)}")
            return 1
        timings = measure.interleave(works, args.seconds, device)
        _, _, peak = measure.call_and_peak(pipeline.window, device)
    rows = [
        {"what": name, "median_s": t.median, "p20_s": t.p20, "p80_s": t.p80, "repeats": t.repeats}
        for name, t in timings.items()
    ]
    document["cases"] = [
        {
            "frames": args.frames,
            "width": width,
            "height": height,
            "rows": rows,
            "peak_extra_bytes": peak,
            **summary({name: t.median for name, t in timings.items()}),
        }
    ]
    document["load_after"] = measure.load_average()
    print(markdown(document))
    paths = measure.write_results(document, rows, args.out, "msst")
    print("wrote " + ", ".join(path.name for path in paths))
    return 0


def summary(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Share of two stages, and how many times as fast as each other way streaming is."""
    total = sum(seconds[name] for name in STAGES)
    streaming = {name: seconds[name] / seconds[WAYS[2]] for name in WAYS[:2]}
    network = seconds[NETWORK + WAYS[0]] / seconds[NETWORK + WAYS[2]]
    return {
        "conv_lstm_and_crf_share": (seconds["ConvLSTM"] + seconds["CRF"]) / total,
        "streaming_speedup": {**streaming, NETWORK + WAYS[0]: network},
    }


# ---- tables


def markdown(document: Mapping[str, Any]) -> str:
    """The summary of one results document, as Markdown tables."""
    text, options = measure.seconds_text, document["options"]
    (case,) = document["cases"]
    seconds = {row["what"]: row["median_s"] for row in case["rows"]}
    total = sum(seconds[name] for name in STAGES)
    network = sum(seconds[name] for name in STAGES[2:6])
    paper = document["paper"]
    lines = [
        f"| stage, {case['frames']} frames of {case['width']}x{case['height']} | time | share |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {s} | {text(seconds[s])} | {seconds[s] / total:.1%} |" for s in STAGES]
    lines += [
        f"| all, in one run | {text(seconds[WAYS[0]])} | |",
        f"| networks, ConvLSTM and fusion | {text(network)} | |",
        f"| {NETWORK_AND_CRF} | {text(seconds[NETWORK_AND_CRF])} | |",
        f"| the paper: networks | {text(paper['network_s'])} ({paper['machine']}) | |",
        f"| the paper: CRF | {text(paper['crf_s'])} | |",
        f"| the paper: all | {text(paper['window_s'])} | |",
        "",
        "| a frame of a video | time | streaming | speed-up |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, speedup in case["streaming_speedup"].items():
        streaming = (NETWORK if name.startswith(NETWORK) else "") + WAYS[2]
        lines.append(
            f"| {name} | {text(seconds[name])} | {text(seconds[streaming])} | {speedup:.1f}x |"
        )
    resolution = "the frames'" if options["full_resolution"] else "branch"
    note = (
        f"Backbone {options['backbone']}, {options['precision']}, prior {options['prior']}, "
        f"ConvLSTM at {resolution} resolution; ConvLSTM and CRF together "
        f"{case['conv_lstm_and_crf_share']:.1%}. Peak memory of a window, beside frames "
        f"and weights: {measure.bytes_text(case['peak_extra_bytes'])}."
    )
    return "\n".join([*lines, "", note])
