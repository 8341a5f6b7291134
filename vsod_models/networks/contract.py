"""What a model promises: to prediction and export, and on top of that to training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn

from .losses import LossOptions
from .saved import PretrainedModel, load_state

MOTION_CHANNELS, MOTION_STRIDE = 4, 4  # of the maps of `vsod_models.prior.motion`


class SaliencyModel(nn.Module, ABC):
    """A model that says what is salient in the frames of a window.

    `encode` sees each frame on its own.  Its maps are kept while windows slide over a video, and
    `decode` combines those of one window.
    """

    clip_length: int  # frames of a window
    image_size: tuple[int, int]  # (height, width) it is trained at
    outputs: Literal["all", "last"]  # which frames of a window get a mask
    needs_prior: bool = False  # whether `encode` takes a motion prior beside the frames
    needs_motion: bool = False  # or their motion, made from neighbouring frames as they come
    # Frames keep their aspect ratio: prediction resizes them to about as many pixels as
    # `image_size` has, with sides that are multiples of this.  None: to `image_size` itself.
    side_multiple: int | None = None
    # Who wrote it, where not this package: its errors say so, and prediction changes nothing in it
    # and takes no fewer bits than it was given unless told to.
    source: str = ""
    terms: str = ""  # what its weights may be used for, where that is limited

    @abstractmethod
    def encode(self, frames: Tensor, prior: Tensor | None = None) -> list[Tensor]:
        """Maps of each frame alone.

        frames (B, T, 3, H, W) RGB in [0, 1]; prior (B, T, 1, H, W) in [0, 1] for `needs_prior`, the
        maps (B, T, 4, H / 4, W / 4) of `vsod_models.prior.motion` for `needs_motion`
        -> any number of (B, T, C, h, w).
        """

    @abstractmethod
    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps of a window -> logits (B, T, 1, H, W), or (B, 1, H, W) where `outputs` is "last".

        size is (H, W).
        """


class Loss(NamedTuple):
    """The loss of a batch and what it compares: shapes (B, T, ..) or, of last frames, (B, ..)."""

    value: Tensor  # a scalar
    logits: Tensor  # (.., 1, H, W)
    masks: Tensor  # (.., 1, H, W), 0 or 1
    weight: Tensor  # (..), 0 where there is no ground truth


class Trainable(SaliencyModel, PretrainedModel):
    """A model that can be trained from a recipe, and saved.

    Its arguments are the recipe's `model`; one called `prior`, if there is one, is the kind of
    motion prior that it is trained with: "flow-magnitude" or "regions".
    """

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor], options: LossOptions) -> Loss:
        """The loss of a batch: samples of :class:`vsod_models.data.clips.ClipDataset`, stacked."""

    @abstractmethod
    def load_backbone(self, weights: str | Path) -> None:
        """ImageNet weights: a torchvision name or a file; see `Backbone.load_weights`."""

    @abstractmethod
    def backbone_parameters(self) -> list[nn.Parameter]:
        """What `load_backbone` fills; it may train at another rate than the rest."""

    def load_initial(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Starts from the weights of another model of the same kind; InputError names `source`."""
        load_state(self, state, source)
