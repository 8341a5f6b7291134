"""`python -m benchmarks batch`: clips an hour of `vsod batch` and of what is run in its place.

Each rival gets the same short clips and the same cores, and is timed by the wall clock from its
start to its end: `vsod batch` with one actor a core, a loop of `vsod predict` commands, and one
process that keeps the model.  `--rivals` runs some of them; those of an earlier run of the same
commit with the same options are kept in the results.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from . import BadInput, measure
from .arguments import add_common, begin, positive
from .predict import example, vsod

RIVALS = {
    "batch": "`vsod batch`",
    "loop": "a loop of `vsod predict`",
    "warm": "one process that keeps the model",
}
MARK = "VSOD_BENCHMARK"  # in the environment of all processes of a run
WARM = """
import sys, time
from pathlib import Path
began = time.perf_counter()
from vsod_models.media.reading import open_source
from vsod_models.prediction import load_predictor, predict_file
predictor = load_predictor(sys.argv[1], sys.argv[2])
print(time.perf_counter() - began, flush=True)
for clip in sys.argv[4:]:
    predict_file(predictor, open_source(clip), Path(sys.argv[3]) / Path(clip).name, view="mask")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clips", type=positive, default=64, help="of them (default: 64)")
    add("--loop-clips", type=positive, help="of them, for the loop, which is slow (default: all)")
    add("--frames", type=positive, default=50, help="of a clip (default: 50, 2 s)")
    add("--model", default="vsod-mobile")
    add("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="default: all")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import ray  # noqa: F401

        from vsod_models import prediction  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[models,batch]'") from None
    device = begin(args)
    options = {name: value for name, value in vars(args).items() if name != "rivals"}
    document = measure.record("batch", device, options)
    document["width"], document["height"] = size = (480, 270)
    document["rivals"] = kept(args.out / "batch.json", document)
    cores = document["machine"]["threads"]
    print(document["machine"]["line"])
    with tempfile.TemporaryDirectory() as folder:
        clips = [Path(folder) / "clips" / f"{index:03d}.mp4" for index in range(args.clips)]
        clips[0].parent.mkdir()
        example(clips[0], args.frames, size)
        for clip in clips[1:]:
            shutil.copy(clips[0], clip)
        for name in args.rivals:
            some = clips[: args.loop_clips] if name == "loop" else clips
            measured = {"batch": batch, "loop": loop, "warm": warm}[name]
            load = measure.load_average()
            out = Path(folder) / name
            out.mkdir()
            made = measured(args, some, out, cores)
            missing = [clip.name for clip in some if not (out / clip.name).is_file()]
            if missing:
                raise BadInput(f"{RIVALS[name]} made no {missing[0]}")
            made |= {"clips": len(some), "clips_per_hour": 3600 * len(some) / made["seconds"]}
            document["rivals"][name] = made | {"load_before": load}
            print(f"{RIVALS[name]}: {len(some)} clips in {made['seconds']:.1f} s", flush=True)
            rows = [{"rival": key, **value} for key, value in document["rivals"].items()]
            paths = measure.write_results(document, rows, args.out, "batch")
    if document["rivals"].keys() == RIVALS.keys():
        print(markdown(document))
    print("wrote " + ", ".join(path.name for path in paths))
    return 0


def kept(file: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The rivals that were measured before, where that is comparable."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_text())
    same = all(before[name] == document[name] for name in ("commit", "machine", "options"))
    return before["rivals"] if same else {}


def loop(args: argparse.Namespace, clips: Sequence[Path], out: Path, cores: int) -> dict[str, Any]:
    options = ["--as", "mask", "--model", args.model, "--device", args.device]
    with patch.dict(os.environ, OMP_NUM_THREADS=str(cores)):
        each = [vsod("predict", str(clip), "-o", str(out / clip.name), *options) for clip in clips]
    return {"seconds": sum(each), "actors": 1, "threads": cores}


def warm(args: argparse.Namespace, clips: Sequence[Path], out: Path, cores: int) -> dict[str, Any]:
    command = [sys.executable, "-c", WARM, args.model, args.device, str(out), *map(str, clips)]
    began = time.perf_counter()
    with patch.dict(os.environ, OMP_NUM_THREADS=str(cores)):
        done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise BadInput(f"one process: {done.stderr.strip()}")
    return {
        "seconds": seconds, "actors": 1, "threads": cores, "start_seconds": float(done.stdout)
    }  # fmt: skip


def batch(args: argparse.Namespace, clips: Sequence[Path], out: Path, cores: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "vsod_models.cli", "batch", str(clips[0].parent), "-o", str(out),
        "--as", "mask", "--model", args.model, "--device", args.device, "--actors", str(cores),
        "--threads", "1", "--json-lines",
    ]  # fmt: skip
    mark = uuid.uuid4().hex
    ended: list[float] = []
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with patch.dict(os.environ, {MARK: mark}), Watch(mark) as watch:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        for line in process.stdout:
            ended.append(time.perf_counter() - began)
            rows.append(json.loads(line))
        process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise BadInput(f"vsod batch: {next(row['error'] for row in rows if row['error'])}")
    return {
        "seconds": seconds, "actors": cores, "threads": 1, **engine(rows, ended, cores),
        "end_seconds": seconds - ended[-1], **watch.bytes(),
    }  # fmt: skip


def engine(
    rows: Sequence[Mapping[str, Any]], ended: Sequence[float], actors: int
) -> dict[str, float]:
    """What it takes beside the videos: until the first one begins, and of an actor for each.

    rows: of the manifest, in the order of their `ended`, seconds since the command began.
    """
    start = min(end - row["seconds"] for row, end in zip(rows, ended, strict=True))
    work = sum(row["seconds"] for row in rows)
    return {
        "start_seconds": start,
        "video_seconds": work / len(rows),
        "overhead_seconds": (actors * (ended[-1] - start) - work) / len(rows),
    }


class Watch:
    """The most memory of the processes of a run, by VmHWM, looked at four times a second."""

    def __init__(self, mark: str):
        self.mark = f"{MARK}={mark}".encode()
        self.peaks: dict[int, tuple[bool, int]] = {}  # process -> (an actor, bytes)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ended.wait(0.25):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self.mark not in (folder / "environ").read_bytes().split(b"\0"):
                        continue
                    actor = b"MapWorker" in (folder / "cmdline").read_bytes()
                    status = (folder / "status").read_text()
                except OSError:
                    continue
                if "VmHWM:" in status:
                    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                    self.peaks[int(folder.name)] = (actor, peak)

    def bytes(self) -> dict[str, int]:
        own = os.getpid()
        actors = [peak for actor, peak in self.peaks.values() if actor]
        others = [p for pid, (actor, p) in self.peaks.items() if not actor and pid != own]
        return {"actor_bytes": max(actors, default=0), "other_bytes": sum(others)}


def markdown(document: Mapping[str, Any]) -> str:
    rivals, options = document["rivals"], document["options"]
    base = rivals["loop"]["clips_per_hour"]
    rows = [
        [
            RIVALS[name], f"{made['actors']} x {made['threads']}", str(made["clips"]),
            f"{made['seconds']:.0f} s", f"{made['clips_per_hour']:.0f}",
            f"{made['clips_per_hour'] / base:.2f}",
        ]
        for name in RIVALS
        for made in [rivals[name]]
    ]  # fmt: skip
    table = measure.markdown_table(
        ["", "processes x threads", "clips", "time", "clips an hour", "of the loop"], rows, 2
    )
    ours = rivals["batch"]
    return (
        f"Clips of {options['frames']} frames of {document['width']}x{document['height']}, masks "
        f"of `{options['model']}`, everything from the start of the command to its end:\n\n"
        f"{table}\n\n"
        f"`vsod batch` begins with its first video after {ours['start_seconds']:.1f} s and ends "
        f"{ours['end_seconds']:.1f} s after the last one. A video takes an actor "
        f"{ours['video_seconds']:.2f} s, and the engine {1000 * ours['overhead_seconds']:.0f} ms "
        f"beside it. An actor takes at most {measure.bytes_text(ours['actor_bytes'])}, the driver "
        f"and Ray's own processes {measure.bytes_text(ours['other_bytes'])} together, shared "
        f"pages counted in each."
    )
