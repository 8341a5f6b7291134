"""The benchmark of conv_lstm on tiny frames, and what it does on a GPU with a CPU in its place."""

import json

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")

import torch

from benchmarks import conv_lstm, measure
from benchmarks.__main__ import main

TINY = ["conv_lstm", "--shape", "1x2x2x3x8x9", "--baselines", "eager", "--seconds", "0.001"]
TINY += ["--threads", "1", "--device", "cpu"]
DIRECTIONS = {"forward", "forward + backward"}


def run(tmp_path, *options, code=0):
    assert main([*TINY, "--out", str(tmp_path), *options]) == code
    return json.loads((tmp_path / "conv_lstm.json").read_text())


def test_records(tmp_path):
    document = run(tmp_path, "--dtype", "float32", "--dtype", "bfloat16")
    assert [case["dtype"] for case in document["cases"]] == ["float32", "bfloat16"]
    assert set(document["peak"]) == {"float32", "bfloat16"}
    for case in document["cases"]:
        assert case["left_out"] == {}
        ours = [r for r in case["rows"] if r["rival"] == "ours" and r["direction"] != "backward"]
        assert {(row["direction"], row["memory"]) for row in ours} == {
            (direction, memory) for direction in DIRECTIONS for memory in ("reused", "fresh")
        }
        assert all(row["median_s"] > 0 and "mode" not in row for row in ours)
    assert conv_lstm.markdown(document).count("\n| 2 -> 3, 8x9") == 4


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """As called and in graphs of three copies, which a CPU runs one after another."""
    graphs = []

    def graph(calls):
        graphs.append(len(calls))
        return measure.one_after_another(calls)

    ways = (measure.AS_CALLED, measure.IN_GRAPH)
    monkeypatch.setattr(conv_lstm, "ways_on", lambda device: ways)
    monkeypatch.setattr(measure, "copies_past_cache", lambda size, device: 3)
    monkeypatch.setattr(measure, "cuda_graph", graph)
    return graphs


def test_on_a_gpu(tmp_path, as_on_a_gpu):
    document = run(tmp_path)
    (case,) = document["cases"]
    measured = [row for row in case["rows"] if row["direction"] != "backward"]
    assert {(row["rival"], row["direction"], row["mode"]) for row in measured} == {
        (rival, direction, mode)
        for rival in ("ours", "ours-recompute", "eager", "convolutions, contiguous_format",
                      "convolutions, channels_last")
        for direction in DIRECTIONS for mode in ("as called", "CUDA graph")
    }  # fmt: skip
    assert sorted(as_on_a_gpu) == [1] * 4 + [3] * 6
    table = conv_lstm.markdown(document)
    assert "| forward + backward, CUDA graph |" in table and "| forward, as called |" in table


def test_a_call_that_no_graph_takes_is_named(tmp_path, as_on_a_gpu, monkeypatch):
    def refuse(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(measure, "cuda_graph", refuse)
    document = run(tmp_path, code=1)  # ours is among them
    (case,) = document["cases"]
    assert {row["mode"] for row in case["rows"]} == {"as called"}
    assert "not permitted" in case["left_out"]["eager, forward, CUDA graph"]


def test_cases_by_default():
    """Shapes are (B, T, C, M, H, W); on a GPU those of the field, in the dtypes used there."""
    import argparse

    parser = argparse.ArgumentParser()
    conv_lstm.add_arguments(parser)
    on_gpu = conv_lstm.cases_of(parser.parse_args([]), torch.device("cuda"))
    assert [case.label for case in on_gpu[::3]] == [
        "4 -> 4, 512x512, B=4, T=4, bfloat16",
        "64 -> 64, 64x64, B=16, T=10, bfloat16",
        "4 -> 16, 512x512, B=4, T=4, float32",
    ]
    assert len(on_gpu) == 8
    on_cpu = conv_lstm.cases_of(parser.parse_args([]), torch.device("cpu"))
    assert [case.shape for case in on_cpu] == list(conv_lstm.FIELD)
    asked = parser.parse_args(["--dtype", "float16"])
    assert {c.dtype for c in conv_lstm.cases_of(asked, torch.device("cuda"))} == {torch.float16}
