"""What every benchmark shares: time, memory, the machine's peak, records and tables.

Rivals run interleaved (one sample of each, then the next round), so that a machine that slows
down slows all of them.  Outputs are allocated by each call, as a user's calls do.
"""

import csv
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vsod_ops import backends

ROOT = Path(__file__).resolve().parent.parent
MIN_REPEATS, MAX_REPEATS = 5, 100
PATIENCE = 20  # MIN_REPEATS may take this many times the budget before there are fewer of them
MAX_COPIES = 64  # of the inputs, to rotate past a GPU's L2 cache
AS_CALLED, IN_GRAPH = "as called", "CUDA graph"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

SINGLE_CALLS = {
    "cpu": (
        "median, 20th and 80th percentile of single calls by the wall clock, rivals interleaved, "
        "outputs allocated by each call"
    ),
    "cuda": (
        "median, 20th and 80th percentile of single calls from Python between two CUDA events, "
        "rivals interleaved, outputs allocated by each call"
    ),
}
TIME_METHOD = {
    "cpu": SINGLE_CALLS["cpu"],
    "cuda": (
        "median, 20th and 80th percentile, rivals interleaved; a sample is one pass over copies of "
        "the inputs that exceed the L2 cache, between two CUDA events, divided by the copies; as "
        "called from Python and, where a row says so, as one CUDA graph"
    ),
}
MEMORY_METHOD = {
    "cpu": (
        "growth of the process's anonymous resident memory over one call (VmHWM less file pages; "
        "free heap pages given back and VmHWM reset before it), in a fresh thread, so that scratch "
        "which a library keeps for each thread counts; outputs included, inputs not"
    ),
    "cuda": (
        "torch.cuda.max_memory_allocated less memory_allocated before the call; outputs "
        "included, inputs not"
    ),
}


# ---- time


@dataclass(frozen=True)
class Work:
    """What one sample of a rival runs: `run()` makes `calls` calls of the operator."""

    run: Callable[[], object]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of `repeats` samples."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            len(ordered),
        )


def clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What marks a moment, by CUDA events on a GPU, and the seconds from one mark to a later."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return mark, between


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run()` takes, by CUDA events on a GPU."""
    mark, between = clock(device)
    begin = mark()
    run()
    return between(begin, mark())


def interleave(
    works: Mapping[str, Work],
    seconds: float,
    device: torch.device,
    expected: float | None = None,
) -> dict[str, Timing]:
    """Time all `works` round robin for about `seconds`.

    `expected` seconds of one round, if known, tell whether a round of warm-up is still due: what
    takes as long as the budget has just been warmed by whoever measured it.
    """
    gc.collect()
    gc.disable()
    try:
        one_round = expected or 0.0
        if one_round < seconds / MIN_REPEATS:
            one_round = sum(seconds_of(work.run, device) for work in works.values())
        repeats = min(max(int(seconds / max(one_round, 1e-9)), MIN_REPEATS), MAX_REPEATS)
        if one_round * MIN_REPEATS > PATIENCE * seconds:
            repeats = max(1, int(PATIENCE * seconds / one_round))
        samples: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                samples[name].append(seconds_of(work.run, device) / work.calls)
    finally:
        gc.enable()
    return {name: Timing.of(times) for name, times in samples.items()}


def one_after_another(calls: Sequence[Callable[[], object]]) -> Work:
    def run() -> None:
        for call in calls:
            call()

    return Work(run, len(calls))


def cuda_graph(calls: Sequence[Callable[[], object]]) -> Work:
    """`calls`, one after another, captured in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs a warm-up on a stream that is not the default
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Work(graph.replay, len(calls))


def copies_past_cache(size: int, device: torch.device) -> int:
    """Inputs of `size` bytes that exceed a GPU's L2 cache twice; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(-(-2 * cache // size), MAX_COPIES)


def works_of(
    calls: Mapping[str, Sequence[Callable[[], object]]], mode: str
) -> tuple[dict[str, Work], dict[str, str]]:
    """name -> what one sample runs, AS_CALLED or IN_GRAPH, and name -> why there is no graph."""
    if mode == AS_CALLED:
        return {name: one_after_another(some) for name, some in calls.items()}, {}
    works, failed = {}, {}
    for name, some in calls.items():
        try:
            works[name] = cuda_graph(some)
        except Exception as error:
            failed[name] = reason(error)
    return works, failed


# ---- memory


def call_and_peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, float, int | None]:
    """Run `call()` once: its result, its seconds, and the peak extra memory in bytes.

    MEMORY_METHOD says how; None where the system cannot tell (a CPU without Linux's /proc).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result, seconds, torch.cuda.max_memory_allocated() - before

    resettable = _reset_peak()
    before = _memory()["RssAnon"] if resettable else 0
    result, seconds = _in_fresh_thread(call)
    if not resettable:
        return result, seconds, None
    after = _memory()
    return result, seconds, max(0, after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before)


def one_heap() -> None:
    """Let all threads allocate from one heap: malloc_trim gives back the end of no other one."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def _in_fresh_thread(call: Callable[[], Any]) -> tuple[Any, float]:
    threads = torch.get_num_threads()

    def timed() -> tuple[Any, float]:
        torch.set_num_threads(threads)  # OpenMP's setting is one a thread
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(timed).result()


def give_memory_back() -> None:
    """Give free heap pages back to the system, so that the next large buffer is new pages."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _reset_peak() -> bool:
    """Give free heap pages back, then set VmHWM to what is resident now."""
    if not sys.platform.startswith("linux"):
        return False
    give_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _memory() -> dict[str, int]:
    """The fields of /proc/self/status that are given in kB, in bytes."""
    status = Path("/proc/self/status").read_text()
    return {name: int(kb) * 1024 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", status)}


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not sys.platform.startswith("linux"):
        return float("inf")
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else float("inf")


# ---- the machine


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on: device, name, vector level or GPU, threads, versions, one line."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts: dict[str, Any] = {
            "name": properties.name,
            "vector_level": f"sm_{properties.major}{properties.minor}",
            "cuda": torch.version.cuda,
        }
    else:
        module = backends.compiled_module("_cpu")
        level = torch.backends.cpu.get_cpu_capability().lower()
        if not isinstance(module, str):  # ours knows bfloat16 levels and VSOD_OPS_SIMD
            level = module.build_info()["level"]
        facts = {"name": _cpu_name(), "vector_level": level}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "vsod-ops"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    line = (
        f"{device.type}: {facts['name']}, {facts['vector_level']}, "
        f"{threads} CPU thread{'s' * (threads > 1)}, torch {torch.__version__}"
    )
    return {"line": line, "device": device.type, **facts, "threads": threads, "versions": versions}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine's measured peak: {"flops_per_second", "how"}."""
    name = str(dtype).removeprefix("torch.")
    module = backends.compiled_module("_cpu")
    there = not isinstance(module, str)
    if device.type == "cpu" and name in ("float32", "bfloat16") and there:
        peak = torch.ops.vsod_ops.cpu_peak_flops(name)
        return {"flops_per_second": peak, "how": "loop of vector FMAs"}
    sizes = (8192,) if device.type == "cuda" else (1024, 2048)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(4):
            best = max(best, 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device))
    return {"flops_per_second": best, "how": "largest matrix product rate of torch"}


def load_average() -> float | None:
    """Processes that wanted to run in the last minute: above the thread count, distrust times."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# ---- records


def record(benchmark: str, device: torch.device, options: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a results document: what ran, on what, from which commit."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(device),
        "options": {
            name: value.name if isinstance(value, Path) else value
            for name, value in options.items()
            if name != "command"
        },
        "method": {
            "time": TIME_METHOD[device.type],
            "memory": MEMORY_METHOD[device.type],
        },
    }


def _commit() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        pages = (":!benchmarks/results", ":!README.md", ":!docs")  # what `report` writes
        dirty = git("status", "--porcelain", "--", ".", *pages)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.CalledProcessError):
        return None


def reason(error: BaseException) -> str:
    """One line for the records, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/", "", text)[:200]


def write_results(
    document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path, stem: str
) -> list[Path]:
    """Write `document` as STEM.json and its flat `rows` as STEM.csv; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.csv"]
    paths[0].write_text(json.dumps(document, indent=1) + "\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return paths


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text, the others numbers."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_text(count: float | None) -> str:
    """Three digits, in MB or GB."""
    if count is None:
        return ""
    return f"{count / 1e6:.3g} MB" if count < 999.5e6 else f"{count / 1e9:.3g} GB"


def seconds_text(seconds: float) -> str:
    """Three digits, in us, ms or s."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
