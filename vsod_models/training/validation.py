"""Scores of a model on a dataset while it trains."""

from __future__ import annotations

import functools
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback

from ..data import Records
from ..media.views import side_by_side
from ..networks.contract import SaliencyModel
from ..prior.flow import PriorSource, frame_prior
from .recipe import Config


class Validation(Callback):
    """Scores by the davsod protocol, and masks of a few frames, into TensorBoard."""

    def __init__(self, config: Config, records: Records, prior: PriorSource | None):
        self.config, self.records, self.prior = config, records, prior

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
    prior: PriorSource | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Scores over all sequences, and the middle frame of the first three beside its mask.

    prior: for records without motion priors of their own.
    """
    from ..evaluation import SaliencyEvaluator
    from ..prediction import Recorded, VideoPredictor

    training = model.training
    evaluator = SaliencyEvaluator(protocol="davsod")
    pictures: dict[str, np.ndarray] = {}
    device = next(model.parameters()).device
    make_prior = None if prior is None else functools.partial(frame_prior, prior)
    predictor = VideoPredictor(model, device, prior=make_prior)
    try:
        for name, frames in records.sequences.items():
            for record, result in zip(frames, predictor.stream(Recorded(frames)), strict=True):
                mask = record.read_mask(evaluator.protocol.mask_above)
                if mask is not None:
                    evaluator.add(name, record.name, result.saliency, mask)
                if len(pictures) < 3 and result.index == len(frames) // 2:
                    pictures[name] = side_by_side(result.frame, result.saliency, (0, 0, 0))
    finally:
        model.train(training)
    return evaluator.result().overall, pictures
