"""Training: recipes, batches by sample number, Lightning, checkpoints that resume to the bit.

Iterations, not epochs, are counted, as the papers do.  Sample number n is a pure function of the
seed and n, and iteration i takes the samples from i * (samples of an iteration) on.  So a run that
was killed and resumed sees what it would have seen, and so do two devices that share a batch.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import Records, open_dataset
from ..data.clips import ClipDataset
from ..data.transforms import Augmentation
from ..errors import InputError
from ..files import whole_file
from ..labels.coarse import with_coarse_labels
from ..networks.losses import mssa_loss, msst_loss
from ..networks.msst import MSST
from ..networks.saved import PretrainedModel, load_state
from ..prior.cache import make_priors
from ..prior.flow import FLOW_MAGNITUDE, frame_prior
from ..prior.load import load_prior
from ..prior.regions import MotionPrior
from ..zoo import load_model, new_model


@dataclass
class Source:
    """One dataset of the training mix."""

    dataset: str = "???"
    split: str = "train"
    share: float = 1.0  # of the samples, relative to the other sources
    labels: str | None = None  # folder of `vsod label coarse`, laid over the ground truth
    options: dict[str, Any] = field(default_factory=dict)  # of the reader


@dataclass
class DataConfig:
    train: list[Source] = field(default_factory=list)
    validation: Source | None = None
    roots: dict[str, str] = field(default_factory=dict)  # dataset -> folder
    # (height, width) of the samples; with several sizes, batches alternate between them
    sizes: list[list[int]] = field(default_factory=lambda: [[224, 224]])
    clip_length: int = 5
    sampling: str = "adjacent"  # or "random": any frames of a sequence, in order
    max_stride: int = 1  # adjacent frames of a clip are 1 to this far apart
    augment: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_weights: dict[str, float] = field(default_factory=dict)  # fine, coarse; default 1
    prior: str = "flow-magnitude"  # motion prior of MSST: this, or a folder of `vsod prior train`
    prior_cache: str | None = None  # where priors are kept; default: the user's cache folder
    cache: bool = False  # keep the resized frames in memory, in each worker
    workers: int = 2


@dataclass
class LossConfig:
    positive_weight: str = "paper"  # of MSSA; or "balanced"
    beta: float = 0.1  # of MSST: weight of the loss of O^T


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-5
    backbone_factor: float = 1.0  # learning rate of the backbone, relative
    halve_every: int = 20_000  # iterations
    warm_up: int = 0  # iterations of linear warm-up
    weight_decay: float = 0.0
    clip_gradient: float = 1.0  # norm; 0: not clipped


@dataclass
class Config:
    """Everything that decides a run; `recipes/*.yaml` fill it in."""

    out: str = "???"
    model: dict[str, Any] = field(default_factory=lambda: {"name": "mssa"})
    backbone_weights: str | None = None  # torchvision's name or a file
    # A model to start from, after that: folder, checkpoint or shipped name; MSST takes an earlier
    # stage, whose weights then replace those of the backbone where it has them.
    initial: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    iterations: int = 100_000
    batch_size: int = 4  # clips, on each device
    accumulate: int = 1  # batches an iteration
    precision: str = "32-true"  # Lightning's names: "bf16-mixed", "16-mixed"
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    seed: int = 0
    checkpoint_every: int = 500  # iterations
    validate_every: int = 5_000  # iterations; 0: never


def read_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A recipe with `key=value` (dotted, YAML values) laid over it.

    A recipe may name another one beside it, `base: other.yaml`, which it then changes.

    Raises:
        InputError: unknown key, wrong type or missing value; names the file or the override.
    """
    config = OmegaConf.structured(Config)
    for source, layer in _recipe_layers(Path(file)):
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise InputError(f"{source}: {_first_line(error)}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        try:
            value = OmegaConf.from_dotlist([f"value={text}"]).value
            OmegaConf.update(config, key, value, merge=True)
        except Exception as error:  # OmegaConf's kinds and the YAML parser's
            raise InputError(f"{override}: {_first_line(error)}") from None
    try:
        return cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise InputError(f"{file}: {_first_line(error)}") from None


def _recipe_layers(file: Path) -> list[tuple[str, Any]]:
    """A recipe after those that it is based on, each with its name."""
    try:
        loaded = OmegaConf.load(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such recipe") from None
    except Exception as error:  # the YAML parser's own kinds
        raise InputError(f"{file}: not readable as YAML ({_first_line(error)})") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{file}: a recipe is a mapping of keys to values")
    base = loaded.pop("base", None)
    return (_recipe_layers(file.parent / base) if base else []) + [(str(file), loaded)]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    key = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), ""
    )
    return lines[0] if not key or key in lines[0] else f"{key}: {lines[0]}"


