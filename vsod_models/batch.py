"""Any number of videos, on one machine or many: one row a video or part, in actors of Ray Data.

What is whole and what is not is kept in files, never in Ray: a video's output takes its name in one
step, and beside it, in the folder `.vsod-batch`, lies a record of who made it.  So a video that was
done is not run again, whoever is killed and started again.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock

from .errors import InputError, describe, one_line
from .files import locked, natural_order, need_file, read_json, whole_file

if TYPE_CHECKING:
    from .media.reading import Source

VIDEO_ENDINGS = (
    ".3gp", ".avi", ".flv", ".gif", ".ivf", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".mxf", ".nut", ".ogv", ".ts", ".webm", ".wmv", ".y4m",
)  # fmt: skip
FORMATS = ("mp4", "mov", "webm", "gif", "png")  # png: a folder of them for each video
RECORDS = ".vsod-batch"
MOST_BLOCKS = 4096  # of rows that Ray hands out

# What may be gone a moment later: of disks, networks and machines that are busy.
PASSING = {
    errno.EAGAIN, errno.EBUSY, errno.EDQUOT, errno.EIO, errno.EINTR, errno.EMFILE, errno.ENFILE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENOLCK, errno.ENOSPC, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One video and where its result goes, or one of the parts that it was cut into.

    parts: JSON, a list of `Part`s as lists; empty: the video is not cut.
    """

    source: str
    output: str
    parts: str = ""
    number: int = 0  # of the part


class Part(NamedTuple):
    """Frames `first` to `stop` - 1 of a video; `read` is the first one that they depend on."""

    first: int
    stop: int
    read: int
    since: int  # pts of `read`
    pts: int  # of `first`

    @property
    def name(self) -> str:
        return f"{self.first:06d}-{self.stop:06d}"


@dataclass(frozen=True)
class Cut:
    """How long videos are cut; unit, before: see :meth:`VideoPredictor.reach`."""

    seconds: float
    unit: int
    before: int


@dataclass(frozen=True)
class Options:
    """How every video is treated; the fields of `predictor` are `load_predictor`'s arguments."""

    predictor: Mapping[str, Any]
    folder: str  # of the outputs
    view: str | None = None
    background: Sequence[int] = (255, 255, 255)
    overwrite: bool = False
    retries: int = 2
    threads: int = 1
    memory: float | None = None  # GB that an actor may allocate
    cut: Cut | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)


def find_tasks(inputs: Sequence[str], folder: str | Path, form: str) -> list[Task]:
    """Videos, folders of videos, globs and lists -> tasks, each with an output of its own.

    Args:
        inputs: a folder is searched for videos, also in folders within it; a .txt, .csv or
            .parquet file and "-" (standard input) are lists of inputs, a line or a row each (of
            the column `path`, or the only one).
        folder: of the outputs; what lies in it is no input.
        form: one of FORMATS.

    Raises:
        InputError: nothing is found, or two inputs would have the same output.  Of several inputs
            some may be missing, which is a row of the manifest.
    """
    ending = "" if form == "png" else f".{form}"
    root = Path(folder).resolve()
    tasks: dict[str, Task] = {}
    for path, name in _found(inputs, root):
        output = str(root / Path(name).with_suffix(ending))
        source = str(path)
        if output in tasks and tasks[output].source != source:
            raise InputError(
                f"{source}: would be written to {output}, as {tasks[output].source} would; give "
                "them to runs with outputs of their own"
            )
        tasks[output] = Task(source, output)
    if not tasks:
        raise InputError(f"{', '.join(inputs)}: no videos in it ({' '.join(VIDEO_ENDINGS)})")
    if not any(os.path.exists(task.source) for task in tasks.values()):
        raise InputError(f"{', '.join(inputs)}: no such file or folder")
    return list(tasks.values())


def _found(inputs: Sequence[str], outputs: Path) -> Iterator[tuple[Path, str]]:
    """(file or folder of frames, its name below the folder of outputs)."""
    for given in inputs:
        path = Path(given)
        if given == "-":
            yield from _found([line.strip() for line in sys.stdin if line.strip()], outputs)
        elif path.is_dir():
            videos = [
                p
                for p in path.rglob("*")
                if p.suffix.lower() in VIDEO_ENDINGS
                and p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
                and outputs not in p.resolve().parents
            ]
            for video in natural_order(videos):
                yield video.resolve(), str(video.relative_to(path))
            if not videos and any(path.iterdir()):
                yield path.resolve(), path.resolve().name  # of frames
        elif path.suffix.lower() in (".txt", ".csv", ".parquet") and path.exists():
            yield from _found(_listed(path), outputs)
        elif glob.has_magic(given) and not path.exists():
            matches = natural_order(glob.glob(given, recursive=True))
            if not matches:
                raise InputError(f"{given}: matches no file")
            yield from _found(matches, outputs)
        else:  # one that is not there is a row of the manifest that says so
            yield path.resolve(), path.name


