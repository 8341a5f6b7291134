"""``python -m vsod_ops.doctor``: what is installed, what was built, which backend runs where.

With ``--table``: the table of backends, as it stands in the documentation.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _module_lines(name: str) -> list[str]:
    module = backends.compiled_module(name)
    if isinstance(module, str):
        return [f"  {name}: no ({module})"]
    return [f"  {name}: built"] + [f"    {k}: {v}" for k, v in module.build_info().items()]


def _gpu_line() -> str:
    if torch.version.cuda is None:
        return "none (this torch has no CUDA support)"
    if not torch.cuda.is_available():
        return "none found"
    module = backends.compiled_module("_cuda")
    lines = []
    for i in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        line = f"{torch.cuda.get_device_name(i)}, compute capability {capability}"
        if not isinstance(module, str):
            line += f", _cuda {torch.ops.vsod_ops.cuda_probe(i) or 'runs'}"
        lines.append(line)
    return "; ".join(lines)


def report() -> str:
    """The doctor's findings as text."""
    lines = [
        f"vsod_ops {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "  " + ", ".join(f"{p} {_version(p)}" for p in ("torch", "triton", "numpy", "einops")),
        "Compiled modules",
        *_module_lines("_cpu"),
        *_module_lines("_cuda"),
        "Machine",
        f"  CPU threads: {torch.get_num_threads()}",
        f"  GPU: {_gpu_line()}",
    ]
    settings = [
        f"{k}={v}" for k, v in os.environ.items() if k in ("VSOD_OPS_SIMD", "TRITON_INTERPRET")
    ]
    if settings:
        lines.append("  set: " + ", ".join(settings))
    for op, entries in backends.registered().items():
        lines.append(f"Backends of {op}")
        for device in ("cpu", "cuda"):
            for dtype in DTYPES:
                lines += _backend_lines(entries, device, dtype)
    return "\n".join(lines)


def _backend_lines(
    entries: Sequence[backends.Backend], device: str, dtype: torch.dtype
) -> list[str]:
    """What runs on such tensors, and why nothing before it does."""
    runs, passed_over = [], []
    for entry in entries:
        reason = entry.why_not(device, dtype) or entry.why_not_unnamed(device)
        if reason:
            passed_over.append(f"    not {entry.name}: {reason}")
            continue
        limits = " and ".join(entry.limit_names())
        runs.append(f"{entry.name} {limits}" if limits else entry.name)
        if not limits:
            break
    return [f"  {device} {str(dtype).removeprefix('torch.')}: {', then '.join(runs)}", *passed_over]


if __name__ == "__main__":
    print(backends.table() if sys.argv[1:] == ["--table"] else report())
