"""MSST-ConvLSTM: multi-scale spatiotemporal saliency of videos with a ConvLSTM (2018).

    frame t          -> spatial network  -> X_s^t (2 maps)  --.
    frame t + prior  -> temporal network -> X_t^t (2 maps)  --+--> X^t = (X_s^t, X_t^t), 4 maps
      each network: a dilated VGG16, with a branch after pool4 and one after the last layer:
      3x3 convolution to 128 channels, 1x1 convolution to one map, bilinear upsampling
    X^1 .. X^T       -> ConvLSTM, 1x1 read-out of h_T                   -> O^T (1 map)
    W_s * X_s^T + W_t * X_t^T + O^T, with 1x1 convolutions W_s and W_t  -> S, the last frame's mask

The motion prior is made by :mod:`vsod_models.prior.regions`.  Ablations of the paper: "os" is the
spatial network alone, "st" both networks without the ConvLSTM, "full" all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vsod_ops import ConvLSTM

from ..errors import InputError
from ..limits import Backend, Channels, Frames, Size, Width
from .backbones import MEAN, STD
from .contract import Loss, Trainable
from .fcn import build_fcn
from .losses import LossOptions, msst_loss
from .saved import check_finite

CONFIGURATIONS = ("os", "st", "full")
PRIORS = ("flow-magnitude", "regions")
# what each configuration has beside those before it
NEW_PARTS = {"os": ("spatial.", "weight_s."), "st": ("temporal.", "weight_t."),
             "full": ("lstm.", "read_out.")}  # fmt: skip


class MSST(Trainable):
    """The network; every argument is a part of its configuration and is saved with it.

    Args:
        configuration: "full", "st" (no ConvLSTM) or "os" (no motion prior either).
        backbone: of both streams: "vgg16", "vgg16_bn" or "mobilenet_v2", see
            :mod:`vsod_models.networks.fcn`.
        output_stride: of its maps, 8 or 16; None: 8 for VGG16, 16 for MobileNetV2.
        width: factor on the backbone's channels; ImageNet weights need 1.
        keep_rgb: the first temporal convolution takes the RGB filters of the weights, and only the
            filters over the prior stay Gaussian; False: all of it stays Gaussian, as in the paper.
        hidden: channels of the ConvLSTM's state.
        full_resolution: run the ConvLSTM over maps at the size of the frames, not of the branches.
        clip_length: frames T that "full" looks at; the others look at the last frame alone.
        image_size: (height, width) of prediction; the paper trains at 321 and 512 in turn.
        prior: the kind of motion prior that it is trained with, "flow-magnitude" or "regions", for
            whoever loads it.
        backend: of the ConvLSTM op, see :func:`vsod_ops.conv_lstm`.

    Shape:
        frames (B, T, 3, H, W) RGB in [0, 1] and prior (B, T, 1, H, W) in [0, 1] -> logits of the
        last frame (B, 1, H, W), any T from 1.  In training (``model.train()``) a pair: these and
        the logits of O^T, same shape, for the auxiliary loss (None without a ConvLSTM).
    """

    outputs = "last"  # a window gives the mask of its last frame
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        configuration: str = "full",
        backbone: str = "vgg16",
        output_stride: int | None = None,
        width: Width = 1.0,
        keep_rgb: bool = True,
        hidden: Channels = 32,
        full_resolution: bool = False,
        clip_length: Frames = 4,
        image_size: Size = (512, 512),
        prior: str = "flow-magnitude",
        backend: Backend | None = None,
    ):
        super().__init__()
        if configuration not in CONFIGURATIONS:
            raise InputError(
                f"configuration {configuration!r} is not one of {', '.join(CONFIGURATIONS)}"
            )
        if prior not in PRIORS:
            raise InputError(f"prior {prior!r} is not one of {', '.join(PRIORS)}")
        self.configuration, self.full_resolution = configuration, full_resolution
        self.keep_rgb = keep_rgb
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.needs_prior = configuration != "os"
        self.clip_length = clip_length if configuration == "full" else 1

        self.spatial = Stream(backbone, 3, output_stride, width)
        self.weight_s = nn.Conv2d(2, 1, 1)
        if configuration in ("st", "full"):
            self.temporal = Stream(backbone, 4, output_stride, width)
            self.weight_t = nn.Conv2d(2, 1, 1, bias=False)
        if configuration == "full":
            self.lstm = ConvLSTM(4, hidden, 3, backend=backend)
            self.read_out = nn.Conv2d(hidden, 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(
        self, frames: Tensor, prior: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if self.configuration != "full":  # nothing of the earlier frames would be used
            frames, prior = frames[:, -1:], None if prior is None else prior[:, -1:]
        maps, size = self.encode(frames, prior), frames.shape[-2:]
        auxiliary = self.recur(maps, size)
        logits = self.fuse(maps, auxiliary, size)
        return (logits, auxiliary) if self.training else logits

    def encode(self, frames: Tensor, prior: Tensor | None = None) -> list[Tensor]:
        """The branch maps of each frame alone: a window over a video can put them together again.

        frames (B, T, 3, H, W), prior (B, T, 1, H, W) -> [X_s] or [X_s, X_t], each (B, T, 2, h, w)
        at branch resolution.
        """
        if frames.dim() != 5 or frames.shape[2] != 3:
            raise ValueError(f"frames must be (B, T, 3, H, W), got shape {tuple(frames.shape)}")
        batch = frames.shape[0]
        x = (rearrange(frames, "b t c h w -> (b t) c h w") - self.mean) / self.std
        streams = [self.spatial(x)]
        if self.needs_prior:
            wanted = (*frames.shape[:2], 1, *frames.shape[3:])
            if prior is None:
                raise ValueError(f'configuration "{self.configuration}" needs prior {wanted}')
            if tuple(prior.shape) != wanted:
                raise ValueError(f"prior must be {wanted} as frames, got {tuple(prior.shape)}")
            motion = rearrange(prior, "b t c h w -> (b t) c h w")
            motion = 4 * motion.to(x.dtype) - 2  # the range of the normalised colours
            streams.append(self.temporal(torch.cat([x, motion], 1)))
        return [rearrange(m, "(b t) c h w -> b t c h w", b=batch) for m in streams]

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps of a window (from `encode`) -> logits of its last frame (B, 1, H, W) at size."""
        return self.fuse(maps, self.recur(maps, size), size)

    def recur(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor | None:
        """O^T (B, 1, H, W): the ConvLSTM over X^1 .. X^T; None in a model without it."""
        if self.configuration != "full":
            return None
        x = torch.cat(list(maps), 2)
        if self.full_resolution:
            large = self.upsample(rearrange(x, "b t c h w -> (b t) c h w"), size)
            x = rearrange(large, "(b t) c h w -> b t c h w", b=x.shape[0])
        out, _ = self.lstm(x)
        last = self.read_out(out[:, -1].to(self.read_out.weight.dtype))
        return last if self.full_resolution else self.upsample(last, size)

    def fuse(self, maps: Sequence[Tensor], o_last: Tensor | None, size: Sequence[int]) -> Tensor:
        """S = W_s * X_s + W_t * X_t + O^T of the last frame, (B, 1, H, W).

        1x1 convolutions and bilinear upsampling, whose weights sum to one, commute: W_s and W_t run
        at branch resolution and one map is upsampled in place of four.
        """
        fused = self.weight_s(maps[0][:, -1])
        if self.needs_prior:
            fused = fused + self.weight_t(maps[1][:, -1])
        fused = self.upsample(fused, size)
        return fused if o_last is None else fused + o_last

    def upsample(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Bilinear, (N, C, h, w) -> (N, C, H, W), map pixel i to image pixel i * output_stride."""
        stride = self.spatial.output_stride
        maps = F.pad(maps, (0, 1, 0, 1), mode="replicate")  # for pixels beyond the last one's
        height, width = (n * stride - stride + 1 for n in maps.shape[-2:])
        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
        return maps[..., : size[0], : size[1]]

    def loss(self, batch: Mapping[str, Tensor], options: LossOptions) -> Loss:
        masks, weight = batch["masks"][:, -1], (batch["valid"] * batch["weight"])[:, -1]
        logits, auxiliary = self(batch["frames"], batch["prior"] if self.needs_prior else None)
        value = msst_loss(logits, auxiliary, masks, weight, options.beta)
        return Loss(value, logits, masks, weight)

    def load_backbone(self, weights: str | Path) -> None:
        """ImageNet weights for both streams, by name or file; see `FCN.load_weights`."""
        self.spatial.network.load_weights(weights)
        if self.needs_prior:
            self.temporal.network.load_weights(weights, keep_rgb=self.keep_rgb)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """What takes a tenth of the learning rate when it starts from ImageNet weights."""
        streams = [self.spatial, self.temporal] if self.needs_prior else [self.spatial]
        return [p for stream in streams for p in stream.network.parameters()]

    def load_initial(self, state: Mapping[str, Tensor], source: str = "state") -> None:
        """Starts from the weights of an earlier stage: "os" for "st", "os" or "st" for "full".

        Parts that the earlier stage does not have stay as they are.

        Raises:
            InputError: naming `source`, where these are not weights of such a stage.
        """
        own = self.state_dict()
        stages = CONFIGURATIONS[: CONFIGURATIONS.index(self.configuration) + 1]
        later = [part for stage in stages[1:] for part in NEW_PARTS[stage]]
        missing = [k for k in own if k not in state and not k.startswith(tuple(later))]
        unfit = [k for k, x in state.items() if k not in own or own[k].shape != x.shape]
        if missing or unfit:
            raise InputError(
                f"{source}: not weights of an earlier stage of this MSST: {len(missing)} "
                f"parameters missing, {len(unfit)} unknown or of another shape "
                f"(first: {(missing + unfit)[0]})"
            )
        check_finite(state, source)
        self.load_state_dict({**own, **state})


class Stream(nn.Module):
    """A sub-network: images (N, in_channels, H, W) -> the maps of its two branches (N, 2, h, w)."""

    def __init__(self, backbone: str, in_channels: int, output_stride: int | None, width: float):
        super().__init__()
        self.network = build_fcn(backbone, in_channels, output_stride=output_stride, width=width)
        self.output_stride = self.network.output_stride
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 128, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(128, 1, 1)
            )
            for channels in self.network.channels
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = self.network(x)
        return torch.cat([b(m) for b, m in zip(self.branches, maps, strict=True)], 1)