def _listed(path: Path) -> list[str]:
    """The inputs that a file lists; relative ones are of the current folder."""
    need_file(path)
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    rows: list[dict[str, Any]]
    if path.suffix.lower() == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise InputError(f"{path}: not readable as Parquet ({one_line(error)})") from None
    names = list(rows[0]) if rows else []
    column = "path" if "path" in names else names[0] if len(names) == 1 else None
    if column is None:
        raise InputError(f"{path}: has the columns {', '.join(names)}; one called path is needed")
    return [str(row[column]) for row in rows]


def cut_up(task: Task, cut: Cut) -> list[Task]:
    """A task for each part of a long video; itself where it is short, or cannot be cut."""
    from .media.reading import VideoFile, open_source

    try:
        source = open_source(task.source)
        rate = float(source.rate)
        if not isinstance(source, VideoFile) or (source.frames or 0) < 2 * cut.seconds * rate:
            return [task]
        times = source.times()
    except (InputError, OSError):  # whose turn it is says so
        return [task]
    count = 0 if times is None else int(len(times) / (cut.seconds * rate))
    if times is None or count < 2:
        return [task]
    firsts = [number * len(times) // count for number in range(count + 1)]
    parts = []
    for first, stop in itertools.pairwise(firsts):
        read = max(0, first - cut.before) // cut.unit * cut.unit
        parts.append(Part(first, stop, read, times[read], times[first]))
    return [replace(task, parts=json.dumps(parts), number=number) for number in range(count)]


class Worker:
    """Holds the model, takes rows of tasks and gives rows of the manifest.

    Whatever happens to a video is in its row; nothing is raised.
    """

    def __init__(self, options: Options):
        self.options = options
        import torch

        from .prediction import load_predictor

        torch.set_num_threads(options.threads)
        self.predictor = load_predictor(**options.predictor)
        self.made_by = self.predictor.record() | {
            "view": options.view,
            "background": list(options.background),
        }
        limit_memory(options.memory)

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        row: dict[str, Any] = {
            "input": task["source"], "output": task["output"], "state": "failed", "kept": False,
            "error": "", "frames": 0, "seconds": 0.0, "model": self.made_by["model"],
            "hash": self.made_by["hash"], "options": json.dumps(self.made_by),
        }  # fmt: skip
        for attempt in range(self.options.retries + 1):
            try:
                row |= self._made(Task(**task)) | {"error": ""}
                break
            except Exception as error:
                row["error"] = _explained(error)
                if not passes(error):
                    break
            if attempt < self.options.retries:
                time.sleep(2**attempt)
        if not row["kept"] and not row["seconds"]:  # of all parts, where they were joined
            row["seconds"] = round(time.monotonic() - began, 3)
        return row

    def _made(self, task: Task) -> dict[str, Any]:
        """Runs a video, or a part of one, unless that was done; what is known of it."""
        from .media.reading import open_source

        output = Path(task.output)
        file = record_of(self.options.folder, output)
        if not task.parts:
            with _alone(file):
                return self._run(task.source, output, file)
        if known := self._known(output, file):
            return known
        parts = [Part(*numbers) for numbers in json.loads(task.parts)]
        folder = self._folder_of_parts(task, file)
        part = parts[task.number]
        made, record = _place(folder, part, output)
        with _alone(record):
            self._run(task.source, made, record, part)
        with _alone(file):
            return self._join(open_source(task.source), output, file, folder, parts)

    def _run(self, name: str, output: Path, file: Path, part: Part | None = None) -> dict[str, Any]:
        """Predicts into `output`, of which `file` is the record; the caller holds its lock."""
        from .media.reading import VideoFile, VideoPart, open_source
        from .prediction import predict_file

        if known := self._known(output, file):
            return known
        record = self._begun(file, output, name)
        source = open_source(name)
        if part is not None:
            assert isinstance(source, VideoFile)
            source = VideoPart(source, part.read, part.since, {part.first: part.pts})
        _write(file, record)
        began = time.monotonic()
        try:
            written = predict_file(
                self.predictor, source, output, view=self.options.view,
                background=self.options.background, overwrite=self.options.overwrite,
                only=None if part is None else range(part.first, part.stop),
            )  # fmt: skip
        except Exception:
            file.unlink(missing_ok=True)
            raise
        seconds = round(time.monotonic() - began, 3)
        record |= {"state": "done", "frames": written.frames, "seconds": seconds}
        _write(file, record)
        return {"state": "done", "frames": written.frames}

    def _known(self, output: Path, file: Path) -> dict[str, Any]:
        """What is known of an output that is there and whole; empty where it is to be made."""
        from .media.reading import open_source

        record = read_json(file, "record of `vsod batch`") if file.is_file() else {}
        mine = record.get("run") == self.options.run
        if not (os.path.lexists(output) and record and (mine or not self.options.overwrite)):
            return {}
        if record.get("made_by") != self.made_by:
            raise InputError(
                f"{output}: was made by {record['made_by'].get('model')} with other weights or "
                "other options; overwrite=True makes it anew"
            )
        if record["state"] == "running":
            if record.get("replaces") == _identity(output):  # killed before it was whole
                return {}
            record |= {"state": "done", "frames": open_source(output).frames or 0}
            _write(file, record)
        return {key: record[key] for key in ("state", "frames", "seconds")} | {"kept": True}

    def _begun(self, file: Path, output: Path, name: str) -> dict[str, Any]:
        """The record of an output that is to be made now."""
        record = read_json(file, "record of `vsod batch`") if file.is_file() else {}
        mine = record.get("run") == self.options.run
        attempts = record.get("attempts", 0) + 1 if mine else 1
        if attempts > self.options.retries + 1:
            raise InputError(f"{name}: the process that ran it was killed {attempts - 1} times")
        return {
            "state": "running", "run": self.options.run, "attempts": attempts,
            "made_by": self.made_by, "frames": 0, "seconds": 0.0, "replaces": _identity(output),
        }  # fmt: skip

    def _folder_of_parts(self, task: Task, file: Path) -> Path:
        """Where the parts wait for one another: those of this source, these cuts and options."""
        status = os.stat(task.source)
        about = [task.parts, self.made_by, status.st_size, status.st_mtime_ns]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return file.with_name(f"{Path(task.output).name}.{key}")

    def _join(
        self, source: Source, output: Path, file: Path, folder: Path, parts: Sequence[Part]
    ) -> dict[str, Any]:
        """Makes the output of its parts if all are there; the caller holds its lock."""
        from .media.writing import join

        if known := self._known(output, file):
            shutil.rmtree(folder, ignore_errors=True)  # of an actor that was killed in between
            return known
        places = [_place(folder, part, output) for part in parts]
        records = [read_json(record, "record") for _, record in places if record.is_file()]
        if len(records) < len(parts) or any(record["state"] != "done" for record in records):
            return {"state": "part"}
        record = self._begun(file, output, str(output))
        _write(file, record)
        try:
            made = [made for made, _ in places]
            join(made, output, source, overwrite=self.options.overwrite)
        except Exception:
            file.unlink(missing_ok=True)
            raise
        told: dict[str, Any] = {"state": "done"}
        for name in ("frames", "seconds"):
            told[name] = round(sum(one[name] for one in records), 3)
        _write(file, record | told)
        shutil.rmtree(folder, ignore_errors=True)
        return told


def _identity(path: Path) -> int | None:
    """Another one once another file or folder lies there; None: nothing does."""
    return os.lstat(path).st_ino if os.path.lexists(path) else None


def _place(folder: Path, part: Part, output: Path) -> tuple[Path, Path]:
    """A part's file (or folder of PNG), and the record of it."""
    return folder / f"{part.name}{output.suffix}", folder / f"{part.name}.json"


def record_of(folder: str, output: Path) -> Path:
    """Where it is written who made an output."""
    name = output.relative_to(Path(folder).resolve())
    return Path(folder).resolve() / RECORDS / name.with_name(f"{name.name}.json")


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with whole_file(file) as part:
        part.write_text(json.dumps(record) + "\n")


class Actor(Worker):
    """A worker in a process of its own."""

    def __init__(self, options: Options):
        # A video is whole or not there: nobody's Ctrl-C ends it early.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        super().__init__(options)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process a video: one whose driver is dead may still be at it, and is waited for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file.with_suffix(".lock"))
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        # Who waits on the file that goes away finds the video done, or locks it once more.
        file.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def passes(error: BaseException) -> bool:
    """Whether trying again can help."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in PASSING:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _explained(error: Exception) -> str:
    if isinstance(error, (InputError, OSError)):
        return describe(error)
    if isinstance(error, MemoryError) or "memory" in str(error) or "bad_alloc" in str(error):
        return f"out of the memory that an actor may take ({one_line(error)})"
    return f"{type(error).__name__}: {one_line(error)}"


def limit_memory(gigabytes: float | None) -> None:
    """What this process may have allocated: more is an error in the video that asks for it.

    RLIMIT_DATA counts private memory alone, so neither Ray's store nor files that are mapped.
    """
    if gigabytes is not None:
        wanted = int(gigabytes * 2**30)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


@dataclass(frozen=True)
class Cluster:
    """Where it runs.

    address: of a Ray cluster; None: this machine, for as long as the run lasts.
    actors: how many, of `Options.threads` CPUs and `gpus` GPUs each.
    """

    actors: int
    address: str | None = None
    gpus: float = 0.0


def run_batch(
    tasks: Sequence[Task],
    options: Options,
    cluster: Cluster,
    manifest: str | Path,
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Every task through the model; the rows of the manifest, in the order of the tasks.

    Args:
        manifest: a .jsonl or .parquet file; it is written when the run ends, however that is.
        on_row: is called with each row when it is known.

    Raises:
        InputError: another run is at work in the folder of outputs, Ray or the model cannot be
            started, or the manifest cannot be written.
    """
    check_places(options.folder, manifest)
    rows: dict[str, dict[str, Any]] = {}
    with locked(options.folder, "a batch"), contextlib.ExitStack() as at_end:
        at_end.callback(lambda: write_manifest(Path(manifest), _in_order(tasks, rows)))
        for row in _rows(tasks, options, cluster):
            if row["state"] != "part" and row["output"] not in rows:
                rows[row["output"]] = row
                on_row(row)
    return _in_order(tasks, rows)


def check_places(folder: str | Path, manifest: str | Path) -> None:
    """InputError for what can be neither a folder of outputs nor a manifest."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"{folder}: is a file; a folder for the outputs is needed")
    if Path(manifest).suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{manifest}: has to end in .jsonl or .parquet")
    if Path(manifest).is_dir():
        raise InputError(f"{manifest}: is a folder; a file is to be written there")


def _in_order(tasks: Sequence[Task], rows: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    waiting = {"state": "waiting", "kept": False, "error": "", "frames": 0, "seconds": 0.0}
    waiting |= {"model": "", "hash": "", "options": ""}
    return [
        rows.get(task.output, {"input": task.source, "output": task.output, **waiting})
        for task in tasks
    ]


def _rows(tasks: Sequence[Task], options: Options, cluster: Cluster) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = dict(logging_level="ERROR", log_to_driver=False)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _stderr_closed():  # its C++ side says there that it was told to be quiet
            if cluster.address is not None:
                ray.init(cluster.address, **quiet)
            else:
                # Rows are small: the store holds nothing else.
                ray.init(
                    "local", num_cpus=cluster.actors * options.threads + 1,
                    include_dashboard=False, object_store_memory=128 * 2**20, **quiet,
                )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"Ray at {cluster.address or 'local'}: {one_line(error)}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's would end the process, without a manifest
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = 2**20  # of what it keeps in its store for each task
        if options.cut is not None:
            tasks = _all_cut(tasks, options)
        # Each block is a task of an actor; what was done of one that is run again is skipped.
        blocks = min(len(tasks), MOST_BLOCKS)
        data = ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=blocks)
        done = data.map(
            Actor, fn_constructor_args=(options,), num_cpus=options.threads,
            num_gpus=cluster.gpus or None,
            compute=ray.data.ActorPoolStrategy(
                size=min(cluster.actors, blocks), max_tasks_in_flight_per_actor=2
            ),
        )  # fmt: skip
        yield from done.iter_rows()
    except ray.exceptions.RayError as error:
        raise InputError(f"Ray: {one_line(error)}") from error
    finally:
        ray.shutdown()


def _all_cut(tasks: Sequence[Task], options: Options) -> list[Task]:
    """The tasks with those of long videos cut, on the machines that run them."""
    import ray.data

    def cut(row: Mapping[str, Any]) -> dict[str, str]:
        task = Task(row["source"], row["output"])
        done = os.path.lexists(task.output) and not options.overwrite
        assert options.cut is not None
        parts = [task] if done else cut_up(task, options.cut)
        return {"tasks": json.dumps([asdict(part) for part in parts])}

    data = ray.data.from_items(
        [asdict(task) for task in tasks], override_num_blocks=min(len(tasks), MOST_BLOCKS)
    )
    rows = data.map(cut, num_cpus=1).iter_rows()
    return [Task(**part) for row in rows for part in json.loads(row["tasks"])]


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """What libraries write there goes nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def write_manifest(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row for each input, as JSON lines or Parquet by the ending."""
    with whole_file(path) as part:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part)
        else:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
