"""Motion prior of MSST-ConvLSTM: how much each pixel moves like a salient object, from flow alone.

two frames -> DIS flow -> flow image (hue: direction, saturation: speed)
  -> Felzenszwalb segmentation at M scales
  -> for each region: flow statistics, and backbone features of the flow image averaged over
     the region, over its neighbours and over the frame
  -> three-layer network with 300 neurons -> probability of the region (eq. 1: a network for each
     of the M segmentations, `level_classifiers`; by default they share one)
  -> mean over the M scales, pixel by pixel
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
from pydantic import Field
from skimage.segmentation import felzenszwalb
from torch import Tensor, nn

from ..errors import InputError
from ..limits import BackboneOptions, Channels, Count, Positive
from ..networks.backbones import Backbone
from ..networks.saved import PretrainedModel
from .flow import flow_image, hash_of, without_camera, working_size

STATISTICS = 11  # numbers of flow_statistics


def pooled(labels: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Mean of `maps` (C, a, b), stretched over `labels` (h, w), in each region -> (R, C)."""
    height, width = labels.shape
    rows, columns = maps.shape[1:]
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    cells, regions = rows * columns, int(labels.max()) + 1
    cell_of_pixel = y[:, None] * columns + x[None, :]
    counts = np.bincount((labels * cells + cell_of_pixel).ravel(), minlength=regions * cells)
    shares = counts.reshape(regions, cells).astype(np.float32)
    shares /= shares.sum(1, keepdims=True)
    return shares @ maps.reshape(len(maps), cells).T


def neighbours(labels: np.ndarray) -> np.ndarray:
    """(R, R) bool: which regions share an edge; a region alone in its frame has itself."""
    regions = int(labels.max()) + 1
    touch = np.zeros((regions, regions), bool)
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        touch[a, b] = touch[b, a] = True
    np.fill_diagonal(touch, regions == 1)
    return touch


def around(own: np.ndarray, area: np.ndarray, touch: np.ndarray) -> np.ndarray:
    """Means (R, C) of each region -> means over its neighbours, by area."""
    weight = touch * area
    return (weight / weight.sum(1, keepdims=True)) @ own


