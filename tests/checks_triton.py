"""The Triton kernels: where their tests run, the interpreter, compiling for GPUs without one.

Kernel tests run on CUDA tensors where there is a GPU, and on CPU tensors under TRITON_INTERPRET=1,
which must be set before triton is first imported: `run_in_the_interpreter` runs a test file once
more in a process of its own that has it.  Compile tests need no GPU.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from checks import needs_gpu, run_tests_again

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
NUMPY = tuple(int(x) for x in numpy.__version__.split(".")[:2])

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes that a program may have
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

compiled_only = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
_needs_device = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRET, reason="no GPU, and not in the interpreter"
)


def on_device(test):
    """On a GPU, where `-m cuda` selects it, or in the interpreter."""
    return pytest.mark.cuda(_needs_device(test))


def on_gpu(test):
    """On a GPU alone."""
    for mark in (*needs_gpu, compiled_only):
        test = mark(test)
    return test


def run_in_the_interpreter(file, *options, at_least):
    if TRITON < (3, 7) and NUMPY >= (2, 4):
        pytest.skip("this interpreter fails with numpy 2.4")
    run_tests_again(file, *options, at_least=at_least, TRITON_INTERPRET="1")


def compile_for(kernel, capability, signature, constants, *, warps, stages, attributes=None):
    """`kernel` for an architecture (80, 90, 100), with the options of a launch.

    signature: name -> Triton's name of the type, for arguments that are not in `constants`.
    constants: values by name or, inside a tuple, by path.
    """
    kinds = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    positions = {
        (kernel.arg_names.index(key),) if isinstance(key, str) else key: value
        for key, value in constants.items()
    }
    return triton.compile(
        ASTSource(kernel, kinds, positions, attributes or {}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def figures(compiled):
    """(registers, bytes of stack and local memory, shared memory, tensor core instructions)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout + usage.stderr)
    products = set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"]))
    registers, stack, local = (int(x) for x in match.groups())
    return registers, stack + local, compiled.metadata.shared, products


@contextlib.contextmanager
def compilations(function, cases):
    """case -> function(*case), in two processes at once, all begun when the first is asked for."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:

        @functools.cache
        def begin():
            return {case: pool.submit(function, *case) for case in cases}

        yield lambda case: begin()[case].result()


@contextlib.contextmanager
def recorded_launches(capability=90):
    """Inside, Triton kernels are not run: a list of (kernel, what it would be compiled for)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Device:
        def get_current_device(self):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    launches = []

    def launcher(kernel, grid):
        def launch(*arguments, **named):
            binder = kernel.create_binder()[-1]
            _, specialization, _ = binder(*arguments, **named, debug=False)
            launches.append(
                (kernel.__name__, dict(zip(kernel.arg_names, specialization, strict=True)))
            )

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", launcher)
        patch.setattr(driver, "_active", Device())
        yield launches
