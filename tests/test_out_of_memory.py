"""Where there is no memory an op raises, with its name and the bytes; it never aborts.

Each case runs in a process of its own, whose address space is limited to what it has and a little
more, a little more each time, until the call succeeds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vsod_ops import backends

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits an address space as Linux does"),
    pytest.mark.skipif(
        isinstance(backends.compiled_module("_cpu"), str), reason="needs the compiled CPU module"
    ),
]

PROGRAM = """
import re, resource, sys
import torch
from vsod_ops import backends

if isinstance(module := backends.compiled_module("_cpu"), str):
    raise SystemExit(module)
RAW = torch.ops.vsod_ops
torch.manual_seed(0)
torch.set_num_threads(2)


def attention(n, dtype):
    q, k, v = (torch.randn(1, 4, n, 64).to(dtype) for _ in range(3))
    return q, [k[:, :2], k[:, 2:, : n // 2]], [v[:, :2], v[:, 2:, : n // 2]], 0.125


def conv_lstm(n, dtype):
    x = torch.randn(1, 2, 24, n, n).to(dtype)
    weights = [torch.randn(4 * 24, 24, 3, 3).to(dtype) for _ in range(2)]
    return x, None, None, *weights, None, None, 1


def dense_crf(n, dtype):
    image = (torch.rand(2, 3, n, n) * 255).byte()
    return torch.rand(2, n, n), image, 2, 3.0, 3.0, 60.0, 5.0, 5.0, 0


def case(op, n, dtype):
    if op == "shunted_attention":
        arguments = attention(n, dtype)
        return lambda: RAW.shunted_attention_cpu(*arguments)
    if op == "shunted_attention_backward":
        q, keys, values, scale = attention(n, dtype)
        out, lse = RAW.shunted_attention_cpu(q, keys, values, scale)
        needs = True, [True] * 2, [True] * 2
        return lambda: RAW.shunted_attention_backward_cpu(
            out, q, keys, values, out, lse, scale, *needs
        )
    if op == "conv_lstm":
        arguments = conv_lstm(n, dtype)
        return lambda: RAW.conv_lstm_cpu(*arguments, 1)
    if op == "conv_lstm_backward":
        *tensors, dilation = conv_lstm(n, dtype)
        kept = RAW.conv_lstm_cpu(*tensors, dilation, 1)
        return lambda: RAW.conv_lstm_backward_cpu(
            kept[0], None, *tensors, *kept, dilation, [True] * 7
        )
    arguments = dense_crf(n, dtype)
    return lambda: RAW.dense_crf_cpu(*arguments)


def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


op, dtype = sys.argv[1], getattr(torch, sys.argv[2])
case(op, 8, dtype)()  # threads, and what a first call sets up
call = case(op, int(sys.argv[3]), dtype)
expected = None
message = re.compile(rf"{op.removesuffix('_backward')}: cannot allocate [1-9][0-9]* bytes")
errors = 0
more = 0
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
while True:
    resource.setrlimit(resource.RLIMIT_AS, (size() + more, hard))
    try:
        result = call()
        break
    except RuntimeError as error:
        if not message.search(str(error)):
            raise
        errors += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    more = max(1 << 16, more * 5 // 4)
    if more > 1 << 32:
        raise SystemExit("never enough memory")


def flat(x):
    return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in flat(part)]


if not all(map(torch.equal, flat(result), flat(call()))):
    raise SystemExit("another result than without a limit")
print(errors)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "size"),
    [
        ("shunted_attention", 700),
        ("shunted_attention_backward", 700),
        ("conv_lstm", 96),
        ("conv_lstm_backward", 96),
        ("dense_crf", 200),
    ],
)
def test_a_limited_address_space_is_an_error(op, size, dtype):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, op, dtype, str(size)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3  # the limit was met on several allocations


DILATION = """
import resource
import torch
import vsod_ops

CASES = (
    *((4, 4, 3, d) for d in (3, 4, 5, 10**4, 10**5, 2**31, 2**40, 2**60, 2**62, 2**63 - 1)),
    *((2, 70, 3, d) for d in (1, 2, 69, 70, 2**62)),
    *((70, 2, 3, d) for d in (1, 2, 35, 36, 69, 70)),
    *((1, 1, k, d) for k in (1, 5) for d in (1, 2**62)),
    *((3, 40, 9, d) for d in (1, 2, 10, 2**61)),
    *((40, 3, 9, d) for d in (1, 5, 2**61)),
    (2, 2, 65, 1),
)


def gradients(x, weights, dilation, backend, dtype=torch.float32):
    x, *weights = (t.to(dtype).requires_grad_() for t in (x, *weights))
    out, (_, c) = vsod_ops.conv_lstm(x, None, *weights, dilation=dilation, backend=backend)
    return out, c, *torch.autograd.grad(out.sum() + c.sum(), (x, *weights))


hard = resource.getrlimit(resource.RLIMIT_AS)[1]
for case in CASES:
    height, width, kernel, dilation = case
    print(case, flush=True)
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, height, width)
    # Sums of gates near one: of larger ones, two ways to add up differ by more than is allowed.
    weights = [(7 * kernel**2) ** -0.5 * torch.randn(16, n, kernel, kernel) for n in (3, 4)]
    near = min(dilation, height + width)  # so far away every tap but the middle one is outside
    expected = gradients(x, weights, near, "reference", torch.float64)
    gradients(x, weights, 1, "cpu")
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), hard))
    actual = gradients(x, weights, dilation, "cpu")
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
"""


def test_taps_outside_of_the_map_cost_nothing():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", DILATION], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