def flow_statistics(labels: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Speeds, contrasts, size and place of each region: (R, 11) float32.

    Mean and deviation of the speed, mean over the frame's mean; contrast of the mean motion with
    the neighbours and with the frame; speed and both contrasts again for the flow with the
    camera's motion in it; share of the area, share of the frame's border, distance of the centre
    from the frame's.
    """
    height, width = labels.shape
    own = without_camera(flow)
    regions = int(labels.max()) + 1
    flat = labels.ravel()
    area = np.bincount(flat, minlength=regions).astype(np.float32)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(flat, values.ravel(), regions).astype(np.float32) / area

    def contrasts(motion: np.ndarray) -> list[np.ndarray]:
        means = np.stack([mean(motion[..., 0]), mean(motion[..., 1])], 1)
        near = means - around(means, area, touch)
        far = means - motion.mean((0, 1))
        return [np.log1p(np.linalg.norm(near, axis=1)), np.log1p(np.linalg.norm(far, axis=1))]

    touch = neighbours(labels)
    speed, raw_speed = np.linalg.norm(own, axis=2), np.linalg.norm(flow, axis=2)
    mean_speed = mean(speed)
    deviation = np.sqrt(np.maximum(mean(speed**2) - mean_speed**2, 0))
    border = np.zeros((height, width), np.float32)
    border[[0, -1]] = border[:, [0, -1]] = 1
    y, x = np.mgrid[0:height, 0:width]
    centre = np.hypot(mean(y) / (height - 1) - 0.5, mean(x) / (width - 1) - 0.5)
    columns = [
        np.log1p(mean_speed),
        np.log1p(deviation),
        mean_speed / (speed.mean() + 0.5),
        *contrasts(own),
        np.log1p(mean(raw_speed)),
        *contrasts(flow),
        area / flat.size,
        mean(border) * area / border.sum(),
        centre,
    ]
    return np.stack(columns, 1).astype(np.float32)


class MotionPrior(PretrainedModel):
    """The paper's motion prior; arguments are its configuration and are saved with it.

    Args:
        backbone: torchvision network whose map of stride 16 of the flow image is pooled over the
            regions, see :class:`~vsod_models.networks.backbones.Backbone`; None: flow statistics
            alone.
        backbone_options: its options, such as ``{"width": 0.25}``.
        scales: of Felzenszwalb's segmentation, one for each level.
        least_pixels: of a region.
        side: longer side of the frames for the flow.
        region_side: longer side that the flow is shrunk to for the regions.
        hidden: neurons of the two hidden layers.
        level_classifiers: a network for each scale, as in the paper's eq. 1; False: all scales
            share one, which sees M times as many regions.
    """

    feature_mean: Tensor
    feature_deviation: Tensor

    def __init__(
        self,
        backbone: str | None = "vgg16",
        backbone_options: BackboneOptions | None = None,
        scales: Annotated[Sequence[Positive], Field(min_length=1, max_length=16)] = (20, 60, 180),
        least_pixels: Count = 30,
        side: Annotated[int, Field(ge=16, le=16_384)] = 480,
        region_side: Annotated[int, Field(ge=16, le=4096)] = 256,
        hidden: Channels = 300,
        level_classifiers: bool = False,
    ):
        super().__init__()
        self.scales, self.least_pixels = tuple(scales), least_pixels
        self.side, self.region_side = side, region_side
        self.configuration = {
            "backbone": backbone, "backbone_options": backbone_options, "scales": list(scales),
            "least_pixels": least_pixels, "side": side, "region_side": region_side,
            "hidden": hidden,
        }  # fmt: skip
        if level_classifiers:  # only then: the key of priors that were made before stays
            self.configuration["level_classifiers"] = True
        self.backbone = None
        features = STATISTICS
        if backbone is not None:
            self.backbone = Backbone(
                backbone, (16,), **dict[str, Any](backbone_options or {})
            ).eval()
            self.backbone.requires_grad_(False)
            features += 3 * self.backbone.channels[0]

        def classifier() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                nn.Linear(hidden, 1),
            )  # fmt: skip

        self.layers: nn.Module = classifier()
        if level_classifiers:
            self.layers = nn.ModuleList(classifier() for _ in self.scales)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_deviation", torch.ones(features))

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """Features of R regions (R, F), and the index of each one's scale (R,) -> logits (R,)."""
        x = (features - self.feature_mean) / self.feature_deviation
        if not isinstance(self.layers, nn.ModuleList):
            return self.layers(x).squeeze(1)
        logits = torch.empty_like(x[:, 0])
        for index, classifier in enumerate(self.layers):
            logits[level == index] = classifier(x[level == index]).squeeze(1)
        return logits

    def train(self, mode: bool = True) -> MotionPrior:
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()  # its weights and statistics stay as they are
        return self

    def load_backbone(self, weights: str | Path) -> None:
        """ImageNet weights: a torchvision name or a file; see `Backbone.load_weights`."""
        if self.backbone is None:
            raise InputError(f"weights {weights}: this motion prior has no backbone to load them")
        self.backbone.load_weights(weights)

    def key(self) -> str:
        return hash_of({"prior": "regions", **self.configuration}, self.state_dict().values())

    @torch.inference_mode()
    def from_flow(self, flow: np.ndarray) -> np.ndarray:
        segmentations, features, level = self.regions(flow)
        values = self(features, level).sigmoid().cpu().numpy()
        by_scale = np.split(values, np.cumsum(np.bincount(level.cpu()))[:-1])
        maps = [value[labels] for labels, value in zip(segmentations, by_scale, strict=True)]
        return np.stack(maps).mean(0, dtype=np.float32)

    @torch.inference_mode()
    def regions(self, flow: np.ndarray) -> tuple[list[np.ndarray], Tensor, Tensor]:
        """Labels (h, w) of each scale; of all regions the features (R, F) and the scale (R,).

        h and w are those of `flow`, shrunk to `region_side`.
        """
        size = working_size(flow.shape[:2], self.region_side)
        factor = np.array(size[::-1], np.float32) / flow.shape[1::-1]
        flow = cv2.resize(flow, size[::-1], interpolation=cv2.INTER_AREA) * factor
        picture = flow_image(flow)
        device = self.feature_mean.device
        maps = None
        if self.backbone is not None:
            image = torch.from_numpy(picture).permute(2, 0, 1)[None].to(device) / 255
            maps = self.backbone(image)[0][0].float().cpu().numpy()
        segmentations, features = [], []
        for scale in self.scales:
            labels = felzenszwalb(picture, scale=scale, sigma=0.8, min_size=self.least_pixels)
            columns = [flow_statistics(labels, flow)]
            if maps is not None:
                area = np.bincount(labels.ravel()).astype(np.float32)
                own = pooled(labels, maps)
                frame = np.broadcast_to(maps.mean((1, 2)), own.shape)
                columns += [own, around(own, area, neighbours(labels)), frame]
            segmentations.append(labels)
            features.append(np.concatenate(columns, 1))
        level = np.repeat(np.arange(len(features)), [len(rows) for rows in features])
        rows = torch.from_numpy(np.concatenate(features)).to(device)
        return segmentations, rows, torch.from_numpy(level).to(device)
