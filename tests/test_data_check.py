"""`vsod data check`, `prepare` and `synthetic`."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from trees import davis, fbms, image, mask, segtrack, square, text  # noqa: E402

from vsod_models import cli  # noqa: E402
from vsod_models.data import open_dataset, prepare  # noqa: E402
from vsod_models.data.check import check  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `vsod data ...`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", *map(str, arguments)])
    return (stop.value.code or 0, *capsys.readouterr())


def snapshot(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ---- check


def test_check_counts(tmp_path):
    root = davis(tmp_path)
    mask(root / "Annotations/480p/bike/00001.png", np.zeros((12, 16), np.uint8))
    report = check("davis16", root, "train")
    assert (report.sequences, report.frames, report.masks) == (2, 5, 5)
    assert report.problems == []
    assert report.warnings[0] == "davis16 train: 2 sequences, officially 30"
    assert len(report.warnings) == 3
    assert report.notes == [f"{root}/Annotations/480p/bike/00001.png: the mask is empty"]


def test_check_reports_every_problem_with_its_file(tmp_path):
    root = davis(tmp_path)
    noisy = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noisy).save(root / "JPEGImages/480p/bear/00000.jpg")
    truncate(root / "JPEGImages/480p/bear/00000.jpg")
    (root / "Annotations/480p/bear/00001.png").write_bytes(b"no picture")
    mask(root / "Annotations/480p/bear/00002.png", square(size=(12, 20)))
    (root / "Annotations/480p/bike/00000.png").unlink()
    (root / "JPEGImages/480p/bike/00001.jpg").unlink()
    before = snapshot(root)
    problems = "\n".join(check("davis16", root, "train").problems)
    for expected in (
        "bear/00000.jpg: not a readable picture",
        "bear/00001.png: not a readable picture",
        "bear/00002.png: the mask is 20x12, its frame 16x12",
        "bike/00000.jpg: a frame without its mask",
        "bike/00001.jpg: no such frame",
        "bike/00001.png: a mask without its frame",
    ):
        assert expected in problems
    assert snapshot(root) == before


def test_check_of_a_broken_structure_is_a_problem(tmp_path):
    report = check("davis16", tmp_path, "train")
    assert len(report.problems) == 1 and "no such folder" in report.problems[0]


def test_check_in_processes_finds_the_same(tmp_path):
    root = fbms(tmp_path)
    (root / "Testset/tennis/tennis456.jpg").write_bytes(b"")
    alone, together = (check("fbms59", root, "test", jobs=jobs) for jobs in (1, 2))
    assert alone == together and len(alone.problems) == 1
    assert "tennis456.jpg" in alone.problems[0]


def test_check_names_sequences_without_ground_truth(tmp_path):
    image(tmp_path / "a/Imgs/0.jpg")
    (tmp_path / "a/GT").mkdir()
    notes = check("repack", tmp_path, "test").notes
    assert notes == ["a: no frame of the sequence has ground truth"]


def test_check_command(tmp_path, capsys):
    root = davis(tmp_path)
    arguments = ("check", "davis16", root, "--split", "train", "--jobs", 1)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "davis16 train: 2 sequences, 5 frames, 5 masks" in out
    assert "warning: davis16 train: 5 frames, officially 2079" in out
    assert run(capsys, *arguments, "--strict")[0] == 1
    mask(root / "Annotations/480p/bear/00002.png", square(size=(12, 20)))
    code, out, _ = run(capsys, *arguments)
    assert code == 1 and "problem: " in out and "bear/00002.png" in out
    code, _, err = run(capsys, "check", "davis", root)
    assert code == 2 and err.startswith("vsod: dataset is 'davis'; it has to be one of davis16")


# ---- prepare


def test_prepare_keeps_jpeg_frames_and_writes_plain_masks(tmp_path):
    source, target = fbms(tmp_path / "source"), tmp_path / "target"
    before = snapshot(source)
    with pytest.raises(
        InputError, match=r"1 sequences, officially 29 \(partial=True accepts this\)"
    ):
        prepare.prepare("fbms59", source, target)
    assert not target.exists()
    prepare.prepare("fbms59", source, target, partial=True)
    assert snapshot(source) == before
    frame = "camel01/camel01_01.jpg"
    copied = target / "JPEGImages/480p" / frame
    assert copied.read_bytes() == (source / "Testset" / frame).read_bytes()
    for split, original in (("train", "train"), ("val", "test")):
        records = open_dataset("folder", target, split)
        expected = open_dataset("fbms59", source, original)
        assert [(r.sequence, r.name) for r in records] == [(r.sequence, r.name) for r in expected]
        for ours, theirs in zip(records, expected, strict=True):
            assert (ours.mask is None) == (theirs.mask is None)
            if ours.mask is not None:
                assert np.array_equal(ours.read_mask(), theirs.read_mask())
                assert set(np.unique(np.array(Image.open(ours.mask)))) <= {0, 255}


def test_prepare_encodes_other_frames_and_writes_official_lists(tmp_path):
    source, target = segtrack(tmp_path / "source"), tmp_path / "target"
    prepare.prepare("segtrackv2", source, target, partial=True)
    lines = (target / "ImageSets/480p/val.txt").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        "/JPEGImages/480p/bmx/bmx_00000.jpg /Annotations/480p/bmx/bmx_00000.png"
    )  # fmt: skip
    records = open_dataset("davis16", target, "val")
    assert list(records.sequences) == ["bmx", "frog", "worm"]
    assert abs(records[0].read_image().astype(int) - 90).max() <= 2


def test_prepare_stops_at_a_broken_file_and_leaves_nothing(tmp_path):
    source, target = davis(tmp_path / "source"), tmp_path / "out" / "target"
    truncate(source / "JPEGImages/480p/bike/00001.jpg")
    with pytest.raises(InputError, match=r"bike/00001\.jpg: not a readable picture"):
        prepare.prepare("davis16", source, target, ["train"], partial=True)
    assert not target.parent.exists()
    davis(source)
    mask(source / "Annotations/480p/bear/00002.png", square(size=(12, 20)))
    with pytest.raises(InputError, match=r"bear/00002\.png: the mask is 20x12"):
        prepare.prepare("davis16", source, target, ["train"], partial=True)
    assert not target.parent.exists()


def test_prepare_never_writes_into_its_source(tmp_path):
    source = davis(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "inside", tmp_path / "link" / "inside"):
        with pytest.raises(InputError, match="lies in the source"):
            prepare.prepare("davis16", source, target, ["train"], partial=True)
    with pytest.raises(InputError, match="holds the source"):
        prepare.prepare("davis16", source, tmp_path, ["train"], partial=True)
    text(tmp_path / "full/file.txt", "mine")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        prepare.prepare("davis16", source, tmp_path / "full", ["train"], partial=True)
    assert (tmp_path / "full/file.txt").read_text() == "mine"


def test_prepare_refuses_a_sequence_of_two_splits(tmp_path):
    source = davis(tmp_path / "source")
    text(source / "ImageSets/480p/val.txt", "bike\n")
    with pytest.raises(InputError, match="sequence bike is in train and in val"):
        prepare.prepare("davis16", source, tmp_path / "target", partial=True)


def test_prepare_and_synthetic_commands(tmp_path, capsys):
    pytest.importorskip("skimage")
    clips, again = tmp_path / "clips", tmp_path / "again"
    options = ("--clips", 2, "--val-clips", 1, "--frames", 3, "--height", 48, "--width", 64)
    code, out, _ = run(capsys, "synthetic", clips, *options)
    assert code == 0 and "2 + 1 clips of 3 frames, 64x48" in out
    code, out, _ = run(capsys, "check", "folder", clips, "--jobs", 1)
    assert code == 0 and "folder val: 1 sequence, 3 frames, 3 masks" in out
    code, out, _ = run(capsys, "prepare", "folder", clips, again)
    assert code == 0 and "train: 2 sequences, 6 frames, 6 masks" in out
    assert snapshot(clips) == snapshot(again)
    code, _, err = run(capsys, "prepare", "folder", clips, again)
    assert code == 2 and "is not an empty folder" in err and err.count("\n") == 1


@pytest.mark.skipif("VSOD_DATA" not in os.environ, reason="VSOD_DATA is not set")
def test_real_layouts():
    root = Path(os.environ["VSOD_DATA"], "layouts")
    for part, masks in (("DAVIS", 4), ("DAVSOD", 4), ("FBMS", 1), ("VISAL", 1)):
        report = check("repack", root / "test" / part, "test")
        assert report.problems == [] and (report.frames, report.masks) == (4, masks)
    report = check("stills", root / "train/DUTS/static_images", "train")
    assert report.problems == [] and report.masks == 4
