"""What prediction asks of any model, and training of one of ours: nothing else, and by no name."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("av")
pytest.importorskip("cv2")

import cv2

import vsod_models
from vsod_models.cli.app import in_flags
from vsod_models.networks.contract import Loss, SaliencyModel, Trainable
from vsod_models.prediction import VideoPredictor
from vsod_models.prior.flow import FlowMagnitude
from vsod_models.prior.motion import clip_motion
from vsod_models.prior.regions import MotionPrior
from vsod_models.training.recipe import read_config
from vsod_models.training.run import train


class Bright(SaliencyModel):
    """A foreign model: bright is salient."""

    clip_length, image_size, outputs = 3, (16, 24), "all"

    def encode(self, frames, prior=None):
        return [frames.mean(2, keepdim=True)]

    def decode(self, maps, size):
        return 20 * (maps[0] - 0.5)


class Toy(Trainable):
    """The least that trains."""

    outputs = "all"

    def __init__(self, clip_length: int = 2):
        super().__init__()
        self.clip_length, self.image_size = clip_length, (32, 32)
        self.layer = nn.Conv2d(3, 1, 1)

    def encode(self, frames, prior=None):
        return [self.layer(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])]

    def decode(self, maps, size):
        return maps[0]

    def loss(self, batch, options):
        logits = self.decode(self.encode(batch["frames"]), (32, 32))
        weight = batch["valid"] * batch["weight"]
        return Loss((logits - batch["masks"]).square().mean(), logits, batch["masks"], weight)

    def load_backbone(self, weights):
        raise NotImplementedError

    def backbone_parameters(self):
        return []


def test_a_foreign_model_predicts():
    frames = [np.zeros((20, 30, 3), np.uint8) for _ in range(4)]
    for frame in frames:
        frame[:, :15] = 255
    for saliency in VideoPredictor(Bright(), "cpu").predict_clip(frames):
        assert saliency.shape == (20, 30)
        assert saliency[:, :10].min() > 0.99 and saliency[:, 20:].max() < 0.01


class Follows(Bright):
    """What moves is salient."""

    needs_motion = True

    def encode(self, frames, prior=None):
        return [F.interpolate(prior[0, :, 3:], frames.shape[-2:])[None]]

    def decode(self, maps, size):
        return maps[0]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_a_model_gets_the_motion_of_neighbouring_frames(count):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    texture = cv2.GaussianBlur(noise, (0, 0), 2)
    frames = []
    for t in range(count):
        frames.append(texture[:32, :48].copy())
        frames[-1][8:24, 4 + 3 * t : 20 + 3 * t] = texture[-16:, -16:]
    model = Follows()
    model.image_size = (32, 48)
    made = VideoPredictor(model, "cpu").predict_clip(frames)
    for one, (*_, length) in zip(made, clip_motion(frames), strict=True):
        wanted = 1 / (1 + np.exp(-cv2.resize(length, (48, 32), interpolation=cv2.INTER_NEAREST)))
        np.testing.assert_allclose(one, wanted, atol=1e-5)
    assert (count > 1) == any((one > 0.55).any() for one in made)


def test_what_a_model_has_to_have():
    class Half(SaliencyModel):
        def encode(self, frames, prior=None):
            return []

    with pytest.raises(TypeError, match="decode"):
        Half()
    prior = MotionPrior(None)
    for name in ("clip_length", "outputs", "needs_prior", "backbone_parameters", "loss"):
        assert not hasattr(prior, name)


RECIPE = """
model: {name: toy}
data:
  train: [{dataset: synthetic, options: {clips: 2, frames: 3, size: [32, 32]}}]
  sizes: [[32, 32]]
  workers: 0
iterations: 2
batch_size: 2
accelerator: cpu
checkpoint_every: 2
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Trains a model of a class, with changes to the recipe above."""

    def run(cls, *changes, **options):
        monkeypatch.setattr("vsod_models.training.run.model_class", lambda name, source: cls)
        (tmp_path / "toy.yaml").write_text(RECIPE)
        config = read_config(tmp_path / "toy.yaml", [f"out={tmp_path / 'run'}", *changes])
        return cls.from_pretrained(train(config, **options))

    return run


def test_training_knows_no_model_by_name(toy, tmp_path):
    done = toy(Toy)
    assert done.clip_length == 2
    # A checkpoint from when recipes said the clip length again goes on, too.
    last = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["config"]["data"]["clip_length"] = 2
    torch.save(checkpoint, last)
    more = toy(Toy, "iterations=4", resume=True)
    assert not torch.equal(done.layer.weight, more.layer.weight)


class Moving(Toy):
    needs_prior = True

    def encode(self, frames, prior=None):
        assert prior.shape == (*frames.shape[:2], 1, *frames.shape[3:])
        return super().encode(torch.cat([frames[:, :, :2], prior], 2))

    def loss(self, batch, options):
        batch = batch | {"frames": torch.cat([batch["frames"][:, :, :2], batch["prior"]], 2)}
        logits = self.decode(super().encode(batch["frames"]), (32, 32))
        weight = batch["valid"] * batch["weight"]
        return Loss((logits - batch["masks"]).square().mean(), logits, batch["masks"], weight)


def test_the_prior_of_a_run_is_loaded_once_and_its_maps_are_kept(toy, tmp_path, monkeypatch):
    loaded, made, moved = [], [], []

    class Source(FlowMagnitude):
        def to(self, device):
            moved.append(device)
            return self

        def from_flow(self, flow):
            made.append(1)
            return super().from_flow(flow)

    def load(source):
        loaded.append(source)
        return Source()

    monkeypatch.setattr("vsod_models.training.run.load_prior", load)
    changes = [
        f"data.prior_cache={tmp_path / 'priors'}",
        "data.validation={dataset: synthetic, split: val, options: {clips: 1, frames: 3}}",
        "validate_every=1",
        "checkpoint_every=1",
    ]
    toy(Moving, *changes)
    assert loaded == ["flow-magnitude"] and moved == [torch.device("cpu")]
    # Two clips to train on and one that is scored twice, of three frames each.
    assert len(made) == 9 == len(list((tmp_path / "priors").rglob("*.png")))


def test_no_file_is_longer_than_600_lines():
    root = Path(vsod_models.__file__).parent.parent
    for folder in ("vsod_ops", "vsod_models", "benchmarks", "docs"):
        for file in (root / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 600, file


def test_the_library_says_no_flags():
    package = Path(vsod_models.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent.name != "cli":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.search(r"(?<![\w-])--[a-z]", node.value), (file, node.value)


def test_the_command_says_flags_where_the_library_says_arguments():
    for argument, flag in (
        ("a.mp4: exists already; give another name or overwrite=True", "name or --overwrite"),
        ("no saliency map (allow_missing=True skips such frames)", r"(--allow-missing skips"),
        ("view must be one of mask, got x", "--as must be one of mask, got x"),
        ("a.mp4: .mp4 has no alpha; take view='cutout'", "take --as cutout"),
        ("host 0.0.0.0 needs a token: everybody", "--host 0.0.0.0 needs --token: everybody"),
        ("a review must be read", "a review must be read"),
    ):
        assert flag in in_flags(argument)
