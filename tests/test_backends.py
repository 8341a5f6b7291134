"""The registry of backends, and those who ask it."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vsod_ops import (
    ConvLSTM,
    ShuntedAttention,
    backends,
    conv_lstm,
    dense_crf,
    doctor,
    shunted_attention,
)

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def all_built(monkeypatch):
    """As if both compiled modules were there."""
    monkeypatch.setattr(backends, "compiled_module", lambda name: None)
    monkeypatch.setattr(backends, "_triton_is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_op_is_registered_and_ends_with_its_reference():
    assert set(backends.registered()) == {"shunted_attention", "conv_lstm", "dense_crf"}
    for entries in backends.registered().values():
        names = [entry.name for entry in entries]
        assert set(names) <= set(backends.BACKENDS) and len(set(names)) == len(names)
        assert names[-1] == "reference" and not entries[-1].limits


def test_the_default_is_the_first_that_can_run(all_built):
    for op, entries in backends.registered().items():
        for device in ("cpu", "cuda"):
            for dtype in DTYPES:
                chosen = backends.choose(op, None, device, dtype)
                can = [e.name for e in entries if e.why_not(device, dtype) is None]
                assert chosen == can[0]
                for name in can:
                    assert backends.choose(op, name, device, dtype) == name
                for name in set(backends.BACKENDS) - set(can):
                    with pytest.raises(ValueError, match=f"{op}: backend '{name}' cannot run: "):
                        backends.choose(op, name, device, dtype)


def test_an_interpreted_kernel_runs_only_when_it_is_named(all_built, monkeypatch):
    monkeypatch.setattr(backends, "compiled_module", lambda name: "not here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("conv_lstm", None, "cpu", torch.float32) == "reference"
    assert backends.choose("conv_lstm", "triton", "cpu", torch.float32) == "triton"


def test_a_wide_conv_lstm_is_said_to_run_where_it_does(all_built):
    narrow = ConvLSTM(4, 32, 3).chosen_backends("cuda", torch.float32)
    wide = ConvLSTM(4, 33, 3).chosen_backends("cuda", torch.float32)
    two_ways = ConvLSTM(4, 32, 3, num_layers=2, bidirectional=True)
    assert narrow == {"cuda"} and wide == {"triton"}
    assert two_ways.chosen_backends("cuda", torch.float32) == {"cuda", "triton"}
    assert ShuntedAttention(8, 2).chosen_backends("cuda", torch.float32) == {"triton"}


def attention_call(dtype, *sizes):
    length, head_dim = sizes
    q, k = torch.randn(1, 2, length, head_dim, dtype=dtype), torch.randn(1, 2, 9, head_dim)
    return functools.partial(shunted_attention, q, [k.to(dtype)], [k.to(dtype)])


def conv_lstm_call(dtype, *sizes):
    channels, hidden, side = sizes
    x = torch.randn(1, 2, channels, side, side, dtype=dtype)
    weights = [torch.randn(4 * hidden, n, 3, 3).to(dtype) for n in (channels, hidden)]
    return lambda backend: conv_lstm(x, None, *weights, backend=backend)[0]


def dense_crf_call(dtype, *sizes):
    prob, image = torch.rand(1, *sizes), torch.rand(1, 3, *sizes) * 255
    return functools.partial(dense_crf, prob.to(dtype), image.byte())


CALLS = [
    *(("shunted_attention", attention_call, sizes) for sizes in ((3, 8), (70, 64), (0, 8))),
    *(("conv_lstm", conv_lstm_call, sizes) for sizes in ((3, 2, 8), (40, 33, 5), (3, 2, 0))),
    *(("dense_crf", dense_crf_call, sizes) for sizes in ((6, 7), (0, 7))),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "make", "sizes"), CALLS)
def test_a_call_that_names_no_backend_runs_what_the_registry_says(
    op, make, sizes, dtype, monkeypatch
):
    """The compiled module chooses by itself, without a step in Python."""
    call = make(dtype, *sizes)
    choice = backends.choose(op, None, "cpu", dtype)
    named = call(backend=choice)
    asked = []
    choose = backends.choose
    monkeypatch.setattr(
        backends, "choose", lambda *arguments: asked.append(choose(*arguments)) or asked[-1]
    )
    assert torch.equal(call(backend=None), named)
    assert asked == ([] if choice == "cpu" else [choice])


def test_layers_say_what_runs_them_on_this_machine():
    """What a layer says, and what its op's choice gives when it runs."""
    for layer, x in (
        (ConvLSTM(3, 2, 3, num_layers=2), torch.randn(1, 2, 3, 4, 4)),
        (ShuntedAttention(8, 2), torch.randn(1, 1, 4, 4, 8)),
    ):
        (said,) = layer.chosen_backends("cpu", torch.float32)
        unnamed = layer(x)
        for module in layer.modules():
            if hasattr(module, "backend"):
                module.backend = said
        torch.testing.assert_close(layer(x), unnamed, rtol=0, atol=0)


def test_doctor_names_the_limits_of_a_backend(all_built):
    entries = backends.registered()["conv_lstm"]
    lines = doctor._backend_lines(entries, "cuda", torch.float32)
    assert lines[0] == (
        "  cuda float32: cuda up to 32 input channels and up to 32 hidden channels, then triton"
    )
    assert lines[1:] == ["    not cpu: takes CPU tensors, not cuda ones"]


def test_the_table_in_the_documentation_is_the_registry():
    found = []
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        found += re.findall(
            r"<!-- backends:begin -->\n(.*?)<!-- backends:end -->", page.read_text(), re.DOTALL
        )
    assert [text.strip() for text in found] == [backends.table()], (
        "between the marks must stand what `python -m vsod_ops.doctor --table` prints"
    )


def test_a_module_that_does_not_load_warns_once():
    if "_cpu" in backends.build_report():
        pytest.skip("the CPU module is not built")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, json\n"
            "from vsod_ops import backends, dense_crf, shunted_attention\n"
            "q = torch.randn(1, 1, 2, 4)\n"
            "for _ in range(3): shunted_attention(q, [q], [q])\n"
            "dense_crf(torch.rand(1, 3, 3), torch.zeros(1, 3, 3, 3, dtype=torch.uint8))\n"
            "print(json.dumps(backends.choose('conv_lstm', None, 'cpu', torch.float32)))\n",
        ],
        env=os.environ | {"VSOD_OPS_SIMD": "typo", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "reference"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "VSOD_OPS_SIMD must be portable, avx2" in done.stderr


def test_a_name_that_no_backend_has_is_an_error():
    x = torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="backend must be None or one of"):
        conv_lstm(x, None, torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1), backend="metal")
