"""The benchmark of small calls: its cases, records and page."""

import json

import pytest
import torch

from benchmarks import small
from benchmarks.__main__ import main


def run(tmp_path, *options, code=0):
    arguments = ["small", "--threads", "1", "--seconds", "0.001", "--out", str(tmp_path), *options]
    assert main(arguments) == code
    return json.loads((tmp_path / "small.json").read_text())


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--section", "overhead"), 2),
        (("--section", "attention", "--match", "8 x 32, B=1, forward + backward, 245"), 2),
        (("--section", "layer", "--match", "C=64, 245"), 2),
        (("--section", "conv_lstm", "--match", "8x8, B=1, forward, 16"), 1),
    ],
)
def test_records_and_page(tmp_path, options, count):
    threads = torch.get_num_threads()
    document = run(tmp_path, *options)
    assert torch.get_num_threads() == threads
    assert len(document["cases"]) == count and not document["left_out"]
    for row in document["cases"]:
        assert row["threads"] == 1 and 0 < row["lowest"] <= row["ratio"] <= row["highest"]
        assert row["met"] == (None if row["bar"] is None else row["ratio"] >= row["bar"])
    page = small.markdown(document)
    assert all(f"| {row['row']} |" in page for row in document["cases"])


def test_sections_of_one_commit_come_together(tmp_path):
    run(tmp_path, "--section", "overhead")
    document = run(tmp_path, "--section", "layer", "--match", "C=64, 100")
    sections = [row["section"] for row in document["cases"]]
    assert sections == ["overhead"] * 2 + ["layer"] * 2
    (tmp_path / "small.json").write_text(json.dumps(document | {"commit": None}))
    document = run(tmp_path, "--section", "overhead")
    assert len(document["cases"]) == 2


def test_every_case_has_a_place_of_its_own():
    cases = [case for section in small.SECTIONS.values() for case in section()]
    assert len({(case.section, case.row, case.column) for case in cases}) == len(cases)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    wrong = torch.zeros(1, small.STEPS, 16, 8, 8)
    monkeypatch.setattr(small, "lstm_call", lambda inputs, direction: lambda: [wrong])
    document = run(tmp_path, "--match", "8x8, B=1, forward, 16", code=1)
    assert document["cases"] == []
    assert ["conv_lstm: relative error" in why for why in document["left_out"].values()] == [True]
