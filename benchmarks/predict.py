"""`python -m benchmarks predict`: frames a second of `vsod predict`, and where a frame's time goes.

The whole command is timed by the wall clock, in a process of its own, start-up included: a video
to an overlay, and a picture to a mask (the start alone, to the first frame out).  Each stage is
then run by itself in one thread, and its CPU time divided by the frames: the sum over the cores is
the least that the command can take, if all of it runs side by side.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from . import BadInput, measure
from .arguments import add_common, begin, positive

FRAMES, SIZE = 289, (1280, 720)  # of the clip that is made where none is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--video", type=Path, help="default: 289 frames of 1280x720 made by `vsod example`")
    add("--model", default="vsod-mobile")
    add("--overlap", type=int, help="frames that windows share (default: the command's)")
    add("--runs", type=positive, default=3, help="of the command (default: 3)")
    add("--frames", type=positive, default=90, help="for the stages (default: 90)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    try:
        from vsod_models import prediction  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[models]'") from None
    device = begin(args)
    document = measure.record("predict", device, vars(args))
    document["load_before"] = measure.load_average()
    print(document["machine"]["line"])
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or example(Path(folder) / "clip.mp4")
        document["video"] = args.video.name if args.video else "of vsod example, enlarged"
        document["command"] = commands(args, video, Path(folder))
        document["stages"] = stages(args, video, Path(folder))
    document["load_after"] = measure.load_average()
    print(markdown(document))
    rows = [{"stage": name, "cpu_seconds": s} for name, s in document["stages"]["each"].items()]
    paths = measure.write_results(document, rows, args.out, "predict")
    print("wrote " + ", ".join(path.name for path in paths))
    return 0


def example(path: Path, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> Path:
    """The clip of `vsod example`, of so many frames and enlarged to `size`, (width, height)."""
    import cv2

    from vsod_models.media.example import RATE, Example
    from vsod_models.media.writing import open_writer

    clip = Example(seconds=frames / RATE)
    with open_writer(path, clip) as writer:
        for frame in clip:
            writer.write(cv2.resize(frame.picture, size), frame)
        writer.close()
    return path


def vsod(*arguments: str) -> float:
    """Runs the command; seconds by the wall clock."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "vsod_models.cli", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise BadInput(f"vsod {' '.join(arguments)}: {done.stderr.strip() or done.stdout}")
    return time.perf_counter() - began


def commands(args: argparse.Namespace, video: Path, folder: Path) -> dict[str, Any]:
    from vsod_models.media.reading import open_source
    from vsod_models.media.writing import encode_png

    source = open_source(video)
    frames = 0
    for frame in source:
        if frames == 0:
            (folder / "one.png").write_bytes(encode_png(frame.picture))
            height, width = frame.picture.shape[:2]
        frames += 1
    options = ["--device", args.device, "--model", args.model, "--overwrite"]
    if args.overlap is not None:
        options += ["--overlap", str(args.overlap)]
    whole, start = [], []
    for _ in range(args.runs):
        start.append(
            vsod("predict", str(folder / "one.png"), "-o", str(folder / "m.png"), *options)
        )
        whole.append(vsod("predict", str(video), "-o", str(folder / "out.mp4"), *options))
    return {
        "frames": frames,
        "width": width,
        "height": height,
        "seconds": median(whole),
        "start_seconds": median(start),
        "frames_per_second": frames / median(whole),
        "steady_frames_per_second": frames / (median(whole) - median(start)),
        "all_seconds": whole,
    }


def stages(args: argparse.Namespace, video: Path, folder: Path) -> dict[str, Any]:
    """CPU seconds a frame of each stage, alone and in one thread."""
    import cv2

    from vsod_models.cli.start import keep_memory
    from vsod_models.media.planes import Planes
    from vsod_models.media.reading import open_source
    from vsod_models.media.views import overlay, overlay_on
    from vsod_models.media.writing import Video, open_writer
    from vsod_models.prediction import VideoPredictor, resized
    from vsod_models.zoo import load_model

    keep_memory()  # as the command does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    each: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], count: int) -> Any:
        began = time.process_time()
        made = work()
        each[name] = (time.process_time() - began) / count
        return made

    def read() -> list[Any]:
        return [frame for frame, _ in zip(open_source(video), range(args.frames), strict=False)]

    read()
    frames = timed("reading", read, args.frames)
    count = len(frames)
    predictor = VideoPredictor(
        load_model(args.model), args.device, precision="auto", overlap=args.overlap
    )
    clip = [frame.picture for frame in frames]
    predictor.predict_clip(clip[: 2 * predictor.length])
    size = predictor.size
    timed(
        "resizing", lambda: [resized(torch.from_numpy(c).movedim(-1, 0), size) for c in clip], count
    )
    results = timed("network and upsampling", lambda: list(predictor.stream(clip)), count)
    each["network and upsampling"] -= each["resizing"]
    with open_writer(folder / "stages.mp4", open_source(video), overwrite=True) as writer:
        assert isinstance(writer, Video)

        def draw(frame: Any, saliency: Any) -> Any:
            planes = writer.planes(frame)
            if planes is None:
                return overlay(frame.picture, saliency, (0, 0, 0))
            overlay_on(planes, saliency)
            return planes

        def write() -> None:
            for picture, frame in zip(drawn, frames, strict=True):
                if isinstance(picture, Planes):
                    writer.write_planes(picture, frame)
                else:
                    writer.write(picture, frame)
            writer.close()

        saliencies = [result.saliency for result in results]
        drawn = timed("drawing", lambda: list(map(draw, frames, saliencies)), count)
        timed("encoding", write, count)
    torch.set_num_threads(threads)
    return {
        "each": each,
        "sum": sum(each.values()),
        "size": list(size),
        "overlap": predictor.length - predictor.stride,
        "dtype": measure.dtype_name(predictor.dtype),
    }


def markdown(document: Mapping[str, Any]) -> str:
    command, part = document["command"], document["stages"]
    rows = [[name, f"{1000 * seconds:.1f} ms"] for name, seconds in part["each"].items()]
    rows.append(["sum", f"{1000 * part['sum']:.1f} ms"])
    table = measure.markdown_table(["stage", "CPU time a frame"], rows, 1)
    return (
        f"{command['frames']} frames of {command['width']}x{command['height']} in "
        f"{command['seconds']:.1f} s: {command['frames_per_second']:.1f} frames/s from start to "
        f"end, {command['steady_frames_per_second']:.1f} after the start, which takes "
        f"{command['start_seconds']:.1f} s.\n\n{table}"
    )
