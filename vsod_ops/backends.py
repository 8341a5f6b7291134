"""Which backends run on this machine, and which one an op takes.

A backend is a way to run an op: "cpu" and "cuda" are the compiled modules, "triton" the Triton
kernels, "reference" plain PyTorch.  Each op lists those it has, with their dtypes, best first.
"""

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")

# What an op has: backend name -> dtypes it takes, in the order of preference.
Support = Mapping[str, frozenset[torch.dtype]]


@functools.cache
def compiled_module(name: str) -> ModuleType | str:
    """The compiled module "_cpu" or "_cuda", or the reason why there is none."""
    if importlib.util.find_spec(f"vsod_ops.{name}") is None:
        return build_report().get(name) or f"vsod_ops.{name} was not built"
    if name == "_cuda" and torch.version.cuda is None:
        return "this torch has no CUDA support"
    try:
        return importlib.import_module(f"vsod_ops.{name}")
    except ImportError as error:
        return f"vsod_ops.{name} does not load: {error}"


def build_report() -> dict[str, str]:
    """What setup.py left: module name -> reason why it was not built."""
    path = Path(__file__).parent / "_build_report.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def why_not(name: str, support: Support, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot take tensors of this device and dtype; None if it can."""
    if name not in support:
        return "this op has no such backend"
    if dtype not in support[name]:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in support[name]))
        return f"takes {names}, not {str(dtype).removeprefix('torch.')}"
    if name == "reference":
        return None
    if name == "triton":
        if reason := _triton_missing():
            return reason
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if device_type != "cuda":
            return f"takes CUDA tensors ({device_type} ones only with TRITON_INTERPRET=1)"
        return None
    if device_type != name:
        return f"takes {name.upper()} tensors, not {device_type} ones"
    module = compiled_module(f"_{name}")
    return module if isinstance(module, str) else None


def choose(
    op: str, support: Support, backend: str | None, device_type: str, dtype: torch.dtype
) -> str:
    """The backend to run: `backend` itself, or the first of `support` that can run."""
    if backend is None:
        for name in support:
            interpreter = name == "triton" and device_type == "cpu"  # a debugger, never a default
            if not interpreter and why_not(name, support, device_type, dtype) is None:
                return name
        raise ValueError(f"{op}: no backend takes {dtype} on {device_type}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if reason := why_not(backend, support, device_type, dtype):
        raise ValueError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend
