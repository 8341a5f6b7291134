"""Samples for training: functions of (seed, i); what moves the frames moves the masks."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("cv2")
pytest.importorskip("torchvision")

from vsod_models.data import Record, Records
from vsod_models.data.clips import ClipDataset, reflected
from vsod_models.data.transforms import Augmentation
from vsod_models.errors import InputError

SIZE = (32, 48)
GEOMETRY = Augmentation(brightness=0, contrast=0, saturation=0)


class Numbered:
    """A picture whose red is the frame's number, whose green the sequence's."""

    def __init__(self, sequence, t, size=(64, 64)):
        self.values, self.size = (t, sequence, 0), size

    def __call__(self):
        return np.full((*self.size, 3), self.values, np.uint8)


class Disc:
    """Bright inside, dark outside; the mask of it, as image (3 channels) or mask (1)."""

    def __init__(self, channels):
        self.channels = channels

    def __call__(self):
        y, x = np.mgrid[0:64, 0:64]
        disc = (((y - 25) ** 2 + (x - 36) ** 2 < 15**2) * 255).astype(np.uint8)
        return np.repeat(disc[..., None], 3, 2) if self.channels == 3 else disc


def numbered(lengths, annotated=lambda s, t: True):
    return Records("test", "train", [
        Record(f"s{s}", t, f"{t}", Numbered(s, t), Disc(1) if annotated(s, t) else None, "train")
        for s, length in enumerate(lengths)
        for t in range(length)
    ])  # fmt: skip


def discs(count=6, label="fine", **fields):
    image, mask = Disc(3), Disc(1)
    return Records(
        "test", "train",
        [Record("disc", t, f"{t}", image, mask, "train", label=label, **fields)
         for t in range(count)],
    )  # fmt: skip


def shown(sample):
    """(sequence, frame) of each frame of a sample of `numbered`."""
    values = (sample["frames"][:, :, 0, 0] * 255).round().int().tolist()
    return [(s, t) for t, s, _ in values]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_shapes_and_ranges():
    sample = ClipDataset(discs(), 5, size=SIZE, augment=Augmentation())[0]
    assert sample["frames"].shape == (5, 3, *SIZE) and sample["frames"].dtype == torch.float32
    assert sample["masks"].shape == (5, 1, *SIZE) and set(sample["masks"].unique().tolist()) == {
        0.0, 1.0,
    }  # fmt: skip
    assert sample["frames"].min() >= 0 and 0.5 < sample["frames"].max() <= 1
    assert sample["valid"].tolist() == [1.0] * 5 and sample["weight"].tolist() == [1.0] * 5
    assert "prior" not in sample


def test_a_sample_is_a_function_of_seed_and_number():
    records = numbered([9, 4, 1])
    make = lambda **options: ClipDataset(  # noqa: E731
        records, 3, strides=(1, 2), size=SIZE, **({"augment": Augmentation()} | options)
    )
    first, other = make(seed=7), make(seed=7, length=2)
    for i in (0, 5, 13, 14, 10_000):
        assert same(first[i], other[i])
    assert any(not same(first[i], make(seed=8)[i]) for i in range(3))
    assert any(not same(first[i], first[i + 14]) for i in range(3))  # another run over the data
    assert len(first) == 14 and len(other) == 2
    with pytest.raises(IndexError):
        first[-1]


def test_samples_leave_the_generators_as_they_were():
    dataset = ClipDataset(discs(), 3, size=SIZE, augment=Augmentation())
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset[3]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_workers_give_the_same_samples():
    dataset = ClipDataset(discs(), 3, size=SIZE, augment=Augmentation(hue=0.1), seed=3)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for i, sample in enumerate(loader):
        assert same(sample, dataset[i])


def test_each_run_visits_every_annotated_frame_once():
    records = numbered([5, 7, 3], annotated=lambda s, t: t % 2 == 0)
    dataset = ClipDataset(records, 1, size=SIZE)
    annotated = {(s, t) for s, n in enumerate([5, 7, 3]) for t in range(0, n, 2)}
    for start in (0, len(dataset), 6 * len(dataset)):
        visited = [shown(dataset[i])[0] for i in range(start, start + len(dataset))]
        assert len(visited) == len(annotated) and set(visited) == annotated


def test_sequences_count_alike_whatever_their_length():
    dataset = ClipDataset(
        numbered([9, 2, 5], lambda s, t: s != 1 and t > 1), 1, size=SIZE, seed=3, by_sequence=True
    )
    drawn = []
    for i in range(200):
        (record,) = dataset.choose(i, np.random.default_rng(i))
        drawn.append((record.sequence, record.frame))
    assert dataset.drawn == 2 and {name for name, _ in drawn} == {"s0", "s2"}
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        assert first[0] != second[0], "each once in a pass"
    assert {t for name, t in drawn if name == "s0"} == set(range(2, 9))
    assert {t for name, t in drawn if name == "s2"} == {2, 3, 4}


def test_neighbours_keep_their_stride():
    dataset = ClipDataset(numbered([20, 9]), 4, strides=(1, 3), size=SIZE)
    strides = set()
    for i in range(3 * len(dataset)):
        clip = shown(dataset[i])
        assert len({s for s, _ in clip}) == 1
        steps = {b - a for (_, a), (_, b) in pairwise(clip)}
        if len(steps) == 1:
            strides |= steps
    assert strides == {1, 2, 3}


def test_random_frames_are_different_and_in_order():
    dataset = ClipDataset(numbered([12, 2]), 4, strides="random", size=SIZE)
    gaps = set()
    for i in range(len(dataset)):
        clip = shown(dataset[i])
        times = [t for _, t in clip]
        assert times == sorted(times)
        if clip[0][0] == 0:
            assert len(set(times)) == 4
            gaps |= set(np.diff(times).tolist())
        else:
            assert set(times) <= {0, 1}
    assert len(gaps) > 3


def test_short_sequences_go_forth_and_back():
    clip = shown(ClipDataset(numbered([3]), 7, size=SIZE)[0])
    times = [t for _, t in clip]
    assert set(times) == {0, 1, 2}
    assert all(abs(a - b) == 1 for a, b in pairwise(times))
    assert [reflected(t, 3) for t in range(-2, 6)] == [2, 1, 0, 1, 2, 1, 0, 1]


def test_frames_without_ground_truth_are_marked():
    dataset = ClipDataset(
        numbered([9], annotated=lambda s, t: t == 4), 5, size=SIZE, augment=GEOMETRY
    )
    for i in range(4):
        sample = dataset[i]
        assert sample["valid"].sum() == 1
        empty = sample["masks"].flatten(1).sum(1) == 0
        assert torch.equal(empty, sample["valid"] == 0)


def test_masks_move_with_the_frames():
    dataset = ClipDataset(discs(), 3, size=(64, 64), augment=GEOMETRY)
    places = set()
    for i in range(12):
        sample = dataset[i]
        bright = sample["frames"][:, :1] > 0.5
        mask = sample["masks"] > 0.5
        union = (bright | mask).sum()
        assert (bright & mask).sum() > 0.9 * union
        places.add(tuple(mask[0, 0].nonzero().float().mean(0).round().int().tolist()))
    assert len(places) > 6


def test_all_frames_of_a_clip_get_the_same_augmentation():
    dataset = ClipDataset(discs(), 4, size=SIZE, augment=Augmentation(hue=0.1))
    for i in range(6):
        sample = dataset[i]
        assert all(torch.equal(sample["frames"][0], frame) for frame in sample["frames"])
        assert all(torch.equal(sample["masks"][0], mask) for mask in sample["masks"])
    assert not torch.equal(dataset[0]["frames"], dataset[1]["frames"])


def test_a_still_image_drifts_with_its_mask():
    still = discs(1)
    plain = ClipDataset(still, 4, size=(64, 64))[0]
    assert all(torch.equal(plain["frames"][0], frame) for frame in plain["frames"])
    sample = ClipDataset(still, 4, size=(64, 64), augment=GEOMETRY)[0]
    assert not torch.equal(sample["frames"][0], sample["frames"][3])
    for frame, mask in zip(sample["frames"], sample["masks"], strict=True):
        bright, mask = frame[:1] > 0.5, mask > 0.5
        assert (bright & mask).sum() > 0.9 * (bright | mask).sum()


def test_labels_priors_and_cache(tmp_path):
    from PIL import Image

    path = tmp_path / "prior.png"
    Image.fromarray(Disc(1)()).save(path)
    records = discs(label="coarse", prior=path)
    options = dict(size=(64, 64), augment=GEOMETRY, label_weights={"coarse": 0.25})
    dataset = ClipDataset(records, 3, cache=True, **options)
    sample = dataset[0]
    assert sample["weight"].tolist() == [0.25] * 3
    assert sample["prior"].shape == (3, 1, 64, 64)
    assert (sample["prior"].round() != sample["masks"]).float().mean() < 0.02
    dataset[0]
    path.unlink()
    assert same(sample, dataset[0])  # from memory
    with pytest.raises(InputError, match=r"prior\.png: no such file"):
        ClipDataset(records, 3, **options)[0]
    Image.fromarray(Disc(1)()[:20]).save(path)
    with pytest.raises(InputError, match=r"prior\.png: the motion prior is \d+x20, its frame"):
        ClipDataset(records, 3, **options)[0]
    for wrong in ({"corse": 0.5}, {"coarse": -1.0}):
        with pytest.raises(InputError, match=r"label_weights\.co"):
            ClipDataset(records, label_weights=wrong)
    some = [replace(r, prior=None) if r.frame == 1 else r for r in records]
    with pytest.raises(InputError, match="have no motion prior"):
        ClipDataset(Records("discs", "train", some), 3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_length=0), "clip_length is 0"),
        (dict(strides=(0, 2)), "strides is"),
        (dict(strides=(3, 2)), "strides is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ClipDataset(discs(), **options)


def test_data_that_cannot_be_trained_on():
    with pytest.raises(InputError, match="no frame with ground truth"):
        ClipDataset(numbered([3], annotated=lambda s, t: False))
    records = Records(
        "test", "train", [Record("s", 0, "0", Numbered(0, 0, SIZE), Disc(1), "train")]
    )
    with pytest.raises(InputError, match="the mask is 64x64, its frame 48x32"):
        ClipDataset(records, 1, size=SIZE)[0]


@pytest.mark.parametrize("strides", [(1, 3), "random"])
def test_clips_that_end_at_their_label(strides):
    records = numbered([9, 2, 1], annotated=lambda s, t: t % 2 == 0)
    dataset = ClipDataset(records, 4, strides=strides, size=SIZE, anchor="last")
    for i in range(30):
        sample = dataset[i]
        assert sample["valid"][-1] == 1
        frames = [t for _, t in shown(sample)]
        assert frames[-1] == max(frames) or len(set(frames)) <= 2 or strides != "random"
