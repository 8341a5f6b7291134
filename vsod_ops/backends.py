"""The registry: every op's backends in order, what each can run, and why not.

A backend is a way to run an op: "cpu" and "cuda" are the compiled modules, "triton" the Triton
kernels, "reference" plain PyTorch.  Each op registers those it has, best first, and whoever asks
which one runs asks here: the op itself, the layers, the doctor, the table in the documentation.
"""

import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
FLOATS_AND_DOUBLE = FLOATS | {torch.float64}

# What a call is about beyond device and dtype: name of a size -> its number.
Sizes = Mapping[str, int]
_NO_SIZES: Sizes = MappingProxyType({})

_TENSORS = {
    "cpu": "CPU",
    "cuda": "CUDA",
    "triton": "CUDA; CPU with `TRITON_INTERPRET=1`",
    "reference": "any",
}


class Backend(NamedTuple):
    """One backend of an op, and what it can run."""

    name: str
    dtypes: frozenset[torch.dtype]
    about: str  # a few words for the table in the documentation
    backward: bool = True
    limits: Sizes = _NO_SIZES  # the most it can run of a size
    unnamed_limits: Sizes = _NO_SIZES  # the same for a call that does not name it

    def why_not(self, device_type: str, dtype: torch.dtype, sizes: Sizes = _NO_SIZES) -> str | None:
        """Why this backend cannot run such tensors; None if it can."""
        if dtype not in self.dtypes:
            return f"takes {_dtype_names(self.dtypes)}, not {_dtype_name(dtype)}"
        for size, limit in self.limits.items():
            if sizes.get(size, 0) > limit:
                return f"takes at most {limit} {size}, not {sizes[size]}"
        if self.name == "reference":
            return None
        if self.name == "triton":
            return _why_not_triton(device_type)
        if device_type != self.name:
            return f"takes {self.name.upper()} tensors, not {device_type} ones"
        module = compiled_module(f"_{self.name}")
        return module if isinstance(module, str) else None

    def why_not_unnamed(self, device_type: str, sizes: Sizes = _NO_SIZES) -> str | None:
        """Why this backend, though it can run, is not taken unless it is named; None if it is."""
        if self.name == "triton" and device_type == "cpu":
            return "is interpreted on a CPU, which is a debugger: only when named"
        for size, limit in self.unnamed_limits.items():
            if sizes.get(size, 0) > limit:
                return f"takes at most {limit} {size}, not {sizes[size]}, unless it is named"
        return None

    def limit_names(self) -> list[str]:
        """Its limits in words."""
        return [f"up to {limit} {size}" for size, limit in self.limits.items()] + [
            f"up to {limit} {size} unless named" for size, limit in self.unnamed_limits.items()
        ]


_registry: dict[str, tuple[Backend, ...]] = {}


def register(op: str, *backends: Backend) -> None:
    """Enter an op with its backends, in the order of preference."""
    _registry[op] = backends


def registered() -> Mapping[str, tuple[Backend, ...]]:
    """Every op with its backends, in the order of preference."""
    return MappingProxyType(_registry)


def why_not(
    op: str, backend: str, device_type: str, dtype: torch.dtype, sizes: Sizes = _NO_SIZES
) -> str | None:
    """Why `backend` cannot run `op` on such tensors; None if it can."""
    for entry in _registry[op]:
        if entry.name == backend:
            return entry.why_not(device_type, dtype, sizes)
    return "this op has no such backend"


def choose(
    op: str,
    backend: str | None,
    device_type: str,
    dtype: torch.dtype,
    sizes: Sizes = _NO_SIZES,
) -> str:
    """The backend that runs `op`: `backend` itself, or for None the first that can.

    Raises:
        ValueError: the named backend cannot run, or none can; the message says why.
    """
    if backend is None:
        reasons = []
        for entry in _registry[op]:
            reason = entry.why_not(device_type, dtype, sizes)
            reason = reason or entry.why_not_unnamed(device_type, sizes)
            if reason is None:
                return entry.name
            reasons.append(f"{entry.name} {reason}")
        raise ValueError(f"{op}: no backend can run: " + "; ".join(reasons))
    check_name(backend)
    if reason := why_not(op, backend, device_type, dtype, sizes):
        raise ValueError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend


def check_name(backend: str | None) -> None:
    """Raise for a name that no backend has."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")


def table() -> str:
    """What runs where, as the table in the documentation."""
    lines = ["| op | backend | tensors | dtypes | backward |", "| --- | --- | --- | --- | --- |"]
    for op, entries in _registry.items():
        title = f"`{op}`"
        for entry in entries:
            about = "; ".join([entry.about, *entry.limit_names()])
            lines.append(
                f"| {title} | `{entry.name}` ({about}) | {_TENSORS[entry.name]} "
                f"| {_dtype_names(entry.dtypes)} | {'yes' if entry.backward else 'none'} |"
            )
            title = ""
    return "\n".join(lines)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(map(_dtype_name, dtypes)))


# ---- what is there on this machine


class CompiledModule(NamedTuple):
    """A compiled module that is loaded; its kernels are registered with torch."""

    name: str

    def build_info(self) -> dict[str, str]:
        """Compiler, torch and revision of the build, and what machines it has code for."""
        text = getattr(torch.ops.vsod_ops, f"{self.name.removeprefix('_')}_build_info")()
        return dict(line.split(": ", 1) for line in text.splitlines())


def library_path(name: str) -> Path:
    """The library of a compiled module, which torch loads with or without Python."""
    return Path(__file__).parent / f"{name}.so"


@functools.cache
def compiled_module(name: str) -> CompiledModule | str:
    """The compiled module "_cpu" or "_cuda", or the reason why there is none."""
    path, module = library_path(name), CompiledModule(name)
    if not path.exists():
        return build_report().get(name) or f"vsod_ops.{name} was not built"
    if name == "_cuda" and torch.version.cuda is None:
        return "this torch has no CUDA support"
    try:
        torch.ops.load_library(path)
        module.build_info()
    except (OSError, RuntimeError) as error:
        # It was built, so somebody counts on it: once a process, say that it is not used.
        reason = f"vsod_ops.{name} does not load: {str(error).splitlines()[0]}"
        warnings.warn(f"{reason}; other backends run in its place", RuntimeWarning, stacklevel=2)
        return reason
    return module


def build_report() -> dict[str, str]:
    """What setup.py left: module name -> reason why it was not built."""
    path = Path(__file__).parent / "_build_report.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_triton(device_type: str) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed"
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cuda" or interpreted:
        return None
    return f"takes CUDA tensors ({device_type} ones only with TRITON_INTERPRET=1)"
