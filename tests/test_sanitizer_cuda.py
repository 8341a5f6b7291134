"""compute-sanitizer over the CUDA C++ kernels, on tests that run nothing else on the GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TESTS = [HERE / "test_conv_lstm_cuda.py", HERE / "test_dense_crf_cuda.py"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_kernels(tool):
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    command += ["--report-api-errors", "no", "--error-exitcode", "99"]
    command += ["--kernel-name", "kernel_substring=vsod", sys.executable]
    # A block of torch's own allocator would hide what is read beyond a tensor.
    options = dict(
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
    )
    probe = subprocess.run(
        [*command, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"], **options
    )
    if probe.returncode:
        pytest.skip(f"compute-sanitizer refuses: {(probe.stdout + probe.stderr).strip()[-300:]}")
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "phases_on_the_cpu", *TESTS]
    done = subprocess.run([*command, *tests], **options)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr
