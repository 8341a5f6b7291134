"""What prediction asks of any model, and training of one of ours: nothing else, and by no name."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("av")

from vsod_models.networks.contract import Loss, SaliencyModel, Trainable
from vsod_models.prediction import VideoPredictor
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


def test_what_a_model_has_to_have():
    class Half(SaliencyModel):
        def encode(self, frames, prior=None):
            return []

    with pytest.raises(TypeError, match="decode"):
        Half()
    prior = MotionPrior(None)
    for name in ("clip_length", "outputs", "needs_prior", "backbone_parameters", "loss"):
        assert not hasattr(prior, name)


def test_training_knows_no_model_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("vsod_models.training.run.model_class", lambda name: Toy)
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("""
model: {name: toy}
data:
  train: [{dataset: synthetic, options: {clips: 2, frames: 3, size: [32, 32]}}]
  sizes: [[32, 32]]
  clip_length: 2
  workers: 0
iterations: 2
batch_size: 2
accelerator: cpu
checkpoint_every: 2
""")
    folder = train(read_config(recipe, [f"out={tmp_path / 'run'}"]))
    loaded = Toy.from_pretrained(folder)
    assert loaded.clip_length == 2
    start = train(read_config(recipe, [f"out={tmp_path / 'other'}", "iterations=1"]))
    assert not torch.equal(loaded.layer.weight, Toy.from_pretrained(start).layer.weight)
