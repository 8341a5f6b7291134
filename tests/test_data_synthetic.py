"""Synthetic clips: the same bits always, and masks that are what was drawn."""

import dataclasses
import pickle

import pytest

np = pytest.importorskip("numpy")
cv2 = pytest.importorskip("cv2")
pytest.importorskip("skimage")

from vsod_models.data import open_dataset  # noqa: E402
from vsod_models.data.synthetic import SyntheticClip, synthetic_clip  # noqa: E402
from vsod_models.errors import InputError  # noqa: E402

SMALL = (96, 128)


def test_a_clip_is_a_function_of_seed_split_and_index():
    images, masks = synthetic_clip(3, 5, 4, SMALL)
    assert images.shape == (4, *SMALL, 3) and images.dtype == np.uint8
    assert masks.shape == (4, *SMALL) and set(np.unique(masks)) <= {0, 1}
    again = synthetic_clip(3, 5, 4, SMALL)
    assert np.array_equal(images, again[0]) and np.array_equal(masks, again[1])
    for other in (dict(seed=4), dict(index=6), dict(split="val"), dict(split="test")):
        arguments = dict(seed=3, index=5, split="train") | other
        assert not np.array_equal(images, synthetic_clip(frames=4, size=SMALL, **arguments)[0])


def test_a_frame_depends_on_no_other_frame():
    clip = SyntheticClip(0, "train", 11, SMALL, True)
    late = clip.frame(7)
    images, masks = synthetic_clip(0, 11, 8, SMALL)
    assert np.array_equal(late[0], images[7]) and np.array_equal(late[1], masks[7])
    shorter = synthetic_clip(0, 11, 3, SMALL)
    assert np.array_equal(shorter[0], images[:3])


@pytest.mark.parametrize("index", range(12))
def test_the_mask_is_what_was_drawn(index):
    clip = SyntheticClip(1, "train", index, (160, 160), True)
    clip.blur, clip.grain, clip.quality = 0.0, None, None
    clip.things = [dataclasses.replace(thing, shadow=(0, 0, 0.0)) for thing in clip.things]
    image, mask = clip.frame(4)
    clip.things = []
    empty, no_mask = clip.frame(4)
    changed = (image != empty).any(-1)
    assert not no_mask.any()
    # Outlines are anti-aliased over a pixel; a camouflaged pixel may have the ground's colour.
    near = cv2.dilate(mask, np.ones((5, 5), np.uint8)) > 0
    inside = cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0
    assert not changed[~near].any()
    assert changed[inside].mean() > 0.95


def test_objects_are_of_very_different_sizes_and_move():
    areas, moved = [], []
    for index in range(60):
        _, masks = synthetic_clip(0, index, 9, (64, 64))
        areas.append(masks[0].mean())
        moved.append((masks[0] != masks[8]).mean())
    assert min(areas) < 0.02 and max(areas) > 0.25
    assert np.median(areas) < 0.15
    assert np.mean(np.array(moved) > 0) > 0.9


def test_procedural_clips_read_no_picture(monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("vsod_models.data.synthetic.textures.photo", refuse)
    for index in range(12):
        synthetic_clip(0, index, 1, (48, 48), photos=False)
    with pytest.raises(AssertionError, match="was read"):
        for index in range(12):
            synthetic_clip(0, index, 1, (48, 48))


def test_records_render_the_clip_and_can_be_sent_to_workers():
    records = open_dataset("synthetic", None, "val", clips=3, frames=4, size=SMALL, seed=2)
    assert len(records) == 12 and list(records.sequences) == [
        "val-000000", "val-000001", "val-000002",
    ]  # fmt: skip
    record = pickle.loads(pickle.dumps(records[6]))
    images, masks = synthetic_clip(2, 1, 4, SMALL, split="val")
    assert np.array_equal(record.read_image(), images[2])
    assert np.array_equal(record.read_mask(), masks[2])
    record.read_image()[:] = 0  # the next reader gets a picture of its own
    assert np.array_equal(record.read_image(), images[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(split="dev"), "split is 'dev'; synthetic has train, val, test"),
        (dict(clips=0), "clips is 0"),
        (dict(frames=0), "frames is 0"),
        (dict(size=(8, 224)), "size is"),
        (dict(seed=-1), "seed is -1"),
        (dict(colour=1), "synthetic has no option 'colour'"),
    ],
)
def test_bad_options(options, message):
    split = options.pop("split", "train")
    with pytest.raises(InputError, match=message):
        open_dataset("synthetic", None, split, **options)
