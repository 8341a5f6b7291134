"""Losses of the two papers, for logits and masks of the same shape (..., H, W)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limits import NotNegative

POSITIVE_WEIGHTS = ("paper", "balanced", "none")


@dataclass
class LossOptions:
    """What a recipe may say of the losses."""

    positive_weight: str = "paper"  # of MSSA: one of POSITIVE_WEIGHTS
    beta: NotNegative = 0.1  # of MSST: weight of the loss of O^T


def weighted_bce(logits: Tensor, mask: Tensor, positive_weight: str = "paper") -> Tensor:
    """Weighted binary cross-entropy of MSSA (2023), eq. 5, with a minus on both of its terms.

        -mean( a * mask * log(p) + (1 - a) * (1 - mask) * log(1 - p) )

    Args:
        logits: (..., H, W).
        mask: the same shape, 0 or 1.
        positive_weight: what a is, with gamma the share of salient pixels of the frame: "paper"
            (a = gamma, as printed, which weighs the rare class down), "balanced"
            (a = 1 - gamma) or "none" (all pixels weigh 1: plain BCE).

    Returns:
        (...), one value for each frame.
    """
    if positive_weight not in POSITIVE_WEIGHTS:
        raise ValueError(
            f"positive_weight must be one of {', '.join(POSITIVE_WEIGHTS)}, got {positive_weight!r}"
        )
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask.float(), reduction="none")
    if positive_weight == "none":
        return loss.mean(dim=(-2, -1))
    gamma = mask.mean(dim=(-2, -1), keepdim=True)
    if positive_weight == "balanced":
        gamma = 1 - gamma
    weight = torch.where(mask > 0.5, gamma, 1 - gamma)
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
    weight: Tensor | None = None,
    positive_weight: str = "paper",
) -> Tensor:
    """Weighted BCE + IoU, averaged over the frames that have ground truth.

    Args:
        logits: (B, T, 1, H, W).
        mask: the same shape, 0 or 1.
        weight: (B, T) of each frame, 0 where it has no ground truth; None: all 1.  It scales the
            loss of its frame: the mean is over all frames whose weight is not 0.
    """
    loss = (weighted_bce(logits, mask, positive_weight) + soft_iou(logits, mask)).squeeze(-1)
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / (weight != 0).sum().clamp(min=1)


# ---- MSST-ConvLSTM


def balanced_bce(logits: Tensor, mask: Tensor, least: float = 0.02) -> Tensor:
    """Balanced sigmoid cross-entropy of MSST-ConvLSTM (2018).

        -mean( alpha * mask * log(p) + (1 - alpha) * (1 - mask) * log(1 - p) )

    alpha is the share of the image that is not salient, kept within [least, 1 - least], so that an
    empty mask still says something.

    Args:
        logits: (..., H, W).
        mask: the same shape, 0 or 1.

    Returns:
        (...), one value for each image.
    """
    mask = mask.float()
    alpha = (1 - mask.mean(dim=(-2, -1), keepdim=True)).clamp(least, 1 - least)
    weight = alpha * mask + (1 - alpha) * (1 - mask)
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none")
    return (weight * loss).mean(dim=(-2, -1))


def msst_loss(
    logits: Tensor,
    auxiliary: Tensor | None,
    mask: Tensor,
    weight: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """Balanced cross-entropy of S, and `beta` times that of O^T, the ConvLSTM's map.

    Args:
        logits: (B, 1, H, W) of S, the mask of a clip's last frame.
        auxiliary: (B, 1, H, W) of O^T; None for a model without a ConvLSTM.
        mask: (B, 1, H, W) of the last frame, 0 or 1.
        weight: (B,), of fine or coarse labels, 0 without ground truth; None: all 1.  It scales the
            loss of its sample: the mean is over all samples whose weight is not 0.
    """
    loss = balanced_bce(logits, mask).squeeze(1)
    if auxiliary is not None:
        loss = loss + beta * balanced_bce(auxiliary, mask).squeeze(1)
    return (
        loss.mean() if weight is None else (loss * weight).sum() / (weight != 0).sum().clamp(min=1)
    )
