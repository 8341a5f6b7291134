"""The samples of a run, by number: which datasets, in which shares and sizes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import Records, open_dataset
from ..data.clips import ClipDataset
from ..errors import InputError
from ..labels.coarse import with_coarse_labels
from ..networks.saved import PretrainedModel
from ..prior.cache import make_priors
from ..prior.load import load_prior
from .recipe import Config, DataConfig, Source


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
