"""The labels behind the Correct page: steps, undo, carrying on, conflicts, what is on the disk."""

import json

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="the extra `test` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")

import cv2
from checks_labels import RIGHT, SIZE, SMALL, WRONG, block, labelled_clips, remade
from fastapi.testclient import TestClient

from vsod_models.errors import InputError
from vsod_models.labels.coarse import make_labels
from vsod_models.serve.correct import Conflict, Labels
from vsod_models.serve.server import Settings, create_app


@pytest.fixture
def made(tmp_path):
    return tmp_path, labelled_clips(tmp_path)


def opened(made):
    folder, records = made
    return Labels(folder / "labels", records, folder / "labels.erase.json")


def entries(made):
    return json.loads((made[0] / "labels.erase.json").read_text())


def assert_shown_is_made(made, labels):
    """`label coarse --erase` gives, bit for bit, what the page shows."""
    for name, label in remade(*made).items():
        sequence, index = labels.of[name]
        shown = cv2.imdecode(np.frombuffer(labels.regions(sequence, index), np.uint8), 1)
        shown = shown[..., 0] == 255  # OpenCV reads BGR: the third channel comes first
        skipped = labels.state(name)["mark"] == "skip" or not shown.any()
        assert (label is None) == skipped, name
        if not skipped:
            assert np.array_equal(label, shown), name


def test_steps_and_what_they_make(made):
    labels = opened(made)
    top, left, *_ = WRONG
    for entry in (
        {"point": [left + 3, top + 3]},
        {"point": [left + 3, top + 3], "add": True},
        {"box": [0, 0, 60, 30]},
        {"polygon": [[100, 60], [159, 60], [159, 80], [100, 80]]},
        {"brush": [[5, 100], [40, 110], [70, 100]], "radius": 5, "add": True},
        {"brush": [[20, 105]], "radius": 2},
    ):
        assert labels.edit("one", 0, entry, labels.version) == {"one/00000"}
    labels.edit("one", 1, {"mark": "skip"}, labels.version)
    labels.edit("one", 2, {"mark": "all right"}, labels.version)
    labels.edit("two", 0, {"box": [0, 0, 160, 120]}, labels.version)  # all of it
    assert_shown_is_made(made, labels)
    assert [e["step"] for e in entries(made)] == list(range(1, 10))
    looked = {s["name"]: s["looked"] for s in labels.summary()["sequences"]}
    assert looked == {"one": 3, "two": 1}
    before = entries(made)
    for sequence, index, entry in (
        ("one", 0, {"point": [0, 0]}),
        ("one", 0, {"point": [left + 3, top + 3, 1]}),
        ("one", 0, {"mark": "good"}),
        ("one", 0, {"box": [0, 0, 3, 3], "carried": "one/00001"}),
        ("one", 77, {"mark": "skip"}),
        ("../one", 0, {"mark": "skip"}),
    ):
        with pytest.raises(InputError):
            labels.edit(sequence, index, entry, labels.version)
    assert entries(made) == before


def test_undo_and_redo(made):
    labels = opened(made)
    whole = labels.label("one/00000")
    top, left, *_ = SMALL
    labels.edit("one", 0, {"point": [left, top]}, labels.version)
    erased = labels.label("one/00000")
    labels.edit("one", 1, {"mark": "skip"}, labels.version)
    labels = opened(made)  # the server was killed
    assert labels.undo(labels.version) == {"one/00001"}
    assert labels.undo(labels.version) == {"one/00000"}
    assert np.array_equal(labels.label("one/00000"), whole) and entries(made) == []
    labels = opened(made)  # and again
    with pytest.raises(InputError, match="nothing to undo"):
        labels.undo(labels.version)
    assert labels.redo(labels.version) == {"one/00000"}
    assert np.array_equal(labels.label("one/00000"), erased)
    labels.edit("two", 0, {"mark": "skip"}, labels.version)
    for same in (labels, opened(made)):
        with pytest.raises(InputError, match="nothing to do again"):
            same.redo(same.version)
    labels.undo(labels.version)
    kept = made[0] / "labels.erase.redo.json"
    for wrong in ("{", "3", '{"version": "' + labels.version + '", "undone": [[{"frame": "x"}]]}'):
        kept.write_text(wrong)
        assert opened(made).undone == []


