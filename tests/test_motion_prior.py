"""Motion prior: flow, regions, the cache, the stream, and that training tells movers apart."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("cv2", reason="the extra `models` is not installed")
pytest.importorskip("skimage", reason="the extra `models` is not installed")
pytest.importorskip("torchvision", reason="the extra `models` is not installed")
pytest.importorskip("huggingface_hub", reason="the extra `models` is not installed")

import cv2
from checks import full_disk

from vsod_models.data.records import Record, Records
from vsod_models.errors import InputError
from vsod_models.networks.contract import MOTION_CHANNELS, MOTION_STRIDE
from vsod_models.prior import cache
from vsod_models.prior.cache import make_priors
from vsod_models.prior.fit import train_prior
from vsod_models.prior.flow import (
    FlowMagnitude,
    frame_prior,
    optical_flow,
    without_camera,
)
from vsod_models.prior.load import load_prior
from vsod_models.prior.motion import clip_motion, motion, neighbour, without_affine
from vsod_models.prior.regions import (
    STATISTICS,
    MotionPrior,
    flow_statistics,
    neighbours,
    pooled,
)


def texture(seed, height, width):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2.0)


def clip(frames=4, size=(72, 96), speed=3, camera=1, seed=0):
    """A textured square that moves right over a background that moves down; and its masks."""
    height, width = size
    back, front = texture(seed, height + 60, width), texture(seed + 1, 30, 30)
    pictures, masks = [], []
    for t in range(frames):
        picture = back[60 - camera * t : 60 - camera * t + height].copy()
        mask = np.zeros(size, np.uint8)
        place = slice(20, 50), slice(15 + speed * t, 45 + speed * t)
        picture[place], mask[place] = front, 255
        pictures.append(picture)
        masks.append(mask)
    return pictures, masks


def as_records(folder, clips, dataset="set"):
    records = []
    for name, (pictures, masks) in clips.items():
        (folder / name).mkdir(parents=True)
        for t, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
            image, label = folder / name / f"{t:05d}.png", folder / name / f"{t:05d}-mask.png"
            cv2.imwrite(str(image), picture[:, :, ::-1])
            cv2.imwrite(str(label), mask)
            records.append(Record(name, t, image.stem, image, label, "train"))
    return Records(dataset, "train", records)


def statistics_prior(**options):
    torch.manual_seed(3)
    return MotionPrior(None, **{"scales": (50, 200), "hidden": 16} | options).eval()


def test_flow_and_the_camera_in_it():
    pictures, masks = clip()
    flow = optical_flow(pictures[0], pictures[1], 256)
    outside, inside = masks[0] == 0, np.zeros((72, 96), bool)
    inside[28:42, 23:37] = True  # away from the edge, where flow is blurred
    assert np.abs(np.median(flow[inside], 0) - [3, 0]).max() < 0.3
    assert np.abs(np.median(flow[outside], 0) - [0, 1]).max() < 0.3
    own = without_camera(flow)
    assert np.abs(np.median(own[outside], 0)).max() < 0.1
    assert np.abs(np.median(own[inside], 0) - [3, -1]).max() < 0.4
    assert optical_flow(pictures[0], pictures[1], 48).shape == (36, 48, 2)


def test_zoom_and_turn_are_the_cameras():
    y, x = np.mgrid[0:60, 0:80].astype(np.float32)
    turn = np.stack([0.05 * (x - 40) - 0.03 * (y - 30), 0.03 * (x - 40) + 0.05 * (y - 30)], -1)
    assert np.abs(without_camera(turn)).max() < 1e-3
    turn[20:30, 20:30] += 5
    np.testing.assert_allclose(without_camera(turn)[20:30, 20:30], 5, atol=1e-2)


def test_pooling_counts_pixels():
    labels = np.array([[0, 0, 1, 1], [0, 2, 2, 1]])
    maps = np.stack([np.arange(8.0).reshape(2, 4), np.ones((2, 4))])
    np.testing.assert_allclose(pooled(labels, maps), [[5 / 3, 1], [4, 1], [5.5, 1]], atol=1e-6)
    coarse = np.array([[[10.0, 20.0]]])  # one cell for two columns of pixels
    np.testing.assert_allclose(pooled(labels, coarse)[:, 0], [10, 20, 15], atol=1e-5)
    assert neighbours(labels).tolist() == [
        [False, True, True],
        [True, False, True],
        [True, True, False],
    ]
    assert neighbours(np.zeros((3, 3), int)).tolist() == [[True]]


def test_statistics_of_a_mover_and_of_one_region():
    labels = np.zeros((40, 60), int)
    labels[10:20, 10:30] = 1
    flow = np.zeros((40, 60, 2), np.float32)
    flow[labels == 1] = [4, 3]
    background, mover = flow_statistics(labels, flow)
    assert mover[0] == pytest.approx(np.log1p(5)) and background[0] == pytest.approx(0, abs=1e-3)
    assert mover[3] == pytest.approx(np.log1p(5), rel=1e-3)  # contrast with the neighbours
    assert mover[8] == pytest.approx(200 / 2400) and mover[9] == 0
    assert background[9] == pytest.approx(1)
    alone = flow_statistics(np.zeros((40, 60), int), np.zeros((40, 60, 2), np.float32))
    assert alone.shape == (1, STATISTICS) and np.isfinite(alone).all()


@pytest.mark.parametrize("source", [FlowMagnitude(), statistics_prior()])
@pytest.mark.parametrize("size", [(5, 9), (16, 300), (72, 96), (300, 700)])
def test_identical_frames_and_small_frames(source, size):
    frame = texture(0, *size)
    prior = frame_prior(source, frame, frame)
    assert prior.shape == size and prior.dtype == np.float32
    assert np.ptp(prior) < 1e-6, "one region, one value"
    assert not isinstance(source, FlowMagnitude) or prior.max() == 0


def test_flow_magnitude_finds_the_mover():
    pictures, masks = clip()
    for t in range(4):
        prior = frame_prior(FlowMagnitude(), pictures[t], pictures[neighbour(t, 4)])
        assert prior[masks[t] > 0].mean() > 0.7 and prior[masks[t] == 0].mean() < 0.15
    assert [neighbour(t, 3) for t in range(3)] == [1, 2, 1] and neighbour(0, 1) == 0


@pytest.mark.parametrize("speed", [0, 2])
def test_what_moves_beside_the_camera(speed):
    small, small_masks = clip(speed=speed)
    pictures = [cv2.resize(picture, None, fx=3, fy=3) for picture in small]
    maps = clip_motion(pictures)
    height, width = (side // MOTION_STRIDE for side in pictures[0].shape[:2])
    assert maps.shape == (4, MOTION_CHANNELS, height, width) and maps.dtype == np.float32
    for t, (x, y, relative, length) in enumerate(maps):
        place = cv2.erode(cv2.resize(small_masks[t], (72, 54)), np.ones((7, 7))) == 255
        outside = cv2.dilate(cv2.resize(small_masks[t], (72, 54)), np.ones((7, 7))) == 0
        way = 1 if t < 3 else -1  # the last frame's motion leads back
        pixels = np.expm1(4 * np.median(length[place]))
        np.testing.assert_allclose(pixels, np.hypot(3 * speed, 3), rtol=0.15)
        assert np.median(length[outside]) < 0.05 and np.median(relative[outside]) < 0.1
        assert np.median(relative[place]) > 0.8 and np.median(way * y[place]) < -0.25
        assert speed == 0 or np.median(way * x[place]) > 0.7


def test_an_affine_camera_and_a_mover():
    y, x = np.mgrid[0:60, 0:80].astype(np.float32)
    flow = np.stack([0.05 * (x - 40) + 2, 0.02 * (x - 40) - 0.03 * (y - 30)], -1)
    flow[20:40, 20:40] += 5
    rest = without_affine(flow)
    np.testing.assert_allclose(rest[20:40, 20:40], 5, atol=0.1)
    rest[20:40, 20:40] = 0
    assert np.abs(rest).max() < 0.1


@pytest.mark.parametrize("size", [(1, 9), (16, 300), (33, 70)])
def test_motion_of_equal_frames_small_frames_and_noise(size):
    frame, other = texture(0, *size), texture(1, *size)
    assert not motion(frame, frame.copy()).any() and not clip_motion([frame]).any()
    seen = motion(frame, other)
    assert seen.shape == (4, -(-size[0] // 4), -(-size[1] // 4)) and np.abs(seen).max() <= 2
    assert not motion(np.zeros_like(frame), np.full_like(frame, 255)).any()


def test_frames_of_two_sizes():
    with pytest.raises(InputError, match="one size, got 20x20 and 24x20"):
        frame_prior(FlowMagnitude(), texture(0, 20, 20), texture(0, 20, 24))


def test_cache(tmp_path, monkeypatch):
    records = as_records(tmp_path / "data", {"a": clip(3), "b": clip(1, seed=5)})
    before = sorted(p for p in (tmp_path / "data").rglob("*"))
    seen = []
    made = make_priors(
        records, FlowMagnitude(), tmp_path / "cache", on_frame=lambda: seen.append(1)
    )
    assert len(seen) == len(records) == 4
    assert sorted((tmp_path / "data").rglob("*")) == before
    pictures = [r.read_image() for r in records.sequences["a"]]
    for record, (t, other) in zip(made.sequences["a"], ((0, 1), (1, 2), (2, 1)), strict=True):
        prior = frame_prior(FlowMagnitude(), pictures[t], pictures[other])
        stored = cv2.imread(str(record.prior), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(stored / 255, prior, atol=0.51 / 255)
    assert not cv2.imread(str(made.sequences["b"][0].prior)).any()

    def fail(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("vsod_models.prior.flow.optical_flow", fail)
        again = make_priors(records, FlowMagnitude(), tmp_path / "cache")
        assert [r.prior for r in again] == [r.prior for r in made]
        with pytest.raises(AssertionError):  # other settings are other files
            make_priors(records, FlowMagnitude(side=64), tmp_path / "cache")
        os.utime(records[0].image, ns=(1, 1))
        with pytest.raises(AssertionError):  # other pictures too
            make_priors(records, FlowMagnitude(), tmp_path / "cache")


def test_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    records = as_records(tmp_path / "data", {"a": clip(2)})
    (one, two) = make_priors(records, FlowMagnitude())
    assert one.prior.is_relative_to(tmp_path / "vsod" / "priors") and two.prior.is_file()


def test_a_picture_of_another_size_in_a_sequence(tmp_path):
    records = as_records(tmp_path, {"a": clip(3)})
    cv2.imwrite(str(records[1].image), texture(0, 40, 40))
    with pytest.raises(InputError, match=r"sequence a, frames 00000 and 00001: .*96x72 and 40x40"):
        make_priors(records, FlowMagnitude(), tmp_path / "cache")


def test_the_map_is_the_mean_over_the_scales():
    pictures, _ = clip()
    model = statistics_prior()
    flow = optical_flow(pictures[0], pictures[1], 256)
    single = []
    for scale in model.scales:
        other = statistics_prior(scales=(scale,))
        other.load_state_dict(model.state_dict())
        single.append(other.from_flow(flow))
    assert not np.allclose(*single)
    np.testing.assert_allclose(model.from_flow(flow), np.mean(single, 0), atol=1e-6)


def test_training_names_what_it_cannot_learn_from(tmp_path):
    records = as_records(tmp_path / "sizes", {"a": clip(3)})
    cv2.imwrite(str(records[2].image), texture(0, 40, 40))
    with pytest.raises(InputError, match=r"sequence a, frames 00001 and 00002: .*96x72 and 40x40"):
        train_prior(statistics_prior(), records)
    records = as_records(tmp_path / "empty", {"a": clip(3)})
    for record in records:
        cv2.imwrite(str(record.mask), np.zeros((72, 96), np.uint8))
    with pytest.raises(InputError, match="nothing is salient in the 2 frames"):
        train_prior(statistics_prior(), records)


def test_a_full_disk_leaves_no_prior(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8)
    records = [Record("a", t, f"{t:05d}", lambda: noise, None, "train") for t in range(2)]
    monkeypatch.setattr(cache, "frame_prior", lambda *_: noise[..., 0] / np.float32(255))
    with pytest.raises(OSError, match=r"File too large: .*/00000\.png"), full_disk(1024):
        make_priors(Records("set", "train", records), FlowMagnitude(), tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_regions_work_on_a_smaller_flow():
    model = statistics_prior(region_side=50, scales=(100,))
    flow = np.full((100, 200, 2), (4, 0), np.float32)
    (labels,), features, _ = model.regions(flow)
    assert labels.shape == (25, 50) and labels.max() == 0
    assert features[0, 5] == pytest.approx(np.log1p(1))  # a quarter as long in pixels
    assert model.from_flow(flow).shape == (25, 50)


@pytest.mark.parametrize("level_classifiers", [False, True])
def test_training_tells_movers_from_the_rest(tmp_path, level_classifiers):
    clips = {f"c{i}": clip(4, speed=2 + i % 3, camera=1 - i % 2, seed=10 * i) for i in range(4)}
    records = as_records(tmp_path, clips)
    model = statistics_prior(level_classifiers=level_classifiers)
    steps = []
    report = train_prior(
        model, records, epochs=60, learning_rate=1e-2, on_step=lambda: steps.append(1)
    )
    assert report["frames"] == 12 and len(steps) == 12 + 60  # the last frames have no next one
    assert report["loss"] < 0.5 * report["loss of the mean"]
    pictures, masks = clip(2, seed=99)
    flow = optical_flow(*pictures, model.side)
    prior = model.from_flow(flow)
    assert prior[masks[0] > 0].mean() > prior[masks[0] == 0].mean() + 0.4

    model.save_pretrained(tmp_path / "prior")
    back = load_prior(tmp_path / "prior")
    np.testing.assert_array_equal(back.from_flow(flow), prior)
    assert back.key() == model.key() != statistics_prior().key()


def test_a_classifier_for_each_level():
    """Each sees the regions of its scale alone, and the mean over scales is of what they say."""
    model = statistics_prior(level_classifiers=True)
    _, features, level = model.regions(optical_flow(*clip(2)[0], 256))
    assert level.unique().tolist() == [0, 1]
    with torch.inference_mode():
        logits = model(features, level)
        x = (features - model.feature_mean) / model.feature_deviation
        for index, classifier in enumerate(model.layers):
            expected = classifier(x[level == index]).squeeze(1)
            torch.testing.assert_close(logits[level == index], expected)
        for index, classifier in enumerate(model.layers):
            torch.nn.init.zeros_(classifier[-1].weight)
            torch.nn.init.constant_(classifier[-1].bias, (-50.0, 50.0)[index])
    assert model.from_flow(np.zeros((20, 30, 2), np.float32)) == pytest.approx(0.5)
    assert "level_classifiers" not in statistics_prior().configuration, "keys of before stay"


def test_backbone_features_are_pooled_and_stay_frozen(tmp_path):
    torch.manual_seed(0)
    model = MotionPrior("vgg16", {"width": 0.0625}, scales=(100,), hidden=8)
    channels = model.backbone.channels[0]
    pictures, _ = clip(2)
    labels, features, _ = model.eval().regions(optical_flow(*pictures, 256))
    regions = labels[0].max() + 1
    assert regions > 1
    assert features.shape == (regions, STATISTICS + 3 * channels)
    own, near, frame = features[:, STATISTICS:].split(channels, 1)
    area, touch = np.bincount(labels[0].ravel()), neighbours(labels[0])
    expected = np.average(own.numpy()[touch[0]], axis=0, weights=area[touch[0]])
    np.testing.assert_allclose(near[0], expected, rtol=1e-4)
    assert torch.equal(frame, frame[:1].expand_as(frame))
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    train_prior(model, as_records(tmp_path, {"a": clip(3)}), epochs=2)
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert np.isfinite(model.from_flow(np.zeros((20, 30, 2), np.float32))).all()


def test_what_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"no such folder; `vsod prior train` .*flow-magnitude"):
        load_prior(tmp_path / "nothing")
    with pytest.raises(InputError, match="no backbone"):
        statistics_prior().load_backbone("IMAGENET1K_V1")
    records = as_records(tmp_path / "one", {"a": clip(1)})
    with pytest.raises(InputError, match="no frame with ground truth and a next frame"):
        train_prior(statistics_prior(), records)


def vsod(*arguments):
    """Exit code of the command."""
    from vsod_models.cli import main

    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    return exit.value.code


def test_commands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("typer", reason="the extra `models` is not installed")
    from vsod_models import data

    records = as_records(tmp_path / "data", {"a": clip(3)})
    monkeypatch.setattr(data, "open_dataset", lambda name, root, split: records)
    train = ("prior", "train", "set", tmp_path, "--epochs", 2)
    assert vsod(*train, "--backbone", "none", "-o", tmp_path / "prior") == 0
    assert "regions of 2 frames" in capsys.readouterr().out
    make = ("prior", "make", "set", tmp_path, "--cache", tmp_path / "cache")
    assert vsod(*make, "--prior", tmp_path / "prior") == 0
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 3

    assert vsod(*train, "--backbone", "none", "-o", tmp_path / "data") == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert vsod(*train, "-o", tmp_path / "other") == 2
    assert "needs --weights" in capsys.readouterr().err
    assert vsod(*make, "--prior", "raft") == 2
    assert capsys.readouterr().err.startswith("vsod: motion prior 'raft': no such folder")
