"""Clips for training: sample i is a function of (seed, i), for any i."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..errors import InputError
from . import camera
from .records import Record, Records, grey, read_as_stored
from .transforms import Augmentation, augmented, drifted

Sample = dict[str, torch.Tensor]

# Frames are kept this much larger than the sample, for crops to choose from.
MARGIN = 8 / 7


class ClipDataset(Dataset[Sample]):
    """Clips of `clip_length` frames of `size` (height, width).

    Sample i, for any i >= 0, whatever `len()` says:

        frames  (T, 3, H, W) float32 in [0, 1], RGB
        masks   (T, 1, H, W) float32, 0 or 1; 0 where the frame has no ground truth
        valid   (T,) float32, 1 where the frame has ground truth
        weight  (T,) float32, `label_weights` of the frame's kind of label
        prior   (T, 1, H, W) float32 in [0, 1], when every record has a motion prior

    Each pass over `count` samples (`count`: frames with ground truth) visits every such frame once,
    in a new order, at a random place in its clip.  The other frames of the clip are
    neighbours at a stride drawn from `strides` (low, high), or with strides="random" any frames
    of the sequence, in order.  With anchor="last" the frame with ground truth is the last one of
    its clip.  With by_sequence=True a pass is one over the sequences, of each a random frame with
    ground truth, so that long ones count no more than short ones.  Sequences that are too short
    go back and forth; a sequence of one frame is a still image, repeated under a drifting camera
    when there is augmentation.

    cache=True keeps the frames, resized to 8/7 of `size`, in memory: 0.26 MB a frame at 224x224,
    in each worker process.
    """

    def __init__(
        self,
        records: Records,
        clip_length: int = 5,
        *,
        strides: tuple[int, int] | Literal["random"] = (1, 1),
        size: tuple[int, int] = (224, 224),
        augment: Augmentation | None = None,
        seed: int = 0,
        length: int | None = None,
        label_weights: Mapping[str, float] | None = None,
        cache: bool = False,
        anchor: Literal["any", "last"] = "any",
        by_sequence: bool = False,
    ):
        if clip_length < 1:
            raise InputError(f"clip_length is {clip_length}; it has to be at least 1")
        if strides != "random" and not 1 <= strides[0] <= strides[1]:
            raise InputError(f"strides is {strides}; it has to be (low, high), 1 <= low <= high")
        self.records = records
        self.clip_length = clip_length
        self.strides = strides
        self.size = (int(size[0]), int(size[1]))
        self.augment = augment
        self.anchor = anchor
        self.seed = seed
        self.label_weights = {"fine": 1.0, "coarse": 1.0} | dict(label_weights or {})
        for kind, weight in self.label_weights.items():
            if kind not in ("fine", "coarse") or not 0 <= weight < np.inf:
                raise InputError(
                    f"label_weights.{kind} is {weight}; there are fine and coarse, 0 or more"
                )
        without = [f"{r.sequence}/{r.name}" for r in records if r.prior is None]
        self.has_prior = not without and len(records) > 0
        if 0 < len(without) < len(records):
            raise InputError(
                f"{records.dataset} {records.split}: {len(without)} of {len(records)} frames have "
                f"no motion prior (first: {without[0]})"
            )

        self.sequences = list(records.sequences.values())
        anchors = [
            (s, t)
            for s, sequence in enumerate(self.sequences)
            for t, record in enumerate(sequence)
            if record.mask is not None
        ]
        # An array, since worker processes would copy the pages of so many small objects.
        self.anchors = np.array(anchors, np.int32).reshape(-1, 2)
        if not anchors:
            raise InputError(
                f"{records.dataset} {records.split}: no frame with ground truth to train on"
            )
        # Where the anchors of each sequence that has some begin, and where the last ones end.
        self.starts = np.append(np.unique(self.anchors[:, 0], return_index=True)[1], len(anchors))
        self.by_sequence = by_sequence
        # What a pass draws once each: sequences, or frames with ground truth.
        self.drawn = len(self.starts) - 1 if by_sequence else len(anchors)
        self.length = len(self.anchors) if length is None else length
        self.transform = None if augment is None else augment.for_clips(self.size)
        margin = 1.0 if augment is None else MARGIN
        self.stored_size = (round(margin * self.size[0]), round(margin * self.size[1]))
        self.cache: dict[tuple[str, int], tuple[np.ndarray, ...]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"index {index} is negative; samples are numbered from 0")
        rng = np.random.default_rng([self.seed, 1, index])
        sequence = self.choose(index, rng)
        if self.augment is not None and self.augment.keep_aspect:
            return self.filmed(sequence, rng)
        loaded = [self.load(record) for record in sequence]
        frames, masks, *priors = (torch.from_numpy(np.stack(x)) for x in zip(*loaded, strict=True))
        clip = {"frames": tv_tensors.Video(frames.movedim(-1, 1)), "masks": as_mask(masks)}
        if priors:
            clip["prior"] = as_mask(priors[0])
        if self.augment is not None and self.transform is not None:
            still, moving = (int(x) for x in rng.integers(2**62, size=2))
            if len({(r.sequence, r.frame) for r in sequence}) == 1:
                clip = drifted(clip, self.augment, still)
            clip = augmented(clip, self.transform, moving)

        sample = {
            "frames": clip["frames"].as_subclass(torch.Tensor).float().div_(255),
            "masks": clip["masks"].as_subclass(torch.Tensor).float(),
        }
        if priors:
            sample["prior"] = clip["prior"].as_subclass(torch.Tensor).float().div_(255)
        return sample | self.labelled(sequence)

    def filmed(self, sequence: list[Record], rng: np.random.Generator) -> Sample:
        """The sample of these records by a virtual camera, see `camera.py`."""
        assert self.augment is not None
        loaded = {(r.sequence, r.frame): self.load(r, as_stored=True) for r in sequence}
        planes = [loaded[r.sequence, r.frame] for r in sequence]
        if len(loaded) == 1 and len(planes[0]) == 2:
            frames, masks = camera.still_clip(
                planes[0][0], planes[0][1], len(sequence), self.size, self.augment, rng
            )
            rows = [[mask] for mask in masks]
        else:
            frames, rows = camera.video_clip(
                [p[0] for p in planes], [p[1:] for p in planes], self.size, self.augment, rng
            )
        frames = camera.jittered(frames, self.augment, rng)
        truth, *priors = (torch.from_numpy(np.stack(x)[:, None]) for x in zip(*rows, strict=True))
        sample = {
            "frames": torch.from_numpy(np.stack(frames)).movedim(-1, 1).float().div_(255),
            "masks": (truth > 127).float(),
        }
        if priors:
            sample["prior"] = priors[0].float().div_(255)
        return sample | self.labelled(sequence)

    def labelled(self, sequence: list[Record]) -> Sample:
        """`valid` and `weight` of a sample."""
        return {
            "valid": torch.tensor([r.mask is not None for r in sequence], dtype=torch.float32),
            "weight": torch.tensor([float(self.label_weights[r.label]) for r in sequence]),
        }

    def choose(self, index: int, rng: np.random.Generator) -> list[Record]:
        """The records of sample `index`."""
        chosen = int(order(self.seed, index // self.drawn, self.drawn)[index % self.drawn])
        if self.by_sequence:
            chosen = int(rng.integers(self.starts[chosen], self.starts[chosen + 1]))
        s, t = self.anchors[chosen].tolist()
        sequence, length = self.sequences[s], self.clip_length
        if self.strides == "random":
            last = t + 1 if self.anchor == "last" else len(sequence)
            others = np.delete(np.arange(last), t)
            more = length - 1 - len(others)
            picked = rng.permutation(others)[: length - 1]
            if more > 0:
                picked = np.concatenate([picked, rng.integers(last, size=more)])
            return [sequence[int(u)] for u in np.sort(np.append(picked, t))]
        stride = int(rng.integers(self.strides[0], self.strides[1] + 1))
        # Inside the sequence where it is long enough: the anchor's place follows from its ends.
        stride = max(min(stride, (len(sequence) - 1) // max(length - 1, 1)), 1)
        low = max(0, length - 1 - (len(sequence) - 1 - t) // stride)
        high = min(length - 1, t // stride)
        place = int(rng.integers(low, high + 1)) if low <= high else int(rng.integers(length))
        if self.anchor == "last":
            place = length - 1
        first = t - place * stride
        return [sequence[reflected(first + j * stride, len(sequence))] for j in range(length)]

    def load(self, record: Record, as_stored: bool = False) -> tuple[np.ndarray, ...]:
        """Image (H, W, 3), mask (H, W) and, where there is one, prior (H, W): uint8, resized.

        as_stored: not resized, and the mask is 0 or 255.
        """
        key = (record.sequence, record.frame)
        if self.cache is not None and key in self.cache:
            return self.cache[key]
        image, mask = record.read_image(), record.read_mask()
        if mask is not None and mask.shape != image.shape[:2]:
            raise InputError(
                f"{record.mask}: the mask is {mask.shape[1]}x{mask.shape[0]}, its frame "
                f"{image.shape[1]}x{image.shape[0]}"
            )
        if as_stored:
            mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask * np.uint8(255)
            planes = [image, mask]
        elif mask is None:
            planes = [resized(image, self.stored_size)]
            planes.append(np.zeros(self.stored_size, np.uint8))
        else:
            small = resized(mask * np.uint8(255), self.stored_size)
            planes = [resized(image, self.stored_size), (small > 127).astype(np.uint8)]
        if self.has_prior and record.prior is not None:
            prior = grey(read_as_stored(record.prior)).astype(np.uint8)
            if prior.shape != image.shape[:2]:
                raise InputError(
                    f"{record.prior}: the motion prior is {prior.shape[1]}x{prior.shape[0]}, its "
                    f"frame {image.shape[1]}x{image.shape[0]}"
                )
            planes.append(prior if as_stored else resized(prior, self.stored_size))
        if self.cache is not None:
            self.cache[key] = tuple(planes)
        return tuple(planes)


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` samples in one pass over the data."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def reflected(index: int, length: int) -> int:
    """`index` folded into [0, length): 0 1 2 1 0 1 2 ... for a length of 3."""
    if length == 1:
        return 0
    index %= 2 * (length - 1)
    return min(index, 2 * (length - 1) - index)


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    shrinks = picture.shape[0] * picture.shape[1] > size[0] * size[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(picture, size[::-1], interpolation=method)


def as_mask(planes: torch.Tensor) -> tv_tensors.Mask:
    """(T, H, W) -> (T, 1, H, W)."""
    return tv_tensors.Mask(planes[:, None])
