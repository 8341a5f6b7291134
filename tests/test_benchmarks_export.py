"""The benchmark of exported files: what is written once, records and page."""

import json
import shutil

import pytest
import torch

pytest.importorskip("av", reason="the extra `models` is not installed")
pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
if shutil.which("c++") is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

from checks_benchmarks import assert_bad_input

from benchmarks import export
from benchmarks.__main__ import main
from vsod_models.networks.foreign import PerFrame


def run(folder, *options):
    options = ("--files", folder / "files", "--out", folder, "--seconds", "0.01", *options)
    assert main(["export", *map(str, options), "--threads", "1"]) == 0


def tiny():
    return PerFrame(torch.nn.Conv2d(3, 1, 1), "tiny", (8, 12))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "models", lambda: {"a tiny, one": tiny})
        run(folder, "--write")
        assert not (folder / "export.json").exists()
        files = {f: f.stat().st_mtime_ns for f in (folder / "files").iterdir()}
        run(folder)
    return folder, files


def test_records_and_page(measured):
    folder, _ = measured
    document = json.loads((folder / "export.json").read_text())
    (case,) = document["cases"]
    assert (case["model"], case["window"]) == ("a tiny, one", [1, 3, 8, 12])
    assert [row["way"] for row in case["rows"]] == list(export.WAYS)
    for row in case["rows"][1:]:
        assert row["off"] < 1e-5 and row["bytes"] > 100 and row["cpu_s"] > 0
    assert "| a tiny, one | 1 x 8 x 12 |" in export.markdown(document)
    assert (folder / "export.csv").read_text().count("\n") == 4


def test_files_that_are_there_are_not_written_again(measured):
    folder, before = measured
    assert len(before) == 4
    assert {f: f.stat().st_mtime_ns for f in (folder / "files").iterdir()} == before


def test_a_file_of_another_model_is_not_timed(measured, monkeypatch, capsys):
    folder, _ = measured
    other = tiny()
    torch.nn.init.constant_(other.network.weight, 3)
    monkeypatch.setattr(export, "models", lambda: {"a tiny, one": lambda: other})
    arguments = ["export", "--files", folder / "files", "--out", folder / "out", "--threads", "1"]
    assert_bad_input(capsys, arguments, "a tiny, one: differs by")
    assert_bad_input(capsys, ["export", "--match", "none"], "no model has 'none' in its name")
