"""The samples of a run, by number: which datasets, in which shares and sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import Records, open_dataset
from ..data.clips import ClipDataset
from ..errors import InputError
from ..labels.coarse import with_coarse_labels
from ..networks.contract import SaliencyModel
from ..prior.cache import make_priors
from ..prior.flow import PriorSource
from ..prior.motion import clip_motion
from .recipe import Config, DataConfig, Shape, Source

DRAWS = ("shares", "frames", "sequences")


class Mix(Dataset):
    """Samples by number, drawn from several clip datasets in proportion to their shares.

    parts[s][d] gives clips of dataset d in shape s; an index is (number of the sample, shape).
    without_motion: the share of samples whose `motion` (T, 4, h, w) is 0; None: they have none.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[ClipDataset]],
        shares: Sequence[float],
        seed: int,
        without_motion: float | None = None,
    ):
        self.parts, self.seed, self.without_motion = parts, seed, without_motion
        self.bounds = np.cumsum(shares) / np.sum(shares)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Tensor]:
        number, shape = index
        draw, still = np.random.default_rng((self.seed, number)).random(2)
        part = min(int(np.searchsorted(self.bounds, draw, side="right")), len(self.bounds) - 1)
        sample = self.parts[shape][part][number]
        if self.without_motion is not None:
            frames = list((255 * sample["frames"]).byte().movedim(1, -1).numpy())
            maps = clip_motion(frames)
            sample["motion"] = torch.from_numpy(maps * (still >= self.without_motion))
        return sample


class SampleNumbers(Sampler[list[tuple[int, int]]]):
    """Batches of (sample number, shape) for one epoch (the iterations between two checkpoints)."""

    def __init__(self, config: Config, rank: int, world: int, iteration: Callable[[], int]):
        self.config, self.rank, self.world, self.iteration = config, rank, world, iteration

    def __len__(self) -> int:
        left = self.config.iterations - self.iteration()
        return min(self.config.checkpoint_every, left) * self.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.iteration() * self.config.accumulate
        data = self.config.data
        clips = [s.clips for s in data.shapes] or [self.config.batch_size] * len(data.sizes)
        for batch in range(first, first + len(self)):
            turn, shape = divmod(batch, len(clips))
            before = (turn * sum(clips) + sum(clips[:shape])) * self.world
            start = before + self.rank * clips[shape]
            yield [(number, shape) for number in range(start, start + clips[shape])]


def shapes_of(config: Config, model: SaliencyModel) -> list[Shape]:
    """What batches look like, in turn."""
    data, length = config.data, model.clip_length
    if data.shapes:
        return data.shapes
    if data.clip_length not in (None, length):
        raise InputError(
            f"data.clip_length is {data.clip_length} and the model's {length}: say it once, as "
            "model.clip_length"
        )
    return [Shape(size, length, config.batch_size) for size in data.sizes]


def open_source(data: DataConfig, source: Source) -> Records:
    """The records of one source, from the folder that `data.roots` names for its dataset."""
    root = source.root or data.roots.get(source.dataset)
    if root is None and source.dataset != "synthetic":
        raise InputError(
            f"dataset {source.dataset}: say where it lies with data.roots.{source.dataset}=DIR"
        )
    records = open_dataset(source.dataset, root, source.split, **source.options)
    return records if source.labels is None else with_coarse_labels(records, source.labels)


# (title, steps) -> a context that gives what to call after each step
Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], object]]]


@contextlib.contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[], object]]:
    """Progress that is not shown."""
    yield lambda: None


def with_priors(
    sources: Sequence[Records], prior: PriorSource, data: DataConfig, progress: Progress
) -> list[Records]:
    """The records with their motion priors, made where the cache has none."""
    with progress("motion priors", sum(map(len, sources))) as step:
        return [make_priors(r, prior, data.prior_cache, on_frame=step) for r in sources]


def make_dataset(
    config: Config,
    model: SaliencyModel,
    prior: PriorSource | None = None,
    progress: Progress = silent,
) -> Mix:
    """The training mix, with motion priors by `prior` where that is not None."""
    data = config.data
    if not data.train:
        raise InputError("data.train is empty: at least one dataset is needed")
    strides: Any = "random" if data.sampling == "random" else (1, data.max_stride)
    if data.sampling not in ("adjacent", "random"):
        raise InputError(f'data.sampling must be "adjacent" or "random", got {data.sampling!r}')
    if data.draw not in DRAWS:
        raise InputError(f"data.draw must be one of {', '.join(DRAWS)}, got {data.draw!r}")
    sources = [open_source(data, source) for source in data.train]
    if prior is not None:
        sources = with_priors(sources, prior, data, progress)
    parts = [
        [
            ClipDataset(
                records,
                shape.clip_length,
                strides=strides,
                size=(shape.size[0], shape.size[1]),
                augment=data.augmentation if data.augment else None,
                seed=config.seed,
                label_weights=data.label_weights,
                cache=data.cache,
                anchor="last" if model.outputs == "last" else "any",
                by_sequence=data.draw == "sequences",
            )
            for records in sources
        ]
        for shape in shapes_of(config, model)
    ]
    shares = [source.share for source in data.train]
    if data.draw != "shares":
        shares = [share * part.drawn for share, part in zip(shares, parts[0], strict=True)]
    without = data.without_motion if model.needs_motion else None
    return Mix(parts, shares, config.seed, without)
