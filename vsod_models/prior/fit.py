"""Fitting the region network of the motion prior to ground truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.records import Records
from ..errors import InputError
from .flow import naming, optical_flow
from .regions import MotionPrior, pooled


def region_samples(
    model: MotionPrior, records: Records, count: int, *, on_frame: Callable[[], object]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Features (R, F), scale, salient share and area share (R,) of the regions of `count` frames.

    The frames are spread evenly over all that have ground truth and a next frame.
    """
    pairs = [
        (a, b)
        for frames in records.sequences.values()
        for a, b in itertools.pairwise(frames)
        if a.mask is not None
    ]
    if not pairs:
        raise InputError(
            f"{records.dataset} {records.split}: no frame with ground truth and a next frame"
        )
    for i in np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)):
        record, following = pairs[i]
        mask = record.read_mask()
        assert mask is not None
        pictures = record.read_image(), following.read_image()
        with naming(record, following):
            flow = optical_flow(*pictures, model.side)
        segmentations, features, level = model.regions(flow)
        size = segmentations[0].shape[::-1]
        mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        shares = np.concatenate([pooled(labels, mask[None])[:, 0] for labels in segmentations])
        area = np.concatenate(
            [np.bincount(labels.ravel()) / labels.size for labels in segmentations]
        )
        on_frame()
        yield features, level, torch.from_numpy(shares), torch.from_numpy(area.astype(np.float32))


def train_prior(
    model: MotionPrior,
    records: Records,
    *,
    frames: int = 300,
    epochs: int = 30,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Fits the region network; its backbone stays as it is.

    The target of a region is the share of its pixels that is salient, its weight its area; both
    classes weigh the same in all.

    Args:
        model: gets its feature statistics and weights.
        frames: how many, spread evenly.
        on_step: called after each frame and after each epoch, frames + epochs times at most.

    Returns:
        "loss", and "loss of the mean" for a model that always answers the mean; the numbers of
        "regions" and "frames".

    Raises:
        InputError: no ground truth, or one where nothing or everything is salient.
    """
    samples = list(region_samples(model, records, frames, on_frame=on_step))
    features, level, target, area = (
        torch.cat([sample[i].cpu() for sample in samples]) for i in range(4)
    )
    if not 0 < target.mean() < 1:
        what = "everything" if target.any() else "nothing"
        raise InputError(
            f"{records.dataset} {records.split}: {what} is salient in the {len(samples)} frames to "
            "learn from"
        )
    salient = ((target * area).sum() / area.sum()).clamp(0.01, 0.99)
    weight = area * (target / salient + (1 - target) / (1 - salient))
    # a soft target with one weight for each class: the balanced target is what both give together
    target = target / salient / (target / salient + (1 - target) / (1 - salient))
    weight = weight / weight.mean()

    device = model.feature_mean.device
    model.feature_mean.copy_(features.mean(0))
    model.feature_deviation.copy_(features.std(0, correction=0).clamp(min=1e-6))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.layers.parameters(), learning_rate, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(256):
            logits = model(features[rows].to(device), level[rows].to(device))
            losses = F.binary_cross_entropy_with_logits(
                logits, target[rows].to(device), weight[rows].to(device)
            )
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
        on_step()
    model.eval()
    with torch.inference_mode():
        logits = torch.cat(
            [
                model(rows.to(device), levels.to(device)).cpu()
                for rows, levels in zip(features.split(4096), level.split(4096), strict=True)
            ]
        )
    loss = F.binary_cross_entropy_with_logits(logits, target, weight)
    constant = torch.logit((weight * target).sum() / weight.sum()).expand_as(target)
    mean_loss = F.binary_cross_entropy_with_logits(constant, target, weight)
    return {
        "loss": loss.item(),
        "loss of the mean": mean_loss.item(),
        "regions": len(features),
        "frames": len(samples),
    }
