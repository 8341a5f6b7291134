"""`python -m benchmarks export`: what `vsod export` writes, against the model in PyTorch.

One window in float32, three ways: the model as `vsod predict --precision float32` runs it on a CPU,
its ONNX file in onnxruntime, and its package of AOTInductor.  All but the shipped models have
random weights: times do not depend on them.
"""

import argparse
import gc
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import BadInput, measure
from .arguments import add_out, begin, duration, positive

WAYS = ("PyTorch", "onnxruntime", "package")
WRITERS = {"onnxruntime": ("onnx", "export_onnx"), "package": ("pt2", "export_package")}
TOLERANCE = 1e-3  # of the largest logit


def models() -> dict[str, Callable[[], Any]]:
    """What is measured: how a table calls it, and the model."""
    from vsod_models import zoo
    from vsod_models.networks.mssa import MSSA
    from vsod_models.networks.msst import MSST

    mobile = dict(backbone="mobilenet_v2", image_size=(320, 320))
    return {
        "vsod-mobile": partial(zoo.load_model, "vsod-mobile"),
        "mssa-tiny": partial(zoo.load_model, "mssa-tiny"),
        "MSSA, VGG16, depth 1": partial(MSSA, "vgg16_bn", depth=1),
        **{f"MSST {c}, MobileNetV2": partial(MSST, c, **mobile) for c in ("os", "st", "full")},
        "MSST os, VGG16": partial(MSST, "os", image_size=(321, 321)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--match", nargs="+", default=[""], help="only models with one of these in their names")
    add(
        "--files",
        type=Path,
        default=Path("benchmarks/out/exported"),
        help="folder of exported files; those that are there are not written again (default: "
        "benchmarks/out/exported)",
    )
    add("--write", action="store_true", help="write the files and measure nothing")
    add("--seconds", type=duration, default=1.5, help="for each model (default: 1.5)")
    add("--threads", type=positive, help="CPU threads (default: those of torch)")
    add("--seed", type=int, default=0)
    add_out(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import onnxruntime

        from vsod_models import export
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[models,onnx]'") from None
    args.device = "cpu"
    device = begin(args)
    chosen = {n: build for n, build in models().items() if any(part in n for part in args.match)}
    if not chosen:
        parts = " or ".join(map(repr, args.match))
        raise BadInput(f"no model has {parts} in its name; there are {', '.join(models())}")
    if not export.CAN_CHECK:
        raise BadInput("vsod_ops._cpu is not built: pip install -e . with a C++ compiler")
    args.files.mkdir(parents=True, exist_ok=True)
    document = measure.record("export", device, vars(args))
    document["machine"]["versions"]["onnxruntime"] = onnxruntime.__version__
    document["load_before"] = measure.load_average()
    document["cases"] = []
    for name, build in chosen.items():
        torch.manual_seed(args.seed)
        model = build().eval()
        files = {way: written(model, name, way, args) for way in WRITERS}
        if not args.write:
            document["cases"].append(case(model, name, files, args.seconds, device))
    document["load_after"] = measure.load_average()
    if args.write:
        return 0
    print(document["machine"]["line"], markdown(document), sep="\n\n")
    paths = measure.write_results(document, rows_of(document), args.out, "export")
    print("wrote " + ", ".join(path.name for path in paths))
    return 0


def written(model: Any, name: str, way: str, args: argparse.Namespace) -> tuple[Path, float]:
    """A file of `vsod export`, and the CPU time that it took, compilers and all."""
    from vsod_models import export

    suffix, function = WRITERS[way]
    file = args.files / f"{name.replace(' ', '-').replace(',', '')}-{args.seed}.{suffix}"
    beside = file.with_name(f"{file.name}.json")
    if not (file.exists() and beside.exists()):
        before = sum(os.times()[:4])
        getattr(export, function)(model, file, name=name, overwrite=True)
        beside.write_text(json.dumps({"cpu_s": sum(os.times()[:4]) - before}))
    return file, json.loads(beside.read_text())["cpu_s"]


@torch.inference_mode()
def case(
    model: Any,
    name: str,
    files: Mapping[str, tuple[Path, float]],
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    import onnxruntime

    from vsod_models.export import example_inputs
    from vsod_models.networks.inference import for_inference, with_fused_activations

    inputs = example_inputs(model, 1, model.clip_length, model.image_size)
    made = for_inference(model)
    with_fused_activations(made, torch.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(files["onnxruntime"][0]), options)
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    package = torch._inductor.aoti_load_package(str(files["package"][0]))
    calls: dict[str, Callable[[], Any]] = {
        "PyTorch": lambda: made.decode(made.encode(*inputs), model.image_size),
        "onnxruntime": lambda: torch.from_numpy(session.run(None, feed)[0]),
        "package": lambda: package(*inputs),
    }
    logits = {way: call() for way, call in calls.items()}
    largest = logits["PyTorch"].abs().max().item()
    off = {w: (logits[w] - logits["PyTorch"]).abs().max().item() for w in WRITERS}
    if max(off.values()) > TOLERANCE * max(1.0, largest):
        raise BadInput(f"{name}: differs by {off} of {largest}")
    gc.collect()
    works = {way: measure.Work(call) for way, call in calls.items()}
    timings = measure.interleave(works, seconds, device)
    return {
        "model": name,
        "window": list(inputs[0].shape[1:]),
        "largest_logit": largest,
        "rows": [
            {"way": way, **vars(timing)}
            | (
                {"off": off[way], "bytes": files[way][0].stat().st_size, "cpu_s": files[way][1]}
                if way in files
                else {}
            )
            for way, timing in timings.items()
        ],
    }


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"model": c["model"], **row} for c in document["cases"] for row in c["rows"]]


def markdown(document: Mapping[str, Any]) -> str:
    lines = []
    for one in document["cases"]:
        rows = {row["way"]: row for row in one["rows"]}
        length, _, height, width = one["window"]
        off = " / ".join(f"{rows[way]['off']:.1e}" for way in WRITERS)
        lines.append([
            one["model"],
            f"{length} x {height} x {width}",
            *(measure.seconds_text(rows[way]["median"]) for way in WAYS),
            f"{off} ({one['largest_logit']:.1f})",
            *(measure.bytes_text(rows[way]["bytes"]) for way in WRITERS),
            " / ".join(measure.seconds_text(rows[way]["cpu_s"]) for way in WRITERS),
        ])  # fmt: skip
    columns = ["model", "window", *WAYS, "differ by (of)", "ONNX", "package", "CPU time of export"]
    return measure.markdown_table(columns, lines, 2)
