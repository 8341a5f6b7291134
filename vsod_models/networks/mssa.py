"""MSSA: video salient object detection with multi-scale self-attention (2023).

    frames -> VGG16, frame by frame -> maps of strides 2, 4, 8, 16
      (with `motion`: to each map, what a few convolutions make of the motion beside the camera's)
      the two deepest: 1x1 convolution -> transformer blocks over all tokens of the clip, in which
        half of the heads see every token (r = 1) and half see tokens reduced by 2 in time, height
        and width (r = 2), by `vsod_ops.shunted_attention`
      decoder, deepest first: bilinear upsampling, concatenation with the next finer map (the
        spatiotemporal one, then the static ones), convolution
      -> one mask per frame

The baseline of the paper's Table I is the same network with plain transformer blocks: all heads
r = 1 (``reductions=(1,)``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from vsod_ops import ShuntedAttention

from ..errors import InputError
from ..limits import BackboneOptions, Backend, Channels, Frames, Heads, Reductions, Size, Strides
from .backbones import Backbone
from .contract import MOTION_CHANNELS, MOTION_STRIDE, Loss, Trainable
from .losses import LossOptions, mssa_loss


class MSSA(Trainable):
    """The network; every argument is a part of its configuration and is saved with it.

    Args:
        backbone: a torchvision network, see :class:`vsod_models.networks.backbones.Backbone`.
        backbone_options: its options, such as ``{"width": 0.25}``.
        levels: strides of the two (or any number of) deepest maps, which go through the
            transformer; ascending.  VGG16: 8 and 16 are stage 4 and stage 5 before their pools.
        skips: strides of the static maps that the decoder takes in after those; ascending.
        reductions: r of each head group; (1, 2) is MSSA, (1,) the baseline.
        num_heads: heads of the transformer of each level.
        dim: channels of the tokens.
        depth: transformer blocks of each level.
        feed_forward: hidden width of their feed-forward part.
        position: None, or "depthwise": a 3-D depth-wise convolution before each block.
        decoder_dim: channels of the decoder, a multiple of 8.
        clip_length: frames of a clip in training, and of a window in prediction.
        image_size: (height, width) it is trained at; prediction resizes to it by default.
        keep_aspect: frames keep their aspect ratio: prediction resizes them to as many pixels as
            `image_size` has, with sides that are multiples of the deepest stride.
        motion: whether it takes the motion of each frame beside the frames; without any (None or
            zeros) it masks them by their looks.
        backend: of the attention op, see :func:`vsod_ops.shunted_attention`.

    Shape:
        frames (B, T, 3, H, W) RGB in [0, 1], any T from 1, any H and W -> logits (B, T, 1, H, W).
    """

    outputs = "all"
    former_names: ClassVar[Mapping[str, str]] = {"heads": "num_heads"}

    def __init__(
        self,
        backbone: str = "vgg16_bn",
        backbone_options: BackboneOptions | None = None,
        levels: Strides = (8, 16),
        skips: Strides = (2, 4),
        reductions: Reductions = (1, 2),
        num_heads: Heads = (4, 8),
        dim: Channels = 256,
        depth: Annotated[int, Field(ge=1, le=256)] = 4,
        feed_forward: Channels = 782,
        position: str | None = None,
        decoder_dim: Annotated[Channels, Field(multiple_of=8)] = 128,
        clip_length: Frames = 5,
        image_size: Size = (224, 224),
        keep_aspect: bool = False,
        motion: bool = False,
        backend: Backend | None = None,
    ):
        super().__init__()
        if len(num_heads) != len(levels):
            raise InputError(
                f"num_heads {tuple(num_heads)} must hold one number for each level {levels}"
            )
        strides = [*skips, *levels]
        if not levels or strides != sorted(set(strides)):
            raise InputError(f"skips {tuple(skips)} and levels {tuple(levels)} must ascend")
        self.clip_length = clip_length
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.backbone = Backbone(backbone, strides, **dict[str, Any](backbone_options or {}))
        self.side_multiple = strides[-1] if keep_aspect else None
        skip_channels = self.backbone.channels[: len(skips)]
        level_channels = self.backbone.channels[len(skips) :]
        self.lift = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in level_channels)
        self.transformers = nn.ModuleList(
            nn.Sequential(
                *(Block(dim, h, reductions, feed_forward, position, backend) for _ in range(depth)),
                nn.LayerNorm(dim),
            )
            for h in num_heads
        )
        finer = [dim] * (len(levels) - 1) + skip_channels[::-1]  # what each step takes in
        coarser = ([dim] + [decoder_dim] * len(finer))[: len(finer)]
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c + f, decoder_dim, 3, padding=1, bias=False),
                nn.GroupNorm(
                    8, decoder_dim
                ),  # unlike batch norm, the same on any number of devices
                nn.ReLU(inplace=True),
            )
            for c, f in zip(coarser, finer, strict=True)
        )
        self.mask = nn.Conv2d(decoder_dim if finer else dim, 1, 1)
        self.needs_motion = motion
        if motion:
            self.motion = Motion(strides, [*skip_channels, *[dim] * len(levels)])

    def forward(self, frames: Tensor, motion: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(frames, motion), frames.shape[-2:])

    def encode(self, frames: Tensor, prior: Tensor | None = None) -> list[Tensor]:
        """Maps of each frame alone: a window over a video can put them together again.

        frames (B, T, 3, H, W) -> one (B, T, C, h, w) for each stride, finest first; `prior` is the
        motion, and ignored by a model that takes none.
        """
        if frames.dim() != 5 or frames.shape[2] != 3:
            raise ValueError(f"frames must be (B, T, 3, H, W), got shape {tuple(frames.shape)}")
        maps = self.backbone(rearrange(frames, "b t c h w -> (b t) c h w"))
        count = len(self.lift)
        maps[-count:] = [lift(m) for lift, m in zip(self.lift, maps[-count:], strict=True)]
        if self.needs_motion:
            if prior is None:
                size = [-(-n // MOTION_STRIDE) for n in frames.shape[-2:]]
                prior = frames.new_zeros(*frames.shape[:2], MOTION_CHANNELS, *size)
            added = self.motion(rearrange(prior, "b t c h w -> (b t) c h w"), maps)
            maps = [m + a for m, a in zip(maps, added, strict=True)]
        return [rearrange(m, "(b t) c h w -> b t c h w", b=frames.shape[0]) for m in maps]

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps of a clip (from `encode`) -> logits (B, T, 1, H, W), with size = (H, W)."""
        batch, count = maps[0].shape[0], len(self.lift)
        finer = [
            rearrange(
                transformer(rearrange(m, "b t c h w -> b t h w c")), "b t h w c -> (b t) c h w"
            )
            for transformer, m in zip(self.transformers, maps[-count:], strict=True)
        ]
        finer = [rearrange(m, "b t c h w -> (b t) c h w") for m in maps[:-count]] + finer
        x = finer.pop()
        for convolution in self.decoder:
            skip = finer.pop()
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = convolution(torch.cat([x, skip], 1))
        height, width = size
        least = self.backbone.strides[-1]  # the backbone pads smaller images
        padded = (max(height, least), max(width, least))
        x = F.interpolate(self.mask(x), padded, mode="bilinear", align_corners=False)
        return rearrange(x[..., :height, :width], "(b t) c h w -> b t c h w", b=batch)

    def loss(self, batch: Mapping[str, Tensor], options: LossOptions) -> Loss:
        logits, masks = self(batch["frames"], batch.get("motion")), batch["masks"]
        weight = batch["valid"] * batch["weight"]
        value = mssa_loss(logits, masks, weight, options.positive_weight)
        return Loss(value, logits, masks, weight)

    def load_backbone(self, weights: str | Path) -> None:
        self.backbone.load_weights(weights)

    def backbone_parameters(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())

    def load_initial(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """As every model; one that takes no motion gives all but what looks at it."""
        own = {k: v for k, v in self.state_dict().items() if k.startswith("motion.")}
        super().load_initial({**own, **state}, source)


class Motion(nn.Module):
    """What is added to the maps of each stride; nothing, before it is trained.

    Shape:
        motion (N, 4, H / 4, W / 4), maps (N, C, h, w) of each stride -> the same as the maps.
    """

    def __init__(self, strides: Sequence[int], channels: Sequence[int]):
        super().__init__()
        self.steps, self.shares = nn.ModuleList(), nn.ModuleList()
        width, reached = MOTION_CHANNELS, MOTION_STRIDE
        for stride, count in zip(strides, channels, strict=True):
            made = min(16 * max(stride // MOTION_STRIDE, 1), 64)
            self.steps.append(
                nn.Sequential(
                    nn.Conv2d(width, made, 3, max(stride // reached, 1), padding=1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(made, made, 3, padding=1),
                    nn.ReLU(inplace=True),
                )
            )
            share = nn.Conv2d(made, count, 1)
            for parameter in share.parameters():
                nn.init.zeros_(parameter)
            self.shares.append(share)
            width, reached = made, max(stride, reached)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        added = []
        for step, share, m in zip(self.steps, self.shares, maps, strict=True):
            x = step(x)
            shared, size = share(x), m.shape[-2:]
            if torch.compiler.is_exporting() or shared.shape[-2:] != size:
                shared = F.interpolate(shared, size, mode="bilinear", align_corners=False)
            added.append(shared)
        return added


class Block(nn.Module):
    """Pre-norm transformer block over video tokens (B, T, H, W, C) -> the same shape."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reductions: Sequence[int],
        feed_forward: int,
        position: str | None,
        backend: str | None,
    ):
        super().__init__()
        if position not in (None, "depthwise"):
            raise InputError(f'position must be None or "depthwise", got {position!r}')
        self.position = nn.Conv3d(dim, dim, 3, padding=1, groups=dim) if position else None
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ShuntedAttention(dim, num_heads, tuple(reductions), backend=backend)
        self.norm2 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, feed_forward), nn.GELU(), nn.Linear(feed_forward, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = x + self.position(x.movedim(-1, 1)).movedim(1, -1)
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))
