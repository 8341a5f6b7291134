"""Coarse labels: the built-in maps find objects, the sum and its threshold, erasing, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("huggingface_hub", reason="the extra `models` is not installed")

import cv2
from checks import full_disk

from vsod_models.data.records import Record, Records
from vsod_models.errors import InputError
from vsod_models.labels.carrying import back_flow, carried, moved
from vsod_models.labels.coarse import fit_weights, make_labels, with_coarse_labels
from vsod_models.labels.erasing import correct
from vsod_models.labels.maps import (
    BUILT_IN,
    binary_label,
    flow_contrast,
    maps_of,
    minimum_barrier,
    spectral_residual,
)

SIZE = (60, 80)
OBJECT = np.zeros(SIZE, bool)
OBJECT[20:44, 30:60] = True
SPECK = np.zeros(SIZE, bool)
SPECK[4:10, 5:11] = True


def scene(seed=0, t=0):
    """A red grainy block on green grainy ground; the block moves right by 3 t."""
    rng = np.random.default_rng(seed)
    ground, block = cv2.GaussianBlur(rng.normal(0, 60, (*SIZE, 6)), (0, 0), 1.5).reshape(
        *SIZE, 2, 3
    ).transpose(2, 0, 1, 3)  # fmt: skip
    picture = ground + np.array((60, 140, 70))
    place = np.roll(OBJECT, 3 * t, 1)
    picture[place] = block[OBJECT] + np.array((200, 60, 50))
    return np.clip(picture, 0, 255).astype(np.uint8)


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture[..., ::-1] if picture.ndim == 3 else picture)


@pytest.fixture
def tree(tmp_path):
    """Two sequences of two frames and three folders of maps.

    "good" is the object, soft; "speck" has the object and, brighter, a speck elsewhere; "noise"
    knows nothing.
    """
    rng = np.random.default_rng(0)
    records = []
    for sequence in ("a", "b"):
        for t in range(2):
            name = f"{t:05d}"
            image, mask = (
                tmp_path / sequence / f"{name}.png",
                tmp_path / "gt" / f"{sequence}{name}.png",
            )
            save(image, scene())
            save(mask, 255 * OBJECT.astype(np.uint8))
            maps = {
                "good": cv2.GaussianBlur(220.0 * OBJECT, (0, 0), 1),
                "speck": 180 * OBJECT + 250.0 * SPECK,
                "noise": rng.uniform(0, 255, SIZE),
            }
            for kind, values in maps.items():
                save(tmp_path / kind / sequence / f"{name}.png", values.astype(np.uint8))
            records.append(Record(sequence, t, name, image, mask, "train"))
    return tmp_path, Records("set", "train", records)


def folders(tmp_path, *kinds):
    return [str(tmp_path / kind) for kind in kinds]


def label_of(out, name):
    picture = cv2.imread(str(out / f"{name}.png"), cv2.IMREAD_UNCHANGED)
    assert picture.dtype == np.uint8 and set(np.unique(picture)) <= {0, 255}
    return picture > 0


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_each_built_in_map_finds_the_object():
    frame, following = scene(), scene(t=1)
    for saliency in (minimum_barrier(frame), flow_contrast(frame, following)):
        assert saliency.shape == SIZE and saliency.dtype == np.float32
        assert saliency.min() >= 0 and saliency.max() <= 1
        assert saliency[OBJECT].mean() > 3 * saliency[~OBJECT].mean()
    noise = np.random.default_rng(0).normal(0, 300, (*SIZE, 3))
    texture = np.clip(110 + cv2.GaussianBlur(noise, (0, 0), 4), 0, 255).astype(np.uint8)
    texture[28:36, 38:46] = 200  # sharp edges where all is soft
    saliency = spectral_residual(texture)
    assert saliency.shape == SIZE and saliency.min() >= 0 and saliency.max() <= 1
    assert saliency[24:40, 34:50].mean() > 3 * saliency.mean()


def test_minimum_barrier_is_the_least_barrier(monkeypatch):
    """A walled court: its barrier is the lowest place in the wall, not the wall."""
    values = np.full((9, 9), 10, np.uint8)
    values[2:7, 2:7] = 90  # a wall
    values[3:6, 3:6] = 40  # a court inside
    values[4, 6] = 50  # a lower place in the wall
    values[4, 4] = 200  # a tower in the court
    image = np.repeat(values[..., None], 3, 2)
    monkeypatch.setattr(cv2, "GaussianBlur", lambda picture, *_: picture)
    saliency = minimum_barrier(image)
    lightness = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[..., 0].astype(float)
    expected = {(0, 0): 10, (4, 6): 50, (3, 3): 50, (2, 2): 90, (4, 4): 200}
    ground, top = lightness[0, 0], lightness[4, 4]
    for place, barrier in expected.items():
        level = lightness[values == barrier][0]
        assert saliency[place] == pytest.approx((level - ground) / (top - ground), abs=0.02), place


@pytest.mark.parametrize("size", [(1, 1), (2, 90), (300, 7)])
def test_flat_and_tiny_frames_have_nothing(size):
    frame = np.full((*size, 3), 77, np.uint8)
    for saliency in (minimum_barrier(frame), spectral_residual(frame)):
        assert saliency.shape == size and not saliency.any()
    assert not flow_contrast(frame, frame).any()


def test_built_in_labels_need_nothing(tree):
    tmp_path, records = tree
    manifest = make_labels(records, tmp_path / "out")
    assert manifest["sources"] == list(BUILT_IN) and len(manifest["frames"]) == 4
    assert iou(label_of(tmp_path / "out", "a/00000"), OBJECT) > 0.6


def test_sum_threshold_and_manifest(tree):
    tmp_path, records = tree
    out = tmp_path / "out"
    manifest = make_labels(records, out, folders(tmp_path, "good", "speck"), [3, 1])
    assert manifest["weights"] == [0.75, 0.25]
    assert json.loads((out / "manifest.json").read_text()) == manifest
    label = label_of(out, "b/00001")
    assert iou(label, OBJECT) > 0.9
    assert manifest["frames"]["b/00001"]["salient"] == pytest.approx(label.mean(), abs=1e-3)
    speck_only = make_labels(
        records, tmp_path / "other", folders(tmp_path, "good", "speck"), [0, 1]
    )
    assert label_of(tmp_path / "other", "a/00000")[SPECK].all()
    assert speck_only["skipped"] == {}


def test_only_frames_without_ground_truth(tree):
    tmp_path, records = tree
    with pytest.raises(InputError, match="every frame has ground truth"):
        make_labels(records, tmp_path / "out", unlabelled=True)
    rest = [replace(r, mask=None) if r.name == "00001" else r for r in records]
    some = Records("set", "train", rest)
    erase = tmp_path / "erase.json"
    erase.write_text('[{"frame": "a/00000", "point": [31, 21]}]')
    with pytest.raises(InputError, match="no frame a/00000 to label"):
        make_labels(some, tmp_path / "out", unlabelled=True, erase_list=erase)
    manifest = make_labels(some, tmp_path / "out", unlabelled=True)
    assert set(manifest["frames"]) == {"a/00001", "b/00001"} and not manifest["skipped"]
    kinds = {f"{r.sequence}/{r.name}": r.label for r in with_coarse_labels(some, tmp_path / "out")}
    assert kinds == {"a/00000": "fine", "a/00001": "coarse", "b/00000": "fine", "b/00001": "coarse"}


def test_so_many_frames_spread_evenly(tree):
    tmp_path, records = tree
    names = [f"{r.sequence}/{r.name}" for r in records]
    good = folders(tmp_path, "good")
    for count, expected in ((1, names[:1]), (2, [names[0], names[-1]]), (99, names)):
        manifest = make_labels(records, tmp_path / f"out{count}", good, count=count)
        assert list(manifest["frames"]) == expected
    with pytest.raises(InputError, match="count is 0"):
        make_labels(records, tmp_path / "none", good, count=0)


def test_otsu_splits_two_levels():
    combined = np.where(OBJECT, 0.7, 0.2)
    label, threshold = binary_label(combined)
    assert np.array_equal(label, OBJECT) and 0.19 < threshold < 0.7
    assert binary_label(np.full(SIZE, 0.4)) is None


def test_fitted_weights_prefer_the_map_that_knows(tree):
    tmp_path, records = tree
    seen = []
    sources = folders(tmp_path, "noise", "good", "speck")
    weights = fit_weights(records, sources, on_frame=lambda: seen.append(1))
    assert len(seen) == 4 and sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert weights[1] > 0.7 and weights[0] < 0.05  # the speck's map has the object too
    for record in records:  # a constant on top changes nothing: Otsu does not mind the mean
        picture = cv2.imread(str(tmp_path / "good" / record.sequence / f"{record.name}.png"), 0)
        save(tmp_path / "raised" / record.sequence / f"{record.name}.png", picture // 4 + 150)
    raised, speck = fit_weights(records, folders(tmp_path, "raised", "speck"))
    assert raised > 0.8 and speck < 0.2
    with pytest.raises(InputError, match="no ground truth to fit"):
        fit_weights(Records("set", "train", []), sources)
    empty = tmp_path / "empty"
    for record in records:
        save(empty / record.sequence / f"{record.name}.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(InputError, match="none of the maps"):
        fit_weights(records, [str(empty)])


def test_a_person_erases(tree):
    tmp_path, records = tree
    entries = [
        {"frame": "a/00000", "point": [7, 6]},
        {"frame": "a/00001", "box": [0, 0, 40, 15]},
        {"frame": "b/00000", "point": [7, 6]},
        {"frame": "b/00000", "point": [40, 30]},
    ]
    (tmp_path / "erase.json").write_text(json.dumps(entries))
    sources = folders(tmp_path, "speck")
    manifest = make_labels(records, tmp_path / "out", sources, erase_list=tmp_path / "erase.json")
    for name in ("a/00000", "a/00001"):
        assert np.array_equal(label_of(tmp_path / "out", name), OBJECT)
        (erased,) = manifest["frames"][name]["erased"]
        assert erased["by"] == "person" and erased["pixels"] == 36
    assert label_of(tmp_path / "out", "b/00001")[SPECK].all()
    assert manifest["skipped"] == {"b/00000": "all of it was erased"}
    assert not (tmp_path / "out" / "b" / "00000.png").exists()


def test_every_kind_of_entry(tree):
    tmp_path, records = tree
    entries = [
        {"frame": "a/00000", "polygon": [[0, 0], [20, 0], [20, 15], [0, 15]], "step": 1},
        {"frame": "a/00000", "brush": [[70, 10], [70, 50]], "radius": 3, "add": True},
        {"frame": "a/00000", "point": [7, 6], "add": True},  # brings the speck back
        {"frame": "a/00000", "box": [60, 0, 80, 30]},
        {"frame": "a/00001", "mark": "all right"},
        {"frame": "b/00000", "mark": "skip"},
        {"frame": "b/00001", "mark": "skip"},
        {"frame": "b/00001", "mark": "open"},
        {"frame": "b/00001", "point": [7, 6], "carried": "b/00000", "step": 2},
    ]
    file = tmp_path / "erase.json"
    file.write_text(json.dumps(entries))
    sources = folders(tmp_path, "speck")
    manifest = make_labels(records, tmp_path / "out", sources, erase_list=file)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    stroke = (np.abs(x - 70) <= 3) & (y >= 10) & (y <= 50)
    for end in (10, 50):
        stroke |= (x - 70) ** 2 + (y - end) ** 2 <= 9
    stroke[:30, 60:] = False
    assert np.array_equal(label_of(tmp_path / "out", "a/00000"), OBJECT | SPECK | stroke)
    said = manifest["frames"]["a/00000"]["erased"]
    assert [e["pixels"] for e in said[:3:2]] == [36, 36] and "step" not in said[0]
    assert manifest["frames"]["a/00001"]["erased"] == []
    assert manifest["skipped"] == {"b/00000": "skipped by a person"}
    assert np.array_equal(label_of(tmp_path / "out", "b/00001"), OBJECT)
    only = make_labels(records, tmp_path / "only", sources, erase_list=file, only_looked_over=True)
    assert set(only["frames"]) == {"a/00000", "a/00001"}
    file.write_text("[]")
    with pytest.raises(InputError, match="no frame was looked over"):
        make_labels(records, tmp_path / "x", sources, erase_list=file, only_looked_over=True)
    with pytest.raises(InputError, match="needs an erase list"):
        make_labels(records, tmp_path / "x", sources, only_looked_over=True)


def test_a_label_drawn_where_the_maps_say_nothing(tree):
    tmp_path, records = tree
    save(tmp_path / "good" / "a" / "00000.png", np.zeros(SIZE, np.uint8))
    file = tmp_path / "erase.json"
    file.write_text('[{"frame": "a/00000", "box": [30, 20, 60, 44], "add": true}]')
    good = folders(tmp_path, "good")
    manifest = make_labels(records, tmp_path / "out", good, erase_list=file)
    assert np.array_equal(label_of(tmp_path / "out", "a/00000"), OBJECT)
    assert manifest["frames"]["a/00000"]["threshold"] is None
    file.write_text('[{"frame": "a/00000", "box": [30, 20, 60, 44]}]')
    with pytest.raises(InputError, match="has no label to erase from"):
        make_labels(records, tmp_path / "other", good, erase_list=file)


def test_brushes_and_polygons_that_leave_the_frame():
    base = np.ones((20, 30), bool)
    for place in (
        {"brush": [[-50, 10], [5, 10]], "radius": 4},
        {"brush": [[29, -100], [29, 300]], "radius": 1000},
        {"polygon": [[-9, -9], [100_000, -9], [-9, 5]]},
    ):
        label = base.copy()
        assert correct(label, base, {"frame": "a/b", **place}) == (~label).sum() > 0
    with pytest.raises(InputError, match="no region to erase at brush of 1 points"):
        correct(base.copy(), base, {"frame": "a/b", "brush": [[-500, 3]], "radius": 3})
    with pytest.raises(InputError, match="nothing to add at box"):
        correct(base.copy(), base, {"frame": "a/b", "box": [0, 0, 3, 3], "add": True})


def test_what_moves_is_carried_on():
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3)).astype(np.uint8)
    ground = cv2.GaussianBlur(noise, (0, 0), 2)
    frames, labels = [], []
    for t in range(2):
        frame, label = ground.copy(), np.zeros((90, 130), bool)
        place = np.s_[30:60, 20 + 5 * t : 50 + 5 * t]
        frame[place] = noise[30:60, 20:50]
        label[place] = True
        label[10:20, 100:110] = True  # stays, and was not erased
        frames.append(frame)
        labels.append(label)
    erased = labels[0].copy()
    erased[:, 90:] = False
    where = moved(erased, back_flow(*frames))
    (entry,) = carried(where, labels[1], "a/1", "a/0")
    assert entry["frame"] == "a/1" and entry["carried"] == "a/0"
    after = labels[1].copy()
    assert correct(after, labels[1], entry) == 900 and after.sum() == 100
    labels[1][40:50, 50:128] = True  # it has grown together with something larger
    labels[1][20:88, 90:128] = True
    entries = carried(where, labels[1], "a/1", "a/0")
    assert {"polygon"} == {key for e in entries for key in e} - {"frame", "carried"}
    after = labels[1].copy()
    for entry in entries:
        correct(after, labels[1], entry)
    assert after[32:58, 28:50].mean() < 0.05 and after[20:88, 90:128].all()
    assert carried(np.zeros((90, 130), bool), labels[1], "a/1", "a/0") == []


def test_disputed_regions_are_erased_and_marked(tree):
    tmp_path, records = tree
    sources = folders(tmp_path, "good", "speck", "good")
    plain = make_labels(records, tmp_path / "plain", sources, [1, 8, 1])
    assert label_of(tmp_path / "plain", "a/00000")[SPECK].all() and plain["auto_erase"] is None
    manifest = make_labels(records, tmp_path / "out", sources, [1, 8, 1], auto_erase=True)
    assert np.array_equal(label_of(tmp_path / "out", "a/00000"), OBJECT)
    assert manifest["auto_erase"] == 2
    (erased,) = manifest["frames"]["a/00000"]["erased"]
    assert erased == {"by": "automatic", "box": [5, 4, 11, 10], "maps": 1, "pixels": 36}


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"frame": "c/00000", "point": [1, 1]}]', "no frame c/00000 to label here"),
        ('[{"frame": "a/00000", "point": [70, 50]}]', r"no region to erase at point \[70, 50\]"),
        ('[{"frame": "a/00000", "point": [80, 50]}]', "is outside 80x60"),
        ('[{"frame": "a/00000", "box": [60, 50, 70, 55]}]', "no region to erase at box"),
        ('[{"frame": "a/00000"}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "point": [1.5, 2]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "point": [1, 2], "box": [0, 0, 1, 1]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "polygon": [[1, 2], [3, 4]]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "polygon": [[1, 2], [3, 4], [5]]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "brush": [[1, 2]]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "brush": [[1, 2]], "radius": 100000}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "point": [1, 2], "add": 1}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "mark": "good"}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "mark": "skip", "point": [1, 2]}]', "entry 0 has to be"),
        ('[{"frame": "a/00000", "point": [1, 2], "step": "x"}]', "entry 0 has to be"),
        ("[3]", "entry 0 has to be"),
        ("{not json", "not JSON"),
        (None, "no such erase list"),
    ],
)
def test_bad_erase_lists(tree, content, message):
    tmp_path, records = tree
    file = tmp_path / "erase.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"erase\.json: .*{message}"):
        make_labels(records, tmp_path / "out", folders(tmp_path, "good"), erase_list=file)
    assert not (tmp_path / "out").exists()


def test_missing_maps(tree):
    tmp_path, records = tree
    sources = folders(tmp_path, "good", "speck")
    (tmp_path / "speck" / "b" / "00001.png").unlink()
    with pytest.raises(InputError, match=r"speck/b/00001.png: no saliency map.*allow_missing=True"):
        make_labels(records, tmp_path / "out", sources)
    assert not (tmp_path / "out").exists()
    manifest = make_labels(records, tmp_path / "out", sources, allow_missing=True)
    assert len(manifest["frames"]) == 3 and "map missing" in manifest["skipped"]["b/00001"]

    with pytest.raises(InputError, match=r"speck/b/00001.png: no saliency map.*allow_missing=True"):
        fit_weights(records, sources)
    assert fit_weights(records, sources, allow_missing=True) == fit_weights(
        Records("set", "train", list(records)[:3]), sources
    )
    only_b = Records("set", "train", [records.sequences["b"][1]])
    with pytest.raises(InputError, match="no frame with ground truth has all of its maps"):
        fit_weights(only_b, sources, allow_missing=True)


def test_a_full_disk_leaves_no_labels(tree):
    tmp_path, records = tree
    with pytest.raises(OSError, match=r"File too large: .*00000\.png"), full_disk(16):
        make_labels(records, tmp_path / "out", folders(tmp_path, "good"))
    assert not (tmp_path / "out").exists()


def test_frames_of_two_sizes_are_named(tree):
    tmp_path, records = tree
    save(tmp_path / "a" / "00001.png", scene()[:40])
    with pytest.raises(InputError, match="sequence a, frames 00000 and 00001: optical flow"):
        make_labels(records, tmp_path / "out", ["flow-contrast"])
    assert not (tmp_path / "out").exists()


def test_empty_maps(tree):
    tmp_path, records = tree
    empty = np.zeros(SIZE, np.uint8)
    save(tmp_path / "good" / "a" / "00000.png", empty)
    manifest = make_labels(records, tmp_path / "out", folders(tmp_path, "good"))
    assert manifest["skipped"] == {"a/00000": "the maps are the same everywhere"}
    for record in records:
        save(tmp_path / "good" / record.sequence / f"{record.name}.png", empty)
    with pytest.raises(InputError, match="no frame gets a label"):
        make_labels(records, tmp_path / "other", folders(tmp_path, "good"))
    assert not (tmp_path / "other").exists()


def test_other_bad_input(tree):
    tmp_path, records = tree
    good = folders(tmp_path, "good")
    for options, message in (
        (dict(sources=["nothing"]), "neither a folder nor one of spectral-residual"),
        (dict(sources=good, weights=[1, 2]), "1 numbers"),
        (dict(sources=good, weights=[-1]), "none negative"),
        (dict(sources=good, weights=[0]), "not all zero"),
        (dict(sources=good, agree=2, auto_erase=True), "agree is 2"),
        (dict(sources=good, agree=1), "agree is for auto_erase"),
    ):
        with pytest.raises(InputError, match=message):
            make_labels(records, tmp_path / "out", **options)
    (tmp_path / "good" / "a" / "00000.png").write_text("no picture")
    with pytest.raises(InputError, match="not a readable picture"):
        make_labels(records, tmp_path / "out", good)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        make_labels(records, tmp_path / "full", good)


def test_maps_of_another_size_are_resized(tree):
    tmp_path, records = tree
    save(tmp_path / "good" / "a" / "00000.png", np.full((30, 40), 9, np.uint8))
    maps = maps_of(records.sequences["a"], 0, folders(tmp_path, "good", "speck"))
    assert maps.shape == (2, *SIZE) and maps[0] == pytest.approx(9 / 255)


def test_records_with_coarse_labels(tree):
    tmp_path, records = tree
    only_a = Records("set", "train", records.sequences["a"])
    save(tmp_path / "good" / "a" / "00001.png", np.zeros(SIZE, np.uint8))
    make_labels(only_a, tmp_path / "out", folders(tmp_path, "good"))
    mixed = with_coarse_labels(records, tmp_path / "out")
    assert [r.label for r in mixed] == ["coarse", "coarse", "fine", "fine"]
    assert iou(mixed[0].read_mask().astype(bool), OBJECT) > 0.9
    assert mixed[1].mask is None and mixed[2].mask == records[2].mask
    with pytest.raises(InputError, match="no such manifest"):
        with_coarse_labels(records, tmp_path / "good")
    other = Records("set", "val", records.sequences["b"])
    with pytest.raises(InputError, match="no label for any frame of set val"):
        with_coarse_labels(other, tmp_path / "out")


def vsod(*arguments):
    """Exit code of the command."""
    from vsod_models.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    return exit.value.code


def test_command(tree, monkeypatch, capsys):
    pytest.importorskip("typer", reason="the extra `models` is not installed")
    from vsod_models import data

    tmp_path, records = tree
    monkeypatch.setattr(data, "open_dataset", lambda name, root, split: records)
    command = ["label", "coarse", "set", tmp_path]
    for folder in folders(tmp_path, "good", "noise"):
        command += ["--maps", folder]
    # the ground truth of the labelled sequence is as good as not there
    (tmp_path / "gt" / "b00000.png").write_text("no picture")
    assert vsod(*command, "-o", tmp_path / "out", "--fit", "--sequences", "b") == 0
    printed = capsys.readouterr()
    assert "2 labels (1.00" in printed.out and printed.err == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b", "manifest.json"]
    for extra, message in (
        (["--sequences", "c"], "has no sequence 'c'"),
        (["--weights", "1;2"], "is not a list of numbers"),
        (["--weights", "1,2", "--fit"], "mutually exclusive"),
        (["--maps", "nowhere"], "neither a folder nor one of"),
    ):
        assert vsod(*command, "-o", tmp_path / "other", *extra) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    (tmp_path / "good" / "a" / "00000.png").unlink()
    fit = (*command, "-o", tmp_path / "less", "--fit", "--sequences", "b")
    assert vsod(*fit) == 2
    assert vsod(*fit, "--allow-missing") == 0
