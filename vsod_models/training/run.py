"""A training run: loss, optimiser, checkpoints, from the first iteration to the saved model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import InputError, Stopped, one_line
from ..files import locked, whole_file, whole_folder
from ..limits import check_plain
from ..networks.contract import Trainable
from ..networks.losses import POSITIVE_WEIGHTS
from ..networks.saved import PretrainedModel, build_model, current_names
from ..prior.flow import FLOW_MAGNITUDE
from ..prior.load import load_prior
from ..zoo import load_model, model_class
from .recipe import RECIPES, Config, plain, read_config
from .samples import (
    Progress,
    SampleNumbers,
    make_dataset,
    open_source,
    silent,
    with_priors,
)
from .validation import Validation


class Task(lightning.LightningModule):
    """One iteration of a model: loss, optimiser, what is logged."""

    def __init__(self, model: Trainable, config: Config):
        super().__init__()
        self.model: Trainable = model
        self.config = config
        for name in config.optimizer.freeze:
            try:
                model.get_submodule(name).requires_grad_(False)
            except AttributeError:
                raise InputError(f"optimizer.freeze: the model has no part {name!r}") from None
        if config.optimizer.average:
            self.average = copy.deepcopy(model).requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        for name in self.config.optimizer.freeze:
            self.model.get_submodule(name).eval()

    def on_train_batch_end(self, *rest: Any) -> None:
        if self.config.optimizer.average:
            # Follows faster at first, so that the initial weights do not linger.
            early = (1 + self.global_step) / (10 + self.global_step)
            keep = min(self.config.optimizer.average, early)
            means, values = self.average.state_dict().values(), self.model.state_dict().values()
            with torch.no_grad():
                for mean, now in zip(means, values, strict=True):
                    if mean.is_floating_point():
                        mean.lerp_(now, 1 - keep)
                    else:
                        mean.copy_(now)

    @property
    def result(self) -> Trainable:
        """What is validated and saved."""
        return self.average if self.config.optimizer.average else self.model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss, logits, masks, weight = self.model.loss(batch, self.config.loss)
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is not finite at iteration {self.global_step}: a lower "
                "optimizer.learning_rate or precision=32-true may help; the last checkpoint is kept"
            )
        known = (weight > 0).float()
        with torch.no_grad():
            error = (logits.float().sigmoid() - masks).abs().mean((-3, -2, -1))
            self.log("MAE", (error * known).sum() / known.sum().clamp(min=1))
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        options = self.config.optimizer
        backbone = self.model.backbone_parameters()
        known = {id(p) for p in backbone}
        rest = [p for p in self.model.parameters() if id(p) not in known and p.requires_grad]
        backbone = [p for p in backbone if p.requires_grad]
        rate = options.learning_rate
        optimizer = torch.optim.Adam(
            [
                {"params": rest, "lr": rate},
                {"params": backbone, "lr": rate * options.backbone_factor},
            ],
            weight_decay=options.weight_decay,
        )

        def factor(iteration: int) -> float:
            warm = min(1.0, (iteration + 1) / (options.warm_up + 1))
            halvings = iteration // options.halve_every if options.halve_every else 0
            left = self.config.iterations - iteration
            fall = 1.0
            if left < options.decay:
                fall = 0.5 - 0.5 * math.cos(math.pi * left / options.decay)
            return warm * fall * 0.5**halvings

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = plain(self.config)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written completely or not at all."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        try:
            with whole_file(path) as part:
                torch.save(checkpoint, part)
        except RuntimeError as error:  # torch does not say that the disk is full
            raise InputError(
                f"{path}: cannot be written, is the disk full? ({one_line(error)}); the checkpoint "
                "before it is kept"
            ) from None


def make_model(config: Config) -> Trainable:
    """The model of a recipe with its initial weights, the same on every device."""
    torch.manual_seed(config.seed)
    arguments = dict(config.model)
    name = str(arguments.pop("name", "mssa"))
    cls = model_class(name, "recipe")
    if "prior" in inspect.signature(cls).parameters:
        flow = config.data.prior == FLOW_MAGNITUDE
        arguments.setdefault("prior", FLOW_MAGNITUDE if flow else "regions")
    model = build_model(cls, arguments, "recipe")
    if config.backbone_weights is not None:
        model.load_backbone(config.backbone_weights)
    if config.initial is not None:
        check_initial(config.initial)
        model.load_initial(load_model(config.initial).state_dict(), config.initial)
    return model


def check_initial(source: str) -> None:
    """InputError that says which recipe makes an earlier stage, where its model is not there."""
    folder = Path(source)
    if folder.exists() or folder.name != "model":  # else `load_model` knows what it is
        return
    how = "train it first, or say where it lies with initial=FOLDER"
    for file in sorted(RECIPES.glob("*.yaml")):
        if read_config(file).out == str(folder.parent):
            how = f"recipe {file.stem} makes it, or initial=FOLDER says where it lies"
    raise InputError(f"initial: {folder}: no such model of an earlier stage; {how}")


def train(
    config: Config,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: Progress = silent,
) -> Path:
    """Trains as the configuration says.

    The run folder `config.out` gets config.yaml, last.ckpt, TensorBoard's curves, and at the end
    model/ (for `load_model`).

    Args:
        config: see :func:`read_config`.
        resume: go on from last.ckpt in the run folder; from the start where it is missing.
        callbacks: of Lightning, such as a progress bar.
        progress: what shows how far the motion priors are, see `Progress`.

    Returns:
        the folder of the trained model.

    Raises:
        InputError: a run folder that is in use, a recipe that cannot be met, data that is missing.
        Stopped: by Ctrl-C or SIGTERM; says what is kept.
    """
    check_plain(Config, plain(config), "recipe")
    # Processes of the same run, which the first one starts, share its lock.
    first = not any(int(os.environ.get(rank, 0)) for rank in ("LOCAL_RANK", "NODE_RANK"))
    try:
        with locked(config.out, "a training") if first else contextlib.nullcontext():
            return _run(config, resume, callbacks, progress)
    except KeyboardInterrupt:
        last = Path(config.out) / "last.ckpt"
        kept = "stopped before the first checkpoint: nothing is kept"
        if last.exists():
            kept = f"stopped: {last} is the last checkpoint; resume=True goes on from it"
        raise Stopped(kept) from None


def _run(config: Config, resume: bool, callbacks: Sequence[Callback], progress: Progress) -> Path:
    out = Path(config.out)
    last = out / "last.ckpt"
    start = 0
    if resume and last.exists():
        start = check_same(config, last)
    elif not resume and last.exists() and "LOCAL_RANK" not in os.environ:
        raise InputError(f"{out}: holds a run already; resume=True goes on with it")
    if config.loss.positive_weight not in POSITIVE_WEIGHTS:
        raise InputError(
            f"loss.positive_weight must be one of {', '.join(POSITIVE_WEIGHTS)}, "
            f"got {config.loss.positive_weight!r}"
        )
    model = make_model(config)
    task = Task(model, config)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists")  # it is the run folder
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    all_callbacks: list[Callback] = [
        *callbacks,
        ModelCheckpoint(
            dirpath=out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        ),
    ]
    try:
        trainer = lightning.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy="ddp" if config.devices * config.nodes > 1 else "auto",
            precision=config.precision,  # type: ignore[arg-type]
            max_steps=config.iterations,
            max_epochs=-1,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.optimizer.clip_gradient or None,
            use_distributed_sampler=False,
            sync_batchnorm=torch.cuda.is_available() and config.devices * config.nodes > 1,
            logger=TensorBoardLogger(out, name="", version="curves", purge_step=start or None),
            log_every_n_steps=min(10, config.checkpoint_every),
            callbacks=all_callbacks,
            plugins=[WholeCheckpoints()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"precision, accelerator, devices or nodes: {error}") from None
    prior = None
    if model.needs_prior:
        prior = load_prior(config.data.prior).to(trainer.strategy.root_device)
    dataset = make_dataset(config, model, prior, progress)
    if config.data.validation is not None and config.validate_every:
        records = open_source(config.data, config.data.validation)
        if prior is not None:
            (records,) = with_priors([records], prior, config.data, progress)
        trainer.callbacks.insert(0, Validation(config, records, prior))  # type: ignore[attr-defined]
    loader = DataLoader(
        dataset,
        batch_sampler=SampleNumbers(
            config, trainer.global_rank, trainer.world_size, lambda: trainer.global_step
        ),
        num_workers=config.data.workers,
        persistent_workers=config.data.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    if trainer.is_global_zero:
        with whole_file(out / "config.yaml") as part:
            part.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    try:
        trainer.fit(task, loader, ckpt_path=last if start else None, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    except Exception as error:
        if _came_of_ctrl_c(error):
            raise KeyboardInterrupt from None
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        made = copy.deepcopy(task.result)
        made.terms = config.terms
        try:
            with whole_folder(out / "model", replace=True) as part:
                (made.half() if config.half else made).save_pretrained(part)
                if isinstance(prior, PretrainedModel):
                    prior.save_pretrained(part / "prior")  # so that the folder is all one needs
        except SafetensorError as error:  # a full disk
            raise InputError(f"{out / 'model'}: cannot be written: {one_line(error)}") from None
    return out / "model"


def check_same(config: Config, last: Path) -> int:
    """The iteration of a checkpoint, if it belongs to this configuration."""
    try:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        # What the configuration has gained since then was at its default.
        before = plain(OmegaConf.merge(OmegaConf.structured(Config), checkpoint["config"]))
        iteration = int(checkpoint["global_step"])
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(f"{last}: not a checkpoint ({type(error).__name__})") from None
    now = plain(config)
    for one, source in ((before, str(last)), (now, "recipe")):
        del one["data"]["clip_length"]  # the model's, which is compared
        cls = model_class(one["model"].get("name", "mssa"), source)
        one["model"] = current_names(cls, one["model"], source)
    free = ("out", "iterations", "accelerator", "validate_every")
    changed = [k for k in now if k not in free and now[k] != before.get(k)]
    if changed:
        raise InputError(
            f"{last}: this run was started with another {', '.join(changed)}; resume it with the "
            "configuration beside it (config.yaml), or choose another out="
        )
    return iteration


def _came_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether it was raised while Ctrl-C was being handled, by what ends a run half-way."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
