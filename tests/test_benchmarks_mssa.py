"""The benchmark of MSSA on tiny frames: stages, arithmetic, what does not fit, bad input."""

import json

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("huggingface_hub", reason="the extra `models` is not installed")
pytest.importorskip("safetensors", reason="the extra `models` is not installed")

from checks_benchmarks import assert_bad_input

from benchmarks import measure, mssa
from benchmarks.__main__ import main
from vsod_ops import backends

pytestmark = pytest.mark.skipif(
    isinstance(backends.compiled_module("_cpu"), str), reason="no compiled backend to compare"
)

TINY = ["mssa", "--sizes", "32", "--frames", "2", "--width", "0.0625", "--seconds", "0.001"]
TINY += ["--threads", "1"]


def run(tmp_path, *options):
    assert main([*TINY, "--out", str(tmp_path), *options]) == 0
    return json.loads((tmp_path / "mssa.json").read_text())


def test_records_and_page(tmp_path, capsys):
    document = run(tmp_path / "results" / "machine", "--sizes", "48", "32")
    assert document["benchmark"] == "mssa" and document["backend"] == "cpu"
    assert set(document["check"]["off"]) == {"logits", "gradient"}
    assert [case["size"] for case in document["cases"]] == [32, 48]
    assert [case["tokens"] for case in document["cases"]] == [[32, 8], [72, 18]]
    for case in document["cases"]:
        stages = {row["stage"]: row for row in case["stages"]}
        assert len(stages) == len(case["stages"]) == 9
        assert all(row["median_s"] > 0 for row in stages.values())
        assert sum(row["share_of_macs"] for row in stages.values()) == pytest.approx(1)
        assert sum(row["share_of_time"] for row in stages.values()) == pytest.approx(1)
        assert [(r["direction"], r["backend"]) for r in case["rows"]] == [
            (d, b) for d in ("forward", "training") for b in ("cpu", "reference")
        ]
        whole = case["rows"][0]["median_s"]
        assert case["rows"][0]["repeats"] == 1  # so its laps lie within it
        assert sum(row["median_s"] for row in stages.values()) <= whole
    table = mssa.markdown(document)
    assert table in capsys.readouterr().out
    assert "| stride 16: attention op |" in table and "| training, 48x48 | 72 + 18 |" in table

    page = tmp_path / "page.md"
    page.write_text("<!-- results:mssa:begin -->\n<!-- results:mssa:end -->\n")
    assert main(["report", "--pages", str(page), "--results", str(tmp_path / "results")]) == 0
    assert table in page.read_text() and "(results/machine/mssa.csv)" in page.read_text()


def test_bfloat16_by_the_error_rule(tmp_path, capsys):
    document = run(tmp_path, "--precision", "bfloat16")
    check = document["check"]
    assert check["oracle"] == "float64"
    for name, value in check["off"].items():
        assert 2**-9 < value <= check["tolerances"][name] < 1  # half an ulp of bfloat16 at least
    (case,) = document["cases"]
    for row in case["rows"]:
        assert row["frames_per_second"] == pytest.approx(2 / row["median_s"])
    table = mssa.markdown(document)
    assert "of its channels, bfloat16:" in table and "off the reference in float64" in table
    assert "Frames a second: " in table


def test_laps_of_marks_that_are_read_later():
    """As a GPU's events, which must not be read before the forward is at its end."""
    import torch

    model, marks = mssa.build(mssa_arguments("--width", "0.0625")), []

    def mark():
        marks.append(len(marks))
        return marks[-1]

    done = False

    def between(begin, end):
        assert done and end == begin + 1
        return 1.0

    with torch.inference_mode(), mssa.laps(model, mark, between) as stages:
        for _ in range(2):
            model(torch.rand(1, 2, 3, 32, 32))
        done = True
    # What lies between two forwards is nobody's.
    assert stages["backbone"] == stages["decoder"] == 2 and sum(stages.values()) == len(marks) - 2


def test_multiply_adds_of_the_paper():
    """By hand, for the attention op and what surrounds it at stride 8 of a 224 x 224 clip."""
    counted = mssa.count(mssa_arguments(), 224)
    tokens, reduced, depth = 5 * 28 * 28, 3 * 14 * 14, 4
    heads, head_dim, dim = 2, 64, 256  # heads of one group
    assert counted.scores == heads * tokens**2
    assert counted.macs["stride 8: attention op"] == (
        depth * 2 * heads * tokens * (tokens + reduced) * head_dim
    )
    assert counted.macs["stride 8: feed-forward"] == depth * 2 * tokens * dim * 782
    projections = 2 * tokens * dim**2 + (tokens + reduced) * dim * dim  # q, out; k and v
    assert counted.macs["stride 8: projections"] == (
        depth * (projections + reduced * 8 * dim**2)  # a 2 x 2 x 2 convolution
    )
    assert counted.macs["lift"] == (tokens + tokens // 4) * 512 * dim
    assert counted.op / counted.total == pytest.approx(0.1395, abs=1e-4)
    larger = mssa.count(mssa_arguments(), 448)
    assert larger.op > 15.9 * counted.op and larger.total < 6 * counted.total


def mssa_arguments(*options):
    import argparse

    parser = argparse.ArgumentParser()
    mssa.add_arguments(parser)
    return parser.parse_args(options)


def test_a_reference_that_does_not_fit_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    monkeypatch.setattr(measure, "MIN_REPEATS", 2)
    monkeypatch.setattr(measure, "MAX_REPEATS", 3)
    document = run(tmp_path, "--no-backward", "--seconds", "600")
    (case,) = document["cases"]
    ours, reference = case["rows"]
    assert ours["median_s"] > 0 and ours["repeats"] == 3 and "median_s" not in reference
    assert reference["needed_bytes"] == 2 * 4 * 2 * 32 * 32  # two matrices of 2 heads, 32 tokens
    assert reference["free_bytes"] == 1000
    assert "does not fit |  | " in mssa.markdown(document)


@pytest.mark.parametrize("direction", ["forward", "training"])
def test_backends_that_differ_are_not_timed(direction, tmp_path, capsys, monkeypatch):
    call = getattr(mssa.Network, direction)

    def off(self, backend):
        result = call(self, backend)
        factor = 1.01 if backend == "reference" else 1
        return result * factor if direction == "forward" else [g * factor for g in result]

    monkeypatch.setattr(mssa.Network, direction, off)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--sizes", "8"],
        ["--sizes", "big"],
        ["--frames", "0"],
        ["--width", "0"],
        ["--seconds", "0"],
        ["--threads", "0"],
    ],
)
def test_bad_input(options, capsys):
    assert_bad_input(capsys, [*TINY, *options])