class Mix(Dataset):
    """Samples by number, drawn from several clip datasets in proportion to their shares.

    parts[s][d] gives clips of dataset d at size s; batches alternate between the sizes.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[ClipDataset]],
        shares: Sequence[float],
        seed: int,
        numbers_per_size: int,
    ):
        self.parts, self.seed, self.numbers_per_size = parts, seed, numbers_per_size
        self.bounds = np.cumsum(shares) / np.sum(shares)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        draw = np.random.default_rng((self.seed, number)).random()
        part = min(int(np.searchsorted(self.bounds, draw, side="right")), len(self.bounds) - 1)
        size = number // self.numbers_per_size % len(self.parts)
        return self.parts[size][part][number]


class SampleNumbers(Sampler[list[int]]):
    """Batches of sample numbers for one epoch (the iterations between two checkpoints)."""

    def __init__(self, config: Config, rank: int, world: int, iteration: Callable[[], int]):
        self.config, self.rank, self.world, self.iteration = config, rank, world, iteration

    def __len__(self) -> int:
        left = self.config.iterations - self.iteration()
        return min(self.config.checkpoint_every, left) * self.config.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first = self.iteration() * self.config.accumulate
        size = self.config.batch_size
        for batch in range(first, first + len(self)):
            start = (batch * self.world + self.rank) * size
            yield list(range(start, start + size))


class Task(lightning.LightningModule):
    """One iteration of a model: loss, optimiser, what is logged."""

    def __init__(self, model: PretrainedModel, config: Config):
        super().__init__()
        self.model: PretrainedModel = model
        self.config = config

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        options = self.config.loss
        masks, weight = batch["masks"], batch["valid"] * batch["weight"]
        if self.model.outputs == "last":
            masks, weight = masks[:, -1], weight[:, -1]
            prior = batch["prior"] if self.model.needs_prior else None
            logits, auxiliary = self.model(batch["frames"], prior)
            loss = msst_loss(logits, auxiliary, masks, weight, options.beta)
        else:
            logits = self.model(batch["frames"])
            loss = mssa_loss(logits, masks, weight, options.positive_weight)
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
        rest = [p for p in self.model.parameters() if id(p) not in known]
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
            return warm * 0.5 ** (iteration // options.halve_every)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = plain(self.config)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        with whole_file(path) as part:
            torch.save(checkpoint, part)


class Bar(Callback):
    """One progress bar over all iterations; where there is no terminal, a line a minute."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.active = trainer.is_global_zero
        self.bar = self.active and self.progress.console.is_terminal
        self.first, self.began = trainer.global_step, time.monotonic()
        self.told = self.began
        if self.bar:
            self.progress.start()
            self.row = self.progress.add_task(
                "training", total=trainer.max_steps, completed=trainer.global_step, rate=""
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        if not self.active:
            return
        now, done = time.monotonic(), trainer.global_step
        loss = float(trainer.callback_metrics.get("loss", float("nan")))
        rate = f"{(done - self.first) / (now - self.began):.2f} it/s"
        if self.bar:
            self.progress.update(
                self.row, completed=done, description=f"loss {loss:.4f}", rate=rate
            )
        elif now - self.told >= 60 or done == trainer.max_steps:
            self.told = now
            print(f"iteration {done} of {trainer.max_steps}, loss {loss:.4f}, {rate}", flush=True)

    def teardown(self, *rest: Any, **named: Any) -> None:
        self.progress.stop()


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
            scores, pictures = validate(task.model, self.records, self.prior)
            writer = trainer.loggers[0].experiment  # type: ignore[attr-defined]
            for name, value in scores.items():
                writer.add_scalar(f"validation/{name}", value, done)
            for name, picture in pictures.items():
                writer.add_image(f"validation/{name}", picture, done, dataformats="HWC")
            text = ", ".join(f"{k} {scores[k]:.4f}" for k in ("MAE", "maxF", "S"))
            print(f"iteration {done}: validation {text} (davsod protocol)")
        trainer.strategy.barrier()


def validate(
    model: PretrainedModel,
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


def open_source(data: DataConfig, source: Source) -> Records:
    """The records of one source, from the folder that `data.roots` names for its dataset."""
    root = data.roots.get(source.dataset)
    if root is None and source.dataset != "synthetic":
        raise InputError(
            f"dataset {source.dataset}: say where it lies with data.roots.{source.dataset}=DIR"
        )
    records = open_dataset(source.dataset, root, source.split, **source.options)
    return records if source.labels is None else with_coarse_labels(records, source.labels)


def make_dataset(config: Config, model: PretrainedModel) -> Mix:
    """The training mix, with motion priors where the model needs them (made on first use)."""
    data = config.data
    if not data.train:
        raise InputError("data.train is empty: at least one dataset is needed")
    strides: Any = "random" if data.sampling == "random" else (1, data.max_stride)
    if data.sampling not in ("adjacent", "random"):
        raise InputError(f'data.sampling must be "adjacent" or "random", got {data.sampling!r}')
    sources = [open_source(data, source) for source in data.train]
    if model.needs_prior:
        prior = load_prior(data.prior)
        with Progress(disable=not sys.stderr.isatty(), transient=True) as bar:
            row = bar.add_task("motion priors", total=sum(len(records) for records in sources))
            step = functools.partial(bar.advance, row)
            sources = [make_priors(r, prior, data.prior_cache, on_frame=step) for r in sources]
    parts = [
        [
            ClipDataset(
                records,
                data.clip_length,
                strides=strides,
                size=(size[0], size[1]),
                augment=data.augmentation if data.augment else None,
                seed=config.seed,
                label_weights=data.label_weights,
                cache=data.cache,
                anchor="last" if model.outputs == "last" else "any",
            )
            for records in sources
        ]
        for size in data.sizes
    ]
    numbers = config.batch_size * config.devices * config.nodes  # in one batch over all devices
    return Mix(parts, [source.share for source in data.train], config.seed, numbers)


def make_model(config: Config) -> PretrainedModel:
    """The model of a recipe with its initial weights, the same on every device."""
    torch.manual_seed(config.seed)
    arguments = dict(config.model)
    name = str(arguments.pop("name", "mssa"))
    if name == "msst":
        flow = config.data.prior == FLOW_MAGNITUDE
        arguments.setdefault("prior", FLOW_MAGNITUDE if flow else "regions")
    model = new_model(name, arguments, "recipe")
    if config.backbone_weights is not None:
        model.load_backbone(config.backbone_weights)
    if config.initial is not None:
        initial = load_model(config.initial).state_dict()
        if isinstance(model, MSST):  # of an earlier stage, which may have fewer parts
            model.load_stage(initial, config.initial)
        else:
            load_state(model, initial, config.initial)
    return model


def train(config: Config, *, resume: bool = False) -> Path:
    """Trains as the configuration says.

    The run folder `config.out` gets config.yaml, last.ckpt, TensorBoard's curves, and at the end
    model/ (for `load_model`).

    Args:
        config: see :func:`read_config`.
        resume: go on from last.ckpt in the run folder; from the start where it is missing.

    Returns:
        the folder of the trained model.

    Raises:
        InputError: a run folder that is in use, a recipe that cannot be met, data that is missing.
    """
    out = Path(config.out)
    last = out / "last.ckpt"
    start = 0
    if resume and last.exists():
        start = check_same(config, last)
    elif not resume and last.exists() and "LOCAL_RANK" not in os.environ:
        raise InputError(f"{out}: holds a run already; --resume goes on with it")
    if config.loss.positive_weight not in ("paper", "balanced"):
        raise InputError(
            'loss.positive_weight must be "paper" or "balanced", '
            f"got {config.loss.positive_weight!r}"
        )
    model = make_model(config)
    dataset = make_dataset(config, model)
    task = Task(model, config)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists")  # it is the run folder
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    callbacks: list[Callback] = [
        Bar(),
        ModelCheckpoint(
            dirpath=out, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        ),
    ]
    if config.data.validation is not None and config.validate_every:
        callbacks.insert(1, Validation(config))
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
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"precision, accelerator, devices or nodes: {error}") from None
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
        device = trainer.strategy.root_device
        print(
            f"vsod train: {type(model).__name__} on {device} x {trainer.world_size}, "
            f"{config.precision}, iterations {start} to {config.iterations}, into {out}"
        )
        with whole_file(out / "config.yaml") as part:
            part.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    trainer.fit(task, loader, ckpt_path=last if start else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.is_global_zero:
        model.save_pretrained(out / "model")
        if model.needs_prior and config.data.prior != FLOW_MAGNITUDE:
            prior = load_prior(config.data.prior)
            assert isinstance(prior, MotionPrior)
            prior.save_pretrained(out / "model" / "prior")  # so that the folder is all one needs
    return out / "model"


def check_same(config: Config, last: Path) -> int:
    """The iteration of a checkpoint, if it belongs to this configuration."""
    try:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        before, iteration = checkpoint["config"], int(checkpoint["global_step"])
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(f"{last}: not a checkpoint ({type(error).__name__})") from None
    now = plain(config)
    free = ("out", "iterations", "accelerator", "validate_every")
    changed = [k for k in now if k not in free and now[k] != before.get(k)]
    if changed:
        raise InputError(
            f"{last}: this run was started with another {', '.join(changed)}; resume it with the "
            "configuration beside it (config.yaml), or choose another out="
        )
    return iteration


def plain(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(k): v for k, v in container.items()}
