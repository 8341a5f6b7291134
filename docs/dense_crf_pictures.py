"""Draws docs/dense_crf.png: a synthetic frame, a coarse map of it, and the map after dense_crf."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from vsod_ops import dense_crf

HEIGHT, WIDTH = 240, 320


def frame_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) in 0..255 and (H, W) in {0, 1}: a star-shaped thing over hills and sky."""
    generator = torch.Generator().manual_seed(4)
    y, x = torch.meshgrid(
        torch.arange(HEIGHT, dtype=torch.float32),
        torch.arange(WIDTH, dtype=torch.float32),
        indexing="ij",
    )
    sky = torch.stack([120 + 0.2 * y, 160 + 0.15 * y, 215 - 0.1 * y])
    hills = 165 + 18 * torch.sin(x / 37) + 8 * torch.sin(x / 11)
    ground = torch.stack([92 - 0.1 * x, 128 + 0.05 * x, 70 + 0.05 * y])
    image = torch.where(y < hills, sky, ground)
    angle = torch.atan2(y - 125, x - 165)
    radius = ((y - 125) ** 2 + (x - 165) ** 2).sqrt()
    mask = (radius < 52 + 20 * torch.cos(5 * angle + 0.4)).float()
    thing = torch.stack([205 - 0.3 * radius, 110 - 0.5 * radius, 60 + 0.2 * radius])
    image = torch.where(mask > 0, thing, image)
    image = image + 7 * torch.randn(image.shape, generator=generator)
    return image.round().clamp(0, 255).to(torch.uint8), mask


def coarse_map(mask: torch.Tensor) -> torch.Tensor:
    """What a network with output stride 16 might say: blurred, blocky, with a false spot."""
    small = F.avg_pool2d(mask[None, None], 16)
    soft = F.interpolate(small, size=mask.shape, mode="bilinear", align_corners=False)[0, 0]
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    spot = torch.exp(-(((y - 60) / 12.0) ** 2) - ((x - 60) / 12.0) ** 2)
    return torch.maximum(0.05 + 0.85 * soft, 0.4 * spot)


def main() -> None:
    image, mask = frame_and_mask()
    prob = coarse_map(mask)
    refined = dense_crf(prob[None], image[None])[0]
    panels = {"frame": image.permute(1, 2, 0), "map": prob, "dense_crf(map, frame)": refined}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.75))
    for axis, (title, picture) in zip(axes, panels.items(), strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1 if picture.dim() == 2 else 255)
        error = "" if picture.dim() == 3 else f"  MAE {(picture - mask).abs().mean():.3f}"
        axis.set_title(title + error, fontsize=10)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(Path(__file__).parent / "dense_crf.png", dpi=100)


if __name__ == "__main__":
    main()
