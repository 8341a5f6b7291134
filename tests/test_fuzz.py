"""Random calls in processes of their own: none may crash one, or give a wrong result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vsod_ops import backends

ROOT = Path(__file__).parent.parent
CALLS = int(os.environ.get("VSOD_FUZZ_CALLS", "5000"))  # all processes together
SEED = int(os.environ.get("VSOD_FUZZ_SEED", "0"))

pytestmark = pytest.mark.skipif(
    isinstance(backends.compiled_module("_cpu"), str), reason="needs the compiled CPU module"
)


@pytest.mark.parametrize(
    ("share", "guard"), [(0.4, False), (0.4, False), (0.2, True)], ids=["first", "second", "guard"]
)
def test_random_calls(share, guard, request):
    seed = 3 * SEED + ["first", "second", "guard"].index(request.node.callspec.id)
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--calls", str(int(share * CALLS))]
    command += ["--seed", str(seed)] + ["--guard"] * guard
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "165"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    where = done.stdout.split("\r")[-1]
    assert done.returncode == 0, f"seed {seed}, {where}, exit {done.returncode}\n{done.stderr}"


NAMED = """
import torch
from vsod_ops import backends

assert not isinstance(backends.compiled_module("_cpu"), str)
RAW = torch.ops.vsod_ops
q = torch.randn(1, 2, 7, 8)
out, lse = RAW.shunted_attention_cpu(q, [q], [q], 0.3)
backward = RAW.shunted_attention_backward_cpu
x, w = torch.randn(1, 2, 1, 5, 5), torch.randn(4, 1, 3, 3)
kept = RAW.conv_lstm_cpu(x, None, None, w, w, None, None, 1, 1)
none = None, None
prob, image = torch.rand(1, 9, 9), torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
numbers = 3.0, 3.0, 60.0, 5.0, 5.0
needs = [True] * 7
WRONG = [
    lambda: backward(out, q, [q], [q], q, lse, 1.0, True, [], []),
    lambda: backward(out, q, [q], [q], q, lse, 1.0, True, [True], [True, True]),
    lambda: backward(out, q, [q], [q], q, lse[..., :3], 1.0, True, [True], [True]),
    lambda: backward(out, q, [q], [q], q, lse.bfloat16(), 1.0, True, [True], [True]),
    lambda: backward(out, q, [q], [q], q, lse.mT.contiguous().mT, 1.0, True, [True], [True]),
    lambda: RAW.shunted_attention_cpu(q, [q], [q[..., :3]], 0.3),
    lambda: RAW.shunted_attention_cpu(q.long(), [q.long()], [q.long()], 0.3),
    lambda: RAW.conv_lstm_activate_cpu(torch.randn(35).bfloat16()),
    lambda: RAW.conv_lstm_activate_cpu(torch.randn(35, 2)[:, 0]),
    lambda: RAW.conv_lstm_cpu(x, *none, w, w, *none, 0, 1),
    lambda: RAW.conv_lstm_cpu(x, *none, w, w, *none, 1, 3),
    lambda: RAW.conv_lstm_cpu(x, *none, w, w.mT, *none, 1, 1),
    lambda: RAW.conv_lstm_cpu(x, *none, w[:, :, :2], w, *none, 1, 1),
    lambda: RAW.conv_lstm_backward_cpu(*none, x, *none, w, w, *none, *kept, 1, needs[:6]),
    lambda: RAW.conv_lstm_backward_cpu(x[:, :1], None, x, *none, w, w, *none, *kept, 1, needs),
    lambda: RAW.conv_lstm_cuda_on_host(x, *none, w, w, *none, 1, 7, False),
    lambda: RAW.dense_crf_cpu(prob, image, 2**40, *numbers, 0),
    lambda: RAW.dense_crf_cpu(prob, image, 5, *numbers, -1),
    lambda: RAW.dense_crf_cpu(prob, image, 5, *numbers, 2**62),
    lambda: RAW.dense_crf_cpu(prob, image.long(), 5, *numbers, 0),
    lambda: RAW.dense_crf_cpu(prob, image, 5, float("nan"), *numbers[1:], 0),
    lambda: RAW.dense_crf_cpu(prob, image, 5, -3.0, *numbers[1:], 0),
    lambda: RAW.dense_crf_cuda_on_host(prob, image, 5, *numbers, -1, False),
]
for i, call in enumerate(WRONG):
    print("call", i, flush=True)
    try:
        call()
    except RuntimeError as error:
        names = "shunted_attention: ", "conv_lstm: ", "conv_lstm_activate: ", "dense_crf: "
        assert any(name in str(error) for name in names), str(error)
    else:
        raise SystemExit(f"call {i} gave a result")
"""


def test_raw_ops_check_what_they_get():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NAMED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
