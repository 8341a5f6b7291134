"""Scores of a model on a dataset while it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback

from ..data import Records
from ..networks.contract import SaliencyModel
from ..prior.flow import frame_prior
from ..prior.load import load_prior
from .recipe import Config
from .samples import open_source


class Validation(Callback):
    """Scores by the davsod protocol, and masks of a few frames, into TensorBoard."""

    def __init__(self, config: Config):
        self.config = config
        source = config.data.validation
        assert source is not None
        self.records = open_source(config.data, source)
        self.prior = functools.partial(frame_prior, load_prior(config.data.prior))

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: Any) -> None:
        every = self.config.validate_every
        done = trainer.global_step
        if not (done % every < self.config.checkpoint_every or done >= self.config.iterations):
            return
        if trainer.is_global_zero:
            scores, pictures = validate(task.result, self.records, self.prior)
            writer = trainer.loggers[0].experiment  # type: ignore[attr-defined]
            for name, value in scores.items():
                writer.add_scalar(f"validation/{name}", value, done)
            for name, picture in pictures.items():
                writer.add_image(f"validation/{name}", picture, done, dataformats="HWC")
            text = ", ".join(f"{k} {scores[k]:.4f}" for k in ("MAE", "maxF", "S"))
            print(f"iteration {done}: validation {text} (davsod protocol)")
        trainer.strategy.barrier()


def validate(
    model: SaliencyModel,
    records: Records,
    prior: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores over all sequences, and the middle frame of the first three beside its mask."""
    from ..evaluation import SaliencyEvaluator
    from ..prediction import VideoPredictor

    training = model.training
    evaluator = SaliencyEvaluator(protocol="davsod")
    pictures: dict[str, np.ndarray] = {}
    device = next(model.parameters()).device
    predictor = VideoPredictor(model, device, prior=prior)
    try:
        for name, frames in records.sequences.items():
            images = [record.read_image() for record in frames]
            maps = predictor.predict_clip(images)
            for record, saliency in zip(frames, maps, strict=True):
                mask = record.read_mask(evaluator.protocol.mask_above)
                if mask is not None:
                    evaluator.add(name, record.name, saliency, mask)
            if len(pictures) < 3:
                middle = len(frames) // 2
                grey = (maps[middle] * 255).round().astype(np.uint8)[:, :, None].repeat(3, 2)
                pictures[name] = np.concatenate([images[middle], grey], 1)
    finally:
        model.train(training)
    return evaluator.result().overall, pictures
