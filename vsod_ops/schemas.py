"""The torch ops of an op: its schemas, and what Python registers for them.

Schemas stand in <op>/schemas.inc.  The compiled CPU module defines them when it loads, so that a
saved program finds them without Python; where it is absent, they are defined here.

Each op has an overload ``unnamed`` for calls that name no backend.  On a CPU its kernel is in the
compiled module, and no step in Python lies between a call and it.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from . import backends


def library(op: str) -> torch.library.Library:
    """A library for registrations of `op`, whose schemas are defined.

    Raises ImportError where the compiled module lacks some of them.
    """
    lib = torch.library.Library("vsod_ops", "FRAGMENT")
    backends.compiled_module("_cpu")
    text = (Path(__file__).parent / op / "schemas.inc").read_text()
    text = text.removeprefix('R"(').rstrip().removesuffix(')"')  # the marks of C++
    schemas = [" ".join(schema.split()) for schema in text.split("\n\n")]
    if not hasattr(torch.ops.vsod_ops, op):
        for schema in schemas:
            lib.define(schema)
    for schema in schemas:
        name = schema[: schema.index("(")].partition(".")[0]
        if not hasattr(torch.ops.vsod_ops, name):
            path = backends.library_path("_cpu")
            raise ImportError(
                f"{path} lacks {name}: it was built from other sources than these; build it again "
                "(pip install -e .)"
            )
    return lib


def has_cpu_kernels() -> bool:
    """Whether a call on a CPU that names no backend is the compiled module's."""
    return not isinstance(backends.compiled_module("_cpu"), str)


def op(name: str) -> torch._ops.OpOverload:
    """The torch op "name" or "name.overload"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.vsod_ops, packet), overload or "default")


def register(
    lib: torch.library.Library,
    name: str,
    kernel: Callable,
    fake: Callable,
    vmap: Callable | None = None,
) -> None:
    """Register `kernel` for tensors of a device that no compiled kernel is registered for."""
    for key in ("CPU", "CUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vsod_ops::{name}", key):
            lib.impl(name, kernel, key)
    torch.library.register_fake(f"vsod_ops::{name}", fake, lib=lib)
    if vmap is not None:
        torch.library.register_vmap(f"vsod_ops::{name}", vmap, lib=lib)
