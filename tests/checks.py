"""What all tests share: the error rule, where tests can run, processes and threads of their own."""

import contextlib
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from vsod_ops.backends import compiled_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_DTYPES = DTYPES[:3]

CPU_MODULE = compiled_module("_cpu")  # or, as text, why there is none
needs_cpu = pytest.mark.skipif(isinstance(CPU_MODULE, str), reason=f"no CPU module: {CPU_MODULE}")
needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]


def assert_error_bound(name, actual, eager, oracle, dtype):
    """err(actual) <= 2 * (err(eager) + eps * max|oracle|), the largest absolute error counting."""
    actual, eager, oracle = (x.detach().double().cpu() for x in (actual, eager, oracle))
    assert actual.shape == oracle.shape, name
    if oracle.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name} is not finite everywhere"
    error = (actual - oracle).abs().max().item()
    bound = (eager - oracle).abs().max().item()
    bound = 2 * (bound + torch.finfo(dtype).eps * oracle.abs().max().item())
    assert error <= bound, f"{name}: error {error:.3e} above the bound {bound:.3e}"


@contextlib.contextmanager
def nan_filled_memory():
    """Inside, torch.empty and its kin give memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def picker(seed):
    """A function that picks one of its options at random, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda options: options[int(torch.randint(len(options), (), generator=generator))]


def assert_two_threads_agree(call, cases, repeats=20):
    """`call` of each of two cases, many times in two threads at once, gives the same bits."""
    expected = [call(case) for case in cases]
    failures = []

    def work(case, wanted):
        for _ in range(repeats):
            if not torch.equal(call(case), wanted):
                failures.append(case)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def run_tests_again(file, *options, at_least=1, **environment):
    """Run a test file once more in a process that has other environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file, *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout + done.stderr
    assert int(passed[1]) >= at_least, done.stdout


def run_tests_at_level(level, file, *options):
    """Run a test file once more at a lower SIMD level, which a process chooses only once."""
    if os.environ.get("VSOD_OPS_SIMD"):
        pytest.skip("a level is forced already")
    levels = ["portable", "avx2", "avx512", "avx512bf16"]
    best = CPU_MODULE.build_info()["level"]
    if levels.index(level) >= levels.index(best):
        pytest.skip(f"this CPU's level is {best}")
    run_tests_again(file, *options, VSOD_OPS_SIMD=level)


# ---- the two systems


def system_results(model, loss, *inputs):
    """name -> tensor on the CPU: logits in evaluation, then each gradient of loss(*outputs)."""
    inputs = [x.to(next(model.parameters())) for x in inputs]
    with torch.no_grad():
        logits = model.eval()(*inputs)
    outputs = model.train()(*inputs)
    loss(*(outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    return {"logits": logits.cpu()} | gradients


def assert_same_system(actual, expected, tolerance):
    """Each result within `tolerance` of its largest number and, for those that are 0 but for
    rounding (of a bias before a batch norm), of a thousandth of the largest of all."""
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():
        off = (actual[name] - x).abs().max().item()
        bound = tolerance * (x.abs().max().item() + 1e-3 * largest)
        assert off <= bound, f"{name}: off by {off:.2e}, above {bound:.2e}"


@contextlib.contextmanager
def exact_float32():
    """Inside, cuDNN does not compute float32 in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def full_disk(size):
    """No file of this process can grow beyond `size` bytes, the one that pytest prints to neither:
    around the call that is tested, and nothing else."""
    resource = pytest.importorskip("resource", reason="no limits on files here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
