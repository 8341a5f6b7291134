"""The measures of one frame.

Every number equals that of `py_sod_metrics`, which computes S and the formulas of precision, recall
and F; the counts of all thresholds come from one histogram a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import cv2
import numpy as np
import py_sod_metrics
from scipy.ndimage import distance_transform_edt

from .protocols import Protocol

MEASURES = ("MAE", "maxF", "meanF", "adpF", "S", "maxE", "meanE", "adpE", "wF")
BETA_SQUARED = 0.3  # the weight of precision in the F-measure of all of the field
EPS = np.spacing(1)


class Scores(NamedTuple):
    """Of one frame, or averages of several.  Curves are (thresholds,), from 0 upwards."""

    mae: float
    s: float
    weighted_f: float
    adaptive_f: float
    adaptive_e: float
    precision: np.ndarray
    recall: np.ndarray
    f: np.ndarray
    e: np.ndarray

    @classmethod
    def mean(cls, scores: Iterable[Scores]) -> Scores:
        return cls(*(np.mean(values, axis=0) for values in zip(*scores, strict=True)))

    def measures(self) -> dict[str, float]:
        """The nine numbers of a table; the maxima and means are those of the averaged curves."""
        values = (
            self.mae,
            *(self.f.max(), self.f.mean(), self.adaptive_f),
            self.s,
            *(self.e.max(), self.e.mean(), self.adaptive_e),
            self.weighted_f,
        )
        return dict(zip(MEASURES, map(float, values), strict=True))


class _Smeasure(py_sod_metrics.Smeasure):
    """A quadrant without pixels has no weight; the library's 0 * NaN would be the whole score.

    It occurs where the foreground lies in the last rows or columns only: an object that leaves.
    """

    def ssim(self, pred: np.ndarray, gt: np.ndarray) -> float:
        return super().ssim(pred, gt) if pred.size else 0.0


_S = _Smeasure()
_GAUSSIAN = py_sod_metrics.WeightedFmeasure().matlab_style_gauss2D((7, 7), sigma=5)
_PRECISION = py_sod_metrics.PrecisionHandler(with_dynamic=False, with_adaptive=False)
_RECALL = py_sod_metrics.RecallHandler(with_dynamic=False, with_adaptive=False)
_F = py_sod_metrics.FmeasureHandler(with_dynamic=False, with_adaptive=False, beta=BETA_SQUARED)


def score_frame(prediction: np.ndarray, mask: np.ndarray, protocol: Protocol) -> Scores:
    """`prediction` (H, W) uint8 and `mask` (H, W) bool of the same size.

    No score is NaN.  Without foreground F, precision, recall and wF are 0, S is 1 - the mean of
    the prediction, E is the share of pixels that are not called salient.  A prediction of one
    level has no range to normalise by and stays as it is.
    """
    values = np.arange(256) / 255  # of each grey level, first raw, then normalised
    raw = values
    low, high = values[prediction.min()], values[prediction.max()]
    if high > low:
        values = (values - low) / (high - low)
    normalised = values[prediction]
    saliency = normalised if protocol.normalise else raw[prediction]

    foreground = np.bincount(prediction[mask], minlength=256)
    background = np.bincount(prediction[~mask], minlength=256)
    # Levels outside of the range of the prediction have values outside of [0, 1] and no pixels.
    steps = (values.clip(0, 1) * (protocol.thresholds - 1)).astype(int)  # thresholds below, less 1

    def at_least_each_threshold(histogram: np.ndarray) -> np.ndarray:
        counts = np.bincount(steps, histogram, protocol.thresholds)
        return counts[::-1].cumsum()[::-1]

    curve = _confusion(at_least_each_threshold, foreground, background)
    chosen = values >= min(2 * normalised.mean(), 1)
    adaptive = _confusion(lambda histogram: histogram[chosen].sum(), foreground, background)
    return Scores(
        mae=np.abs(saliency - mask).mean(),
        s=_S.cal_sm(saliency, mask),
        weighted_f=weighted_f_measure(saliency, mask),
        adaptive_f=_F(**adaptive),
        adaptive_e=enhanced_alignment(**adaptive),
        precision=_PRECISION(**curve),
        recall=_RECALL(**curve),
        f=_F(**curve),
        e=enhanced_alignment(**curve),
    )


def _confusion(
    salient: Callable[[np.ndarray], Any], foreground: np.ndarray, background: np.ndarray
) -> dict[str, Any]:
    tp, fp = salient(foreground), salient(background)
    return dict(tp=tp, fp=fp, fn=foreground.sum() - tp, tn=background.sum() - fp)


def enhanced_alignment(tp: Any, fp: Any, fn: Any, tn: Any) -> Any:
    """E-measure (Fan et al., IJCAI 2018) of a binary map from its four pixel counts.

    Pixels of the same kind have the same alignment, so the sum over pixels is one over the four
    kinds.  Numbers or arrays; divided by the pixels less one, as its authors do.
    """
    size = tp + fp + fn + tn
    p, g = (tp + fp) / size, (tp + fn) / size
    if np.all(g == 0):
        total = tn + fn
    elif np.all(g == 1):
        total = tp + fp
    else:
        total = 0
        for count, a, b in ((tp, 1 - p, 1 - g), (fp, 1 - p, -g), (fn, -p, 1 - g), (tn, -p, -g)):
            total = total + count * (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return total / np.maximum(size - 1, 1)


def weighted_f_measure(saliency: np.ndarray, mask: np.ndarray) -> float:
    """Weighted F-measure (Margolin et al., CVPR 2014), 0 without foreground.

    `saliency` (H, W) float64 in [0, 1], `mask` (H, W) bool.  Equals the library's to 1e-6 in a
    third of the time, the library's being two thirds of all that a frame takes: only errors in the
    foreground are smoothed, so the nearest foreground pixel is searched for no farther away than
    the Gaussian reaches.
    """
    if not mask.any():
        return 0.0
    error = np.abs(saliency - mask)
    near = tuple(
        slice(max(np.flatnonzero(there)[0] - 3, 0), np.flatnonzero(there)[-1] + 4)
        for there in (mask.any(1), mask.any(0))
    )
    nearest = distance_transform_edt(~mask[near], return_distances=False, return_indices=True)
    smooth = cv2.filter2D(
        error[near][tuple(nearest)], -1, _GAUSSIAN, borderType=cv2.BORDER_CONSTANT
    )
    missed = np.minimum(error[near], smooth)[mask[near]]
    background = ~mask
    distance = cv2.distanceTransform(background.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squares are whole numbers; without this the last bit varies with the alignment of memory.
    distance = np.sqrt(np.rint(distance * distance))
    weight = 2 - np.exp(np.log(0.5, dtype=np.float32) / 5 * distance)  # 1 at the object, 2 far off
    false = (error * weight).sum(where=background)
    hits = missed.size - missed.sum()
    precision, recall = hits / (hits + false + EPS), 1 - missed.mean()
    return 2 * precision * recall / (precision + recall + EPS)
