"""The compiled modules as plain libraries: ops for a program that has no vsod_ops, or no Python."""

import shutil
import subprocess
import sys

import pytest
import torch
from checks import needs_cpu

from vsod_ops import backends, schemas

RAW = torch.ops.vsod_ops
NONE = None, None


def built(name):
    path = backends.library_path(name)
    return pytest.param(
        path, id=name, marks=pytest.mark.skipif(not path.exists(), reason=f"{name} is not built")
    )


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm, which lists symbols")
@pytest.mark.parametrize("library", [built("_cpu"), built("_cuda")])
def test_nothing_of_python_is_in_a_module(library):
    command = ["nm", "--dynamic", "--format=posix", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert any(name.startswith("torch_library_impl") for name in names)
    assert not [name for name in names if name.startswith(("Py", "_Py")) or "pybind11" in name]


def test_a_module_of_other_sources_says_so(tmp_path, monkeypatch):
    (tmp_path / "dense_crf").mkdir()
    (tmp_path / "dense_crf" / "schemas.inc").write_text(
        'R"(\nof_tomorrow_cpu.out(\n  Tensor x) -> Tensor\n)"'
    )
    monkeypatch.setattr(schemas, "__file__", str(tmp_path / "schemas.py"))
    with pytest.raises(ImportError, match=r"lacks of_tomorrow_cpu: .* build it again"):
        schemas.library("dense_crf")


@needs_cpu
def test_the_ops_are_there_without_the_package():
    code = f"""
import sys, torch
torch.ops.load_library({str(backends.library_path("_cpu"))!r})
ops = torch.ops.vsod_ops
q = torch.randn(1, 2, 6, 8)
keys = [torch.randn(1, 1, n, 8) for n in (5, 3)]
out, lse = ops.shunted_attention(q, keys, keys, None)
assert out.shape == q.shape
ops.shunted_attention_backward(out, q, keys, keys, out, lse, None, True, [True] * 2, [True] * 2)
x, weights = torch.randn(1, 3, 3, 4, 5), (torch.randn(8, 3, 3, 3), torch.randn(8, 2, 3, 3))
kept = ops.conv_lstm(x, None, None, *weights, None, None, 1, 2)
needs = [True, False, False, True, True, False, False]
arguments = x, None, None, *weights, None, None, *kept, 1, needs
ops.conv_lstm_backward(kept[0], None, *arguments)
image = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
ops.dense_crf(torch.rand(1, 4, 5), image, 2, 3.0, 3.0, 60.0, 5.0, 5.0)
assert "vsod_ops" not in sys.modules
import vsod_ops
assert torch.equal(vsod_ops.shunted_attention(q, keys, keys), out)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def attention(dtype, **options):
    q, k, v = (torch.randn(1, 2, n, 4, dtype=dtype, **options) for n in (3, 5, 5))
    return RAW.shunted_attention.unnamed, (q, [k], [v], 0.3)


def attention_backward(dtype):
    op, arguments = attention(dtype)
    out, lse = op(*arguments)
    rest = *arguments[:3], out, lse, None, True, [True], [False]
    return RAW.shunted_attention_backward.unnamed, (torch.randn_like(out), *rest)


def conv_lstm(dtype, **options):
    shapes = (1, 2, 3, 4, 5), (8, 3, 3, 3), (8, 2, 3, 3)
    x, weight_ih, weight_hh = (torch.randn(shape, dtype=dtype, **options) for shape in shapes)
    return RAW.conv_lstm.unnamed, (x.mT, *NONE, weight_ih.mT, weight_hh, *NONE, 1, 2)


def conv_lstm_backward(dtype):
    op, arguments = conv_lstm(dtype)
    kept = op(*arguments)
    needs = [True, False, False, True, True, False, False]
    grads = torch.randn_like(kept[0]), None
    return RAW.conv_lstm_backward.unnamed, (*grads, *arguments[:7], *kept, 1, needs)


def dense_crf(dtype):
    prob, image = torch.rand(1, 5, 4).to(dtype), torch.rand(1, 3, 4, 5) * 255
    return RAW.dense_crf.unnamed, (prob.mT, image, 2, 3.0, 3.0, 60.0, 5.0, 5.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    "make", (attention, attention_backward, conv_lstm, conv_lstm_backward, dense_crf)
)
def test_opcheck_of_a_call_that_names_no_backend(make, dtype):
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.library.opcheck(*make(dtype), **tolerances)


@pytest.mark.parametrize("make", (attention, conv_lstm))
def test_opcheck_with_gradients(make):
    torch.library.opcheck(*make(torch.float32, requires_grad=True))
