"""Motion prior of MSST-ConvLSTM: how much each pixel moves like a salient object, from flow alone.

    two frames -> DIS flow -> flow image (hue: direction, saturation: speed)
      -> Felzenszwalb segmentation at M scales
      -> for each region: flow statistics, and backbone features of the flow image averaged over
         the region, over its neighbours and over the frame
      -> three-layer network with 300 neurons -> probability of the region
      -> mean over the M scales, pixel by pixel

`MotionPrior` is that; `FlowMagnitude` is a cheap substitute without training, not the paper's.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from skimage.segmentation import felzenszwalb
from torch import Tensor, nn

from ..data.records import Record, Records
from ..errors import InputError
from ..files import write_png
from ..networks.backbones import Backbone
from ..networks.saved import PretrainedModel, load_config, load_folder, read_checkpoint

FLOW_MAGNITUDE = "flow-magnitude"
STATISTICS = 11  # numbers of flow_statistics
VERSION = 1  # part of every cache key: raised when the same settings come to give other maps
LEAST_SIDE = 16  # DIS needs 12 pixels


class PriorSource(Protocol):
    """What gives priors: the longer side that it works at, its cache key, and the map itself."""

    side: int

    def key(self) -> str:
        """Changes with all that the map depends on."""

    def from_flow(self, flow: np.ndarray) -> np.ndarray:
        """flow (h, w, 2) float32, pixels a frame -> float32 in [0, 1], that size or smaller."""


# ---- flow


def optical_flow(frame: np.ndarray, other: np.ndarray, side: int) -> np.ndarray:
    """DIS flow (Kroeger et al. 2016) from `frame` to `other`, (H, W, 3) uint8 of one size.

    Returns:
        (h, w, 2) float32, x and y in pixels of the size it is computed at: longer side at most
        `side`, no side below 16.

    Raises:
        InputError: frames of two sizes.
    """
    if frame.shape != other.shape:
        sizes = [f"{f.shape[1]}x{f.shape[0]}" for f in (frame, other)]
        raise InputError(
            f"optical flow needs two frames of one size, got {sizes[0]} and {sizes[1]}"
        )
    size = working_size(frame.shape[:2], side)
    first, second = (
        cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), size[::-1], interpolation=cv2.INTER_AREA)
        for f in (frame, other)
    )
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return dis.calc(first, second, None)  # type: ignore[call-overload]


def working_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """(H, W) scaled down to a longer side of `side`, but no side below 16."""
    factor = min(1.0, side / max(size))
    height, width = (max(LEAST_SIDE, round(n * factor)) for n in size)
    return height, width


def without_camera(flow: np.ndarray) -> np.ndarray:
    """Flow less the shift, turn and zoom that most of the frame follows (RANSAC), (h, w, 2)."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    places = np.stack([x, y], -1)
    step = max(1, round((height * width / 1500) ** 0.5))
    sample = (slice(step // 2, None, step), slice(step // 2, None, step))
    matrix, _ = cv2.estimateAffinePartial2D(
        places[sample].reshape(-1, 2), (places + flow)[sample].reshape(-1, 2),
        method=cv2.RANSAC, ransacReprojThreshold=1.0,
    )  # fmt: skip
    if matrix is None or not np.isfinite(matrix).all():
        return flow - np.median(flow, axis=(0, 1))
    camera = places @ matrix[:, :2].T + matrix[:, 2] - places
    return (flow - camera).astype(np.float32)


def top_speed(speed: np.ndarray) -> float:
    """The 99th percentile, at least a pixel: the noise of a still clip stays dark."""
    return max(1.0, float(np.percentile(speed, 99)))


def flow_image(flow: np.ndarray) -> np.ndarray:
    """(h, w, 2) -> (h, w, 3) uint8 RGB: hue is the direction, saturation the speed."""
    speed, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
    hsv = np.full((*speed.shape, 3), 255, np.uint8)
    hsv[..., 0] = angle * (90 / np.pi)  # OpenCV's hues are 0..179
    hsv[..., 1] = np.clip(255 * speed / top_speed(speed), 0, 255)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


# ---- regions


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


# ---- the two sources


class FlowMagnitude:
    """A substitute for the paper's prior that needs no training: speed beside the camera's motion.

    The flow's magnitude less the camera's shift, turn and zoom, over its 99th percentile.
    """

    def __init__(self, side: int = 480):
        self.side = side

    def key(self) -> str:
        return hash_of({"prior": FLOW_MAGNITUDE, "side": self.side}, ())

    def from_flow(self, flow: np.ndarray) -> np.ndarray:
        speed = np.linalg.norm(without_camera(flow), axis=2)
        return np.clip(speed / top_speed(speed), 0, 1)


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
    """

    feature_mean: Tensor
    feature_deviation: Tensor

    def __init__(
        self,
        backbone: str | None = "vgg16",
        backbone_options: dict | None = None,
        scales: Sequence[float] = (20, 60, 180),
        least_pixels: int = 30,
        side: int = 480,
        region_side: int = 256,
        hidden: int = 300,
    ):
        super().__init__()
        self.scales, self.least_pixels = tuple(scales), least_pixels
        self.side, self.region_side = side, region_side
        self.configuration = {
            "backbone": backbone, "backbone_options": backbone_options, "scales": list(scales),
            "least_pixels": least_pixels, "side": side, "region_side": region_side,
            "hidden": hidden,
        }  # fmt: skip
        self.backbone = None
        features = STATISTICS
        if backbone is not None:
            self.backbone = Backbone(backbone, (16,), **(backbone_options or {})).eval()
            self.backbone.requires_grad_(False)
            features += 3 * self.backbone.channels[0]
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_deviation", torch.ones(features))

    def forward(self, features: Tensor) -> Tensor:
        """Features of R regions (R, F) -> logits (R,)."""
        return self.layers((features - self.feature_mean) / self.feature_deviation).squeeze(1)

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
        segmentations, features = self.regions(flow)
        values = self(features).sigmoid().cpu().numpy()
        counts = [int(labels.max()) + 1 for labels in segmentations]
        by_scale = np.split(values, np.cumsum(counts)[:-1])
        maps = [value[labels] for labels, value in zip(segmentations, by_scale, strict=True)]
        return np.stack(maps).mean(0, dtype=np.float32)

    @torch.inference_mode()
    def regions(self, flow: np.ndarray) -> tuple[list[np.ndarray], Tensor]:
        """Labels (h, w) of each scale, and the features of all of their regions (R, F).

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
        return segmentations, torch.from_numpy(np.concatenate(features)).to(device)


def hash_of(settings: dict, tensors: Iterable[Tensor]) -> str:
    text = json.dumps({"version": VERSION, **settings}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_prior(source: str | Path) -> PriorSource:
    """`flow-magnitude`, or a folder that `vsod prior train` wrote."""
    if str(source) == FLOW_MAGNITUDE:
        return FlowMagnitude()
    if not Path(source).is_dir():
        raise InputError(
            f"motion prior {str(source)!r} is neither {FLOW_MAGNITUDE} nor a folder written by "
            "`vsod prior train`"
        )
    folder = Path(source)
    kind = load_config(folder)["model"]
    if kind != "motionprior":
        raise InputError(f"{source}: a model of kind {kind}, not a motion prior")
    model = load_folder(folder, MotionPrior).eval()
    assert isinstance(model, MotionPrior)
    return model


def prior_of(model: str | Path) -> str:
    """What to give to `load_prior` for a saved model: the prior that it was trained with.

    Args:
        model: as for :func:`vsod_models.zoo.load_model`, of an MSST.  A checkpoint names its
            prior; a folder says which kind, and holds a region prior in its folder `prior`.

    Raises:
        InputError: the region prior is not there.
    """
    path = Path(model)
    if path.is_file():
        return read_checkpoint(path)[0]["data"]["prior"]
    if load_config(path).get("prior", FLOW_MAGNITUDE) == FLOW_MAGNITUDE:
        return FLOW_MAGNITUDE
    if not (path / "prior").is_dir():
        raise InputError(
            f"{path / 'prior'}: no motion prior here, and {model} was trained with one"
        )
    return str(path / "prior")


# ---- priors of frames


def frame_prior(source: PriorSource, frame: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """Prior of a frame, from its flow to the next one; of the last frame, to the one before.

    A frame that is alone is its own neighbour: nothing moves.  `partial(frame_prior, source)` is
    what :class:`vsod_models.prediction.VideoPredictor` takes.

    Args:
        frame, neighbour: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) float32 in [0, 1].
    """
    small = source.from_flow(optical_flow(frame, neighbour, source.side))
    return cv2.resize(small, frame.shape[1::-1], interpolation=cv2.INTER_LINEAR).clip(0, 1)


def neighbour(index: int, count: int) -> int:
    """Of `count` frames, the one that the flow of frame `index` goes to."""
    return index + 1 if index + 1 < count else max(0, index - 1)


# ---- priors of a dataset, on disk


def default_cache() -> Path:
    """`vsod/priors` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vsod" / "priors"


def make_priors(
    records: Records,
    source: PriorSource,
    cache: str | Path | None = None,
    *,
    on_frame: Callable[[], object] = lambda: None,
) -> Records:
    """The records with `prior` set; made where the cache has none yet.

    Files are `<cache>/<key>/<dataset>/<sequence>-<stamp>/<name>.png`, 8-bit grey: `key` is what
    made them and `stamp` what they were made from (names, sizes and times of the pictures).
    Nothing is written beside the pictures.

    Args:
        cache: folder; None: `default_cache()`.
        on_frame: called after each frame.

    Raises:
        InputError: a picture that cannot be read, or of another size than the one before it.
    """
    root = Path(cache or default_cache()) / source.key() / records.dataset
    found: dict[tuple[str, str], Path] = {}
    for sequence, frames in records.sequences.items():
        folder = root / f"{sequence}-{stamp(frames)}"
        paths = {(sequence, record.name): folder / f"{record.name}.png" for record in frames}
        found |= paths
        if all(path.is_file() for path in paths.values()):
            for _ in frames:
                on_frame()
            continue
        for record, prior in sequence_priors(frames, source):
            write_png(paths[sequence, record.name], prior)
            on_frame()
    done = [replace(r, prior=found[r.sequence, r.name]) for r in records]
    return Records(records.dataset, records.split, done)


def sequence_priors(
    frames: Sequence[Record], source: PriorSource
) -> Iterator[tuple[Record, np.ndarray]]:
    """Each record of a sequence with its prior (H, W) uint8; each picture is read once."""
    pictures: dict[int, np.ndarray] = {}
    for i, record in enumerate(frames):
        other = neighbour(i, len(frames))
        for t in (i, other):
            if t not in pictures:
                pictures[t] = frames[t].read_image()
        with naming(record, frames[other]):
            prior = frame_prior(source, pictures[i], pictures[other])
        yield record, np.rint(255 * prior).astype(np.uint8)
        pictures.pop(i - 1, None)


@contextlib.contextmanager
def naming(record: Record, other: Record) -> Iterator[None]:
    """Puts the two frames before the message of an InputError."""
    try:
        yield
    except InputError as error:
        both = f"{record.name} and {other.name}"
        raise InputError(f"sequence {record.sequence}, frames {both}: {error}") from None


def stamp(frames: Sequence[Record]) -> str:
    """Changes when the pictures of a sequence do."""
    digest = hashlib.sha256()
    for record in frames:
        if isinstance(record.image, Path):
            status = record.image.stat()
            facts = (str(record.image.resolve()), status.st_size, status.st_mtime_ns)
            digest.update(repr(facts).encode())
    if not isinstance(frames[0].image, Path):  # pictures made when read: the first stands for all
        digest.update(frames[0].read_image().tobytes() + str(len(frames)).encode())
    return digest.hexdigest()[:12]


# ---- training


def region_samples(
    model: MotionPrior, records: Records, count: int, *, on_frame: Callable[[], object]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features (R, F), salient share (R,) and area share (R,) of the regions of `count` frames.

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
        segmentations, features = model.regions(flow)
        size = segmentations[0].shape[::-1]
        mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        shares = np.concatenate([pooled(labels, mask[None])[:, 0] for labels in segmentations])
        area = np.concatenate(
            [np.bincount(labels.ravel()) / labels.size for labels in segmentations]
        )
        on_frame()
        yield features, torch.from_numpy(shares), torch.from_numpy(area.astype(np.float32))


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
        "loss" and, of a model that always says the mean, "loss of the mean"; "regions", "frames".

    Raises:
        InputError: no ground truth, or one where nothing or everything is salient.
    """
    samples = list(region_samples(model, records, frames, on_frame=on_step))
    features, target, area = (torch.cat([sample[i].cpu() for sample in samples]) for i in range(3))
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
            logits = model(features[rows].to(device))
            losses = F.binary_cross_entropy_with_logits(
                logits, target[rows].to(device), weight[rows].to(device)
            )
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
        on_step()
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(rows.to(device)).cpu() for rows in features.split(4096)])
    loss = F.binary_cross_entropy_with_logits(logits, target, weight)
    constant = torch.logit((weight * target).sum() / weight.sum()).expand_as(target)
    mean_loss = F.binary_cross_entropy_with_logits(constant, target, weight)
    return {
        "loss": loss.item(),
        "loss of the mean": mean_loss.item(),
        "regions": len(features),
        "frames": len(samples),
    }
