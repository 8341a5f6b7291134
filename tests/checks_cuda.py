"""The CUDA C++ kernels: where their tests run, and what nvcc made of a kernel."""

import re
import subprocess
from pathlib import Path

import pytest
from checks import needs_gpu

from vsod_ops.backends import compiled_module, library_path

CUDA_MODULE = compiled_module("_cuda")  # or, as text, why there is none
needs_cuda_module = pytest.mark.skipif(
    isinstance(CUDA_MODULE, str), reason=f"no CUDA module: {CUDA_MODULE}"
)


def on_gpu(test):
    """Run on a GPU by the compiled module; `-m cuda` selects it."""
    for mark in (*needs_gpu, needs_cuda_module):
        test = mark(test)
    return test


def cuda_objdump(*options, check=True):
    """What cuobjdump, which Triton's package carries, prints of the CUDA module."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton carries no cuobjdump")
    command = [tool, *options, library_path("_cuda")]
    return subprocess.run(command, capture_output=True, text=True, check=check).stdout


def assert_no_spills(kernel, *, kernels, registers):
    """No kernel whose name contains `kernel` has a stack, in any architecture of the build; there
    are at least so many `kernels` an architecture, and each has at most so many `registers`."""
    usage = re.findall(
        rf"Function (\S*{kernel}\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        cuda_objdump("-res-usage"),
    )
    architectures = set(re.findall(r"sm_\d+", CUDA_MODULE.build_info()["architectures"]))
    assert len(usage) >= kernels * len(architectures)
    for name, used, stack, local in usage:
        assert int(stack) == 0 and int(local) == 0, f"{name} has a stack: it spills"
        assert int(used) <= registers, name
