"""Attention inputs from real frames: VGG16 features through the projections of ShuntedAttention."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vsod_ops import ShuntedAttention

from . import BadInput

SIZE = 224  # frames are resized to SIZE x SIZE
CHANNELS = 512
LEVELS = {"stage 4": 28, "stage 5": 14}  # VGG16 stage -> side of its map before the pool
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def read_frames(path: Path, count: int) -> Tensor:
    """The first `count` frames of a video or of a folder of images: (T, 3, SIZE, SIZE) uint8."""
    import av

    if not path.exists():
        raise BadInput(f"clip {path} does not exist")
    try:
        frames = list(itertools.islice(_decode(path), count))
    except (av.FFmpegError, IndexError) as error:
        why = getattr(error, "strerror", None) or "no video stream"
        raise BadInput(f"clip {path} cannot be read as video or images: {why}") from None
    if len(frames) < count:
        raise BadInput(f"clip {path} has {len(frames)} frames or images; {count} are needed")
    return torch.stack(frames)


def _decode(path: Path) -> Iterator[Tensor]:
    import av

    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    for file in files:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                pixels = frame.to_ndarray(width=SIZE, height=SIZE, format="rgb24")
                yield torch.from_numpy(pixels).permute(2, 0, 1)


def vgg16_maps(frames: Tensor, weights: Path | None, seed: int) -> dict[str, Tensor]:
    """Maps of stages 4 and 5 before their pools, layer-normed: name -> (1, T, S, S, CHANNELS).

    VGG16 of torchvision, with random weights from `seed` unless `weights` names a state dict.
    """
    import torchvision

    torch.manual_seed(seed)
    vgg = torchvision.models.vgg16(weights=None).eval()
    if weights is not None:
        if not weights.is_file():
            raise BadInput(f"--weights {weights} is not a file")
        try:
            vgg.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception:  # what torch.load and load_state_dict raise is many types and many lines
            raise BadInput(
                f"--weights {weights} is not a state dict of torchvision's vgg16"
            ) from None
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (frames / 255 - mean) / deviation
    stages = []
    with torch.no_grad():
        for layer in vgg.features:
            if isinstance(layer, torch.nn.MaxPool2d):
                stages.append(x)  # (T, C, S, S)
            x = layer(x)
    return {
        name: torch.nn.functional.layer_norm(stage.movedim(1, -1)[None], (CHANNELS,))
        for name, stage in zip(LEVELS, stages[3:], strict=True)
    }


def project(
    level: Tensor, heads: int, reductions: tuple, seed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """q, keys and values that an untrained ShuntedAttention makes from `level` (1, T, S, S, C)."""
    torch.manual_seed(seed)
    module = ShuntedAttention(CHANNELS, heads, reductions)
    with torch.no_grad():
        q, keys, values = module.project(level)
    return q, list(keys), list(values)
