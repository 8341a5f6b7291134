"""Names that stay inside a folder, files that are written whole, locks."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("filelock", reason="the extra `models` is not installed")

from vsod_models import files
from vsod_models.data.records import Record
from vsod_models.errors import InputError
from vsod_models.files import inside, locked, whole_file, whole_folder

LEAD_OUTSIDE = ["", ".", "..", "../x", "/etc", "a/b", "a/../b", "a\\b", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", LEAD_OUTSIDE)
def test_a_name_that_leads_outside_is_refused_before_a_path_is_made_of_it(tmp_path, name):
    with pytest.raises(InputError, match="is not the name of a file or folder in it"):
        inside(tmp_path, "bear", name)


@pytest.mark.parametrize("name", ["bear", "..bear", "bear..", "a b", "clip.v1", "\u732b"])
def test_any_other_name_is_taken_as_it_is(tmp_path, name):
    assert inside(tmp_path, name, "00000.png") == tmp_path / name / "00000.png"


@pytest.mark.parametrize("name", LEAD_OUTSIDE)
def test_no_record_has_a_name_that_leads_outside(name):
    def picture():
        return np.zeros((2, 2, 3), np.uint8)

    with pytest.raises(InputError, match="plain names"):
        Record(name, 0, "00000", picture, None, "val")
    with pytest.raises(InputError, match="plain names"):
        Record("bear", 0, name, picture, None, "val")


# ---- files that are written whole


def test_what_another_program_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "masks.mp4"
    with (
        pytest.raises(FileExistsError, match="made by another program") as error,
        whole_file(path, new=True) as part,
    ):
        part.write_text("mine")
        path.write_text("theirs")
    assert error.value.filename == str(path)
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_links_claims_the_name_as_well(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "masks.mp4"
    with whole_file(path, new=True) as part:
        part.write_text("mine")
    assert path.read_text() == "mine"
    with pytest.raises(FileExistsError), whole_file(path, new=True) as part:
        part.write_text("again")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_program_filled_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "maps"
    with pytest.raises(OSError) as error, whole_folder(path):
        path.mkdir()
        (path / "theirs").write_text("")
    assert error.value.filename == str(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["maps", "theirs"]


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    prefix = files.temporary_prefix(tmp_path / "last.ckpt")
    gone = prefix.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    (tmp_path / f"{gone}abc.part.ckpt").write_text("half")
    (tmp_path / f"{gone}abc.part").mkdir()
    (tmp_path / f"{gone}abc.part" / "00000.png").write_text("half")
    running = f"{prefix}abc.part.ckpt"
    elsewhere = gone.replace(files._machine(), "0" * 8) + "abc.part.ckpt"
    kept = {running, elsewhere, ".last-x.part.ckpt", "other.part"}
    for name in kept:
        (tmp_path / name).write_text("")
    files._clear.cache_clear()
    with whole_file(tmp_path / "last.ckpt") as part:
        part.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == kept | {"last.ckpt"}


@pytest.mark.parametrize("name", ["x" * 250 + ".mp4", "\u732b" * 80 + ".png"])
def test_long_names_are_written(tmp_path, name):
    with whole_file(tmp_path / name) as part:
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_is_locked_as_long_as_its_process_lives(tmp_path):
    program = (
        "import sys, time; from vsod_models.files import locked\n"
        "with locked(sys.argv[1], 'a training'): print('locked', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        already = pytest.raises(InputError, match="a training is running in it already")
        with already, locked(tmp_path, "a training"):
            raise AssertionError("both have it")
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path, "a training"):
        pass
