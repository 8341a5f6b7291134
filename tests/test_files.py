"""Names that stay inside a folder, files that are written whole, locks."""

import concurrent.futures
import os
import subprocess
import sys
import threading
import time

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


def test_a_folder_that_was_made_to_be_locked_goes_if_nothing_came_of_it(tmp_path):
    with pytest.raises(InputError, match="impossible"), locked(tmp_path / "run", "a training"):
        raise InputError("impossible")
    assert not os.listdir(tmp_path)
    with locked(tmp_path / "run", "a training"):
        (tmp_path / "run/made").touch()
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty", "a training"):
        pass
    assert (tmp_path / "run/made").exists() and (tmp_path / "empty").exists()


def test_what_fails_leaves_no_new_folder(tmp_path):
    (tmp_path / "there").mkdir()
    for write in (whole_file, whole_folder):
        for folder in ("new/deep", "there"):
            with pytest.raises(ValueError, match="stop"), write(tmp_path / folder / "x.json"):
                raise ValueError("stop")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(ValueError, match="stop"), whole_file(tmp_path / "shared/x"):
        (tmp_path / "shared/theirs").write_text("")
        raise ValueError("stop")
    assert [p.name for p in (tmp_path / "shared").iterdir()] == ["theirs"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    for content in ("first", "second"):
        with whole_folder(path, replace=True) as part:
            (part / content).write_text("")
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(OSError, match="full"), whole_folder(path, replace=True) as part:
        (part / "third").write_text("")
        raise OSError(28, "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "second"]


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_claim_a_name_over_a_slow_network_one_wins(tmp_path, monkeypatch, links):
    """A rename or link of a network file system takes its time; the names are seen meanwhile."""

    def slow(function):
        def call(*arguments):
            time.sleep(0.1)
            done = function(*arguments)
            time.sleep(0.1)
            return done

        return call

    def no_links(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "replace", slow(os.replace))
    monkeypatch.setattr(os, "link", slow(os.link) if links else no_links)
    together = threading.Barrier(2)

    def write(content, path):
        try:
            if path.suffix:
                with whole_file(path, new=True) as part:
                    part.write_text(content)
                    together.wait()
            else:
                with whole_folder(path) as part:
                    (part / content).write_text(content)
                    together.wait()
        except OSError as error:
            return str(error.filename)
        return content

    for path in (tmp_path / "masks.mp4", tmp_path / "maps"):
        with concurrent.futures.ThreadPoolExecutor(2) as both:
            results = list(both.map(write, ("one", "two"), (path, path)))
        assert results.count(str(path)) == 1, results
        (won,) = set(results) - {str(path)}
        assert (path if path.suffix else path / won).read_text() == won
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps", "masks.mp4"]


def test_a_claim_whose_rename_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "link", fails)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError), whole_file(tmp_path / "masks.mp4", new=True) as part:
        part.write_text("mine")
    assert not list(tmp_path.iterdir())
