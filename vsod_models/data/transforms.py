"""Augmentation of clips with torchvision's v2 transforms: what moves the frames moves the masks.

A clip is a dict of `frames` tv_tensors.Video (T, 3, H, W) uint8, `masks` tv_tensors.Mask
(T, 1, H, W) uint8 and, where there is one, `prior` tv_tensors.Mask (T, 1, H, W) uint8.  Each
transform draws its parameters once a clip, so all frames get the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..limits import NotNegative, Share

Clip = dict[str, Any]


def _ascending(crop: tuple[float, float]) -> tuple[float, float]:
    if not 0 < crop[0] <= crop[1]:
        raise ValueError("it has to be two shares above 0, the smaller first")
    return crop


@dataclass(frozen=True)
class Augmentation:
    """What the paper augments with: rotation, flip, crop, colour.  0 (or (1, 1)) turns one off."""

    rotation: Annotated[NotNegative, Field(le=180)] = 10.0  # degrees, to both sides
    flip: Share = 0.5  # probability, left to right
    crop: Annotated[tuple[Share, Share], AfterValidator(_ascending)] = (
        0.6,
        1.0,
    )  # share of the area that is kept
    brightness: NotNegative = 0.3
    contrast: NotNegative = 0.3
    saturation: NotNegative = 0.3
    hue: Annotated[NotNegative, Field(le=0.5)] = 0.0  # costs as much as all the rest together
    # A still image becomes a clip by a slow camera: at most this share of the side, these degrees
    # and this zoom from one frame to the next.
    drift: Share = 0.02
    drift_rotation: NotNegative = 1.5
    drift_zoom: Share = 0.02
    # Keep the frame's aspect ratio, and warp each frame once; see `camera.py`.
    keep_aspect: bool = False
    object_motion: Share = 0.5  # share of stills whose object moves on its own (keep_aspect)
    crowd: Share = 0.0  # share of these where copies of it stand still behind it, unmasked

    def for_clips(self, size: tuple[int, int]) -> v2.Transform:
        """The transform to clips of `size` (height, width)."""
        steps: list[torch.nn.Module] = []
        if self.rotation:
            steps.append(v2.RandomRotation(self.rotation, v2.InterpolationMode.BILINEAR))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.crop == (1.0, 1.0):
            steps.append(v2.Resize(size, antialias=True))
        else:
            # Aspect ratios of the frame's own to within a fifth: videos are resized, not squared.
            ratio = (0.83, 1.2)
            steps.append(v2.RandomResizedCrop(size, self.crop, ratio, antialias=True))
        if self.brightness or self.contrast or self.saturation or self.hue:
            steps.append(
                v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
            )  # fmt: skip
        return v2.Compose(steps)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed`; afterwards it goes on as it was.

    The transforms draw from it and take no other.  The GPU's generators are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def augmented(clip: Clip, transform: v2.Transform, seed: int) -> Clip:
    """`transform(clip)`, a function of (clip, seed) alone; in a worker process or not."""
    with seeded(seed):
        return transform(clip)


def drifted(clip: Clip, augmentation: Augmentation, seed: int) -> Clip:
    """A still image that was repeated, seen by a camera that drifts: each frame its own warp.

    Shift, angle and zoom walk with steps of at most the drift of `augmentation`; the place of
    the walk's start is random, so no frame is the plain image more often than another.
    """
    frames = clip["frames"]
    steps, (height, width) = frames.shape[0], frames.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    walk = (2 * torch.rand(steps, 4, generator=generator) - 1).cumsum(0)
    walk = walk - walk[int(torch.randint(steps, (), generator=generator))]
    # Enough zoom that the walk shows no border.
    reach = math.exp(2 * augmentation.drift * float(walk[:, :2].abs().max()))
    moved: dict[str, list[torch.Tensor]] = {name: [] for name in clip}
    for t in range(steps):
        x, y, turn, zoom = walk[t].tolist()
        for name, value in clip.items():
            bilinear = isinstance(value, tv_tensors.Video)
            moved[name].append(
                functional.affine(
                    value[t : t + 1].as_subclass(torch.Tensor),
                    angle=augmentation.drift_rotation * turn,
                    translate=[augmentation.drift * x * width, augmentation.drift * y * height],
                    scale=reach * math.exp(augmentation.drift_zoom * zoom),
                    shear=[0.0, 0.0],
                    interpolation=v2.InterpolationMode.BILINEAR
                    if bilinear
                    else v2.InterpolationMode.NEAREST,
                )
            )
    return {
        name: tv_tensors.wrap(torch.cat(parts), like=clip[name]) for name, parts in moved.items()
    }
