"""Losses of the two papers, for logits and masks of the same shape (..., H, W)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_bce(logits: Tensor, mask: Tensor, positive_weight: str = "paper") -> Tensor:
    """Weighted binary cross-entropy of MSSA (2023), eq. 5, with a minus on both of its terms.

        -mean( a * mask * log(p) + (1 - a) * (1 - mask) * log(1 - p) )

    Args:
        logits: (..., H, W).
        mask: the same shape, 0 or 1.
        positive_weight: what a is, with gamma the share of salient pixels of the frame: "paper"
            (a = gamma, as printed, which weighs the rare class down) or "balanced"
            (a = 1 - gamma).

    Returns:
        (...), one value for each frame.
    """
    gamma = mask.mean(dim=(-2, -1), keepdim=True)
    if positive_weight == "balanced":
        gamma = 1 - gamma
    elif positive_weight != "paper":
        raise ValueError(f'positive_weight must be "paper" or "balanced", got {positive_weight!r}')
    weight = torch.where(mask > 0.5, gamma, 1 - gamma)
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask.float(), reduction="none")
    return (weight * loss).mean(dim=(-2, -1))


def soft_iou(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - IoU of the soft mask (MSSA 2023, eq. 6): (..., H, W) -> (...), one for each frame.

    One pixel is added above and below, so that an empty frame predicted empty costs nothing.
    """
    p, mask = logits.float().sigmoid(), mask.float()
    both = (p * mask).sum(dim=(-2, -1))
    either = (p + mask).sum(dim=(-2, -1)) - both
    return 1 - (both + 1) / (either + 1)


def mssa_loss(
    logits: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    positive_weight: str = "paper",
) -> Tensor:
    """Weighted BCE + IoU, averaged over the frames that have ground truth.

    Args:
        logits: (B, T, 1, H, W).
        mask: the same shape, 0 or 1.
        valid: (B, T) weight of each frame, 0 where it has no ground truth; None: all 1.
    """
    loss = (weighted_bce(logits, mask, positive_weight) + soft_iou(logits, mask)).squeeze(-1)
    return loss.mean() if valid is None else (loss * valid).sum() / valid.sum().clamp(min=1e-6)
