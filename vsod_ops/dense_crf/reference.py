"""Mean field over all pairs of pixels in plain PyTorch: the definition.

With features f_k (positions / sxy; for the second kernel also colours / srgb), for each kernel k:
    K_k(i, j) = exp(-|f_k(i) - f_k(j)|^2 / 2), i = j included,
    S_k = diag(1 / sqrt(sum_j K_k(i, j) + 1e-20)),
    Q_0 = softmax(-U) with U = -log(clip(prob, 1e-5, 1)),
    Q_{t+1} = softmax(-U + sum_k weight_k * S_k K_k S_k Q_t)     (Potts compatibility).
This is what pydensecrf computes, with the exact kernel in place of its lattice.  K has N^2
entries, made anew in blocks of rows each time, so this is for truth and small images.
"""

import torch
from torch import Tensor

CLIP = 1e-5  # of pydensecrf's unary_from_softmax
MAX_PIXELS = 128 * 128  # above this only an explicit request runs brute force
_BLOCK = 1 << 22  # entries of K in memory at a time


def forward(
    prob: Tensor,
    image: Tensor,
    iterations: int,
    gaussian_sxy: float,
    gaussian_weight: float,
    bilateral_sxy: float,
    bilateral_srgb: float,
    bilateral_weight: float,
) -> Tensor:
    """Return the marginals, shaped like prob, in float32 (float64 for float64 prob)."""
    prob = prob.to(torch.float64 if prob.dtype == torch.float64 else torch.float32)
    if iterations == 0 or prob.numel() == 0:
        return prob.clone(memory_format=torch.contiguous_format)
    binary = prob.dim() == 3
    classes = torch.stack([1 - prob, prob], 1) if binary else prob  # (B, L, H, W)
    out = torch.empty_like(classes, memory_format=torch.contiguous_format)
    for b in range(prob.shape[0]):
        position = _positions(image.shape[2], image.shape[3], prob)
        colour = image[b].to(prob.dtype).flatten(1).mT
        kernels = [
            (position / gaussian_sxy, gaussian_weight),
            (torch.cat([position / bilateral_sxy, colour / bilateral_srgb], 1), bilateral_weight),
        ]
        out[b] = _mean_field(classes[b].flatten(1).mT, kernels, iterations).mT.view_as(out[b])
    return out[:, 1].contiguous() if binary else out


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """(N, 2): x, y of each pixel."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype),
        torch.arange(width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x.flatten(), y.flatten()], 1)


def _filter(features: Tensor, values: Tensor) -> Tensor:
    """K @ values for values (N, L)."""
    rows = max(1, _BLOCK // len(features))
    square = features.square().sum(1)
    parts = []
    for block, square_block in zip(features.split(rows), square.split(rows), strict=True):
        distance = square_block[:, None] + square - 2 * (block @ features.mT)
        parts.append((-0.5 * distance.clamp_min_(0)).exp_() @ values)
    return torch.cat(parts)


def _mean_field(prob: Tensor, kernels: list[tuple[Tensor, float]], iterations: int) -> Tensor:
    negative_unary = prob.clip(CLIP, 1).log()  # (N, L)
    scales = [(_filter(f, torch.ones_like(prob[:, :1])) + 1e-20).rsqrt() for f, _ in kernels]
    q = negative_unary.softmax(1)
    for _ in range(iterations):
        logits = negative_unary.clone()
        for (features, weight), scale in zip(kernels, scales, strict=True):
            logits += weight * scale * _filter(features, scale * q)
        q = logits.softmax(1)
    return q
