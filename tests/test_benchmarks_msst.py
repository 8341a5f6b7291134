"""The benchmark of MSST on tiny frames: stages, the two ways through a video, bad input."""

import json

import pytest

pytest.importorskip("rich", reason="the extra `bench` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("huggingface_hub", reason="the extra `models` is not installed")

import torch
from checks_benchmarks import assert_bad_input

from benchmarks import msst
from benchmarks.__main__ import main
from vsod_models.networks.msst import MSST

TINY = ["msst", "--size", "48x40", "--width", "0.0625", "--seconds", "0.01", "--threads", "1"]


@pytest.mark.parametrize("options", [[], ["--prior", "flow-magnitude", "--full-resolution"]])
def test_records(tmp_path, capsys, options):
    assert main([*TINY, "--out", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "msst.json").read_text())
    assert document["benchmark"] == "msst" and document["paper"]["window_s"] == 2.9
    (case,) = document["cases"]
    measured = {row["what"]: row["median_s"] for row in case["rows"]}
    assert {*msst.STAGES, *msst.WAYS, msst.NETWORK_AND_CRF} <= set(measured)
    assert all(seconds > 0 for seconds in measured.values())
    share = (measured["ConvLSTM"] + measured["CRF"]) / sum(measured[s] for s in msst.STAGES)
    assert case["conv_lstm_and_crf_share"] == pytest.approx(share)
    for name, streaming in (
        ("window by window", "streaming"),
        ("window by window, priors kept", "streaming"),
        ("network alone, window by window", "network alone, streaming"),
    ):
        speedup = measured[name] / measured[streaming]
        assert case["streaming_speedup"][name] == pytest.approx(speedup)
    table = msst.markdown(document)
    assert table in out and table.count("\n| flow |") == 1 and "TITAN X, 2018" in table
    assert (tmp_path / "msst.csv").read_text().count("\n") == len(case["rows"]) + 1


def test_two_ways_that_differ_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        msst.Pipeline, "streamed", lambda self, carried: self.window() + torch.tensor(0.1)
    )
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_for_the_networks(tmp_path, capsys, monkeypatch):
    seen = {}
    for stage in ("spatial", "recur", "fuse"):
        of = msst.Pipeline if stage == "spatial" else MSST
        call = getattr(of, stage)

        def note(self, *arguments, stage=stage, call=call):
            seen[stage] = torch.is_autocast_enabled("cpu")
            return call(self, *arguments)

        monkeypatch.setattr(of, stage, note)
    refine = msst.dense_crf

    def crf(*arguments):
        seen["CRF"] = torch.is_autocast_enabled("cpu")
        return refine(*arguments)

    monkeypatch.setattr(msst, "dense_crf", crf)
    options = [*TINY, "--precision", "bfloat16", "--prior", "flow-magnitude"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert seen == {"spatial": True, "recur": True, "fuse": True, "CRF": False}
    assert "Backbone vgg16, bfloat16, prior" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--frames", "1"],
        ["--width", "0"],
        ["--backbone", "mobilenet_v2", "--width", "0.5"],
        ["--seconds", "0"],
        ["--size", "0x9"],
        ["--threads", "0"],
    ],
)
def test_bad_input(options, capsys):
    assert_bad_input(capsys, [*TINY, *options])