def test_carried_on_and_stopped(made):
    labels = opened(made)
    top, left, *_ = WRONG
    labels.edit("one", 0, {"point": [left, top]}, labels.version)
    at, ended = 0, False
    while not ended:
        changed, at, ended = labels.carry("one", at, labels.version)
        assert changed == {f"one/{at:05d}"}
    assert at == 5
    for t in range(6):
        label = labels.label(f"one/{t:05d}")
        assert not label[block(WRONG, t)].any(), t
        assert label[block(RIGHT, t)].all() and label[block(SMALL, t)].all()
    assert {e["carried"] for e in entries(made)[1:]} == {"one/00000"}
    assert_shown_is_made(made, labels)
    labels.edit("one", 4, {"point": [SMALL[1] + 14, SMALL[0] + 2]}, labels.version)
    assert labels.stop("one", 3, labels.version) == {f"one/{t:05d}" for t in (3, 4, 5)}
    for t in range(6):
        assert labels.label(f"one/{t:05d}")[block(WRONG, t)].any() == (t >= 3)
    assert not labels.label("one/00004")[block(SMALL, 4)].any()  # its own step stays
    assert_shown_is_made(made, labels)
    labels.undo(labels.version)
    assert len(labels.undo(labels.version)) == 2  # the carrying, as one step
    assert len(entries(made)) == 1
    with pytest.raises(InputError, match="nothing was erased here"):
        labels.carry("two", 0, labels.version)
    with pytest.raises(InputError, match="nothing was carried on"):
        labels.stop("one", 0, labels.version)


def test_a_list_of_before_steps_were_counted(made):
    file = made[0] / "labels.erase.json"
    old = [{"frame": "one/00000", "point": [15, 13]}, {"frame": "one/00001", "box": [0, 0, 60, 50]}]
    file.write_text(json.dumps(old))
    labels = opened(made)
    assert not labels.label("one/00000")[block(WRONG)].any()
    labels.edit("one", 2, {"mark": "skip"}, labels.version)
    assert entries(made)[:2] == old
    for left in (2, 1, 0):
        labels.undo(labels.version)
        assert entries(made) == old[:left]


def test_conflicts(made):
    labels = opened(made)
    stale = labels.version
    labels.edit("one", 0, {"mark": "skip"}, stale)
    with pytest.raises(Conflict, match="changed elsewhere"):
        labels.edit("one", 1, {"mark": "skip"}, stale)
    file = made[0] / "labels.erase.json"
    theirs = file.read_text().replace("skip", "all right")
    file.write_text(theirs)
    for act in (
        lambda: labels.edit("one", 1, {"mark": "skip"}, labels.version),
        lambda: labels.undo(stale),
    ):
        with pytest.raises(Conflict):
            act()
        assert file.read_text() == theirs
    assert labels.summary()["version"] == labels.version
    labels.edit("one", 1, {"mark": "skip"}, labels.version)
    assert [e["mark"] for e in entries(made)] == ["all right", "skip"]


def test_folders_that_cannot_be_corrected(made, tmp_path):
    folder, records = made
    (folder / "labels.erase.json").write_text('[{"frame": "three/00000", "mark": "skip"}]')
    with pytest.raises(InputError, match="no frame three/00000"):
        opened(made)
    with pytest.raises(InputError, match="no such manifest of `vsod label coarse`"):
        Labels(folder / "maps", records, folder / "x.json")
    with pytest.raises(InputError, match="which is not in folder train"):
        Labels(folder / "labels", records.of_sequences(["one"]), folder / "x.json")
    file = folder / "once.json"
    for entry in ({"point": [15, 13]}, {"mark": "skip"}):
        file.write_text(json.dumps([{"frame": "one/00000", **entry}]))
        out = folder / f"made-{len(entry)}-{next(iter(entry))}"
        make_labels(records, out, [str(folder / "maps")], erase_list=file)
        with pytest.raises(InputError, match="made with an erase list"):
            Labels(out, records, folder / "x.json")


def test_addresses(made):
    settings = Settings(["mssa-tiny"], labels=lambda: opened(made))
    with TestClient(create_app(settings), "http://127.0.0.1:8760") as client:
        assert client.get("/api/about").json()["labels"]
        said = client.get("/api/labels").json()
        assert [s["name"] for s in said["sequences"]] == ["one", "two"]
        at = {"sequence": "one", "index": 0}
        image = client.get("/api/labels/image", params=at)
        assert image.headers["content-type"] == "image/jpeg"
        frame = cv2.imdecode(np.frombuffer(image.content, np.uint8), 1)
        assert frame.shape[:2] == SIZE
        for wrong in ({"sequence": "../one"}, {"index": 99}, {"index": -1}, {"sequence": ""}):
            for what in ("image", "regions.png"):
                answer = client.get(f"/api/labels/{what}", params=at | wrong)
                assert answer.status_code == 400 and "has no frame" in answer.json()["error"]
        edit = {"act": "edit", **at, "version": said["version"], "entry": {"mark": "skip"}}
        answer = client.post("/api/labels", json=edit).json()
        assert answer["changed"][0]["mark"] == "skip" and answer["undo"]
        again = client.post("/api/labels", json=edit)
        assert again.status_code == 409 and again.json()["conflict"]
        for wrong in ({"act": "format"}, {"index": "0"}, {"entry": 3}, {"index": True}):
            asked = edit | {"version": answer["version"]} | wrong
            assert client.post("/api/labels", json=asked).status_code == 400
        assert len(entries(made)) == 1
