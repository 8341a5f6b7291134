"""Saliency maps against ground truth, under a named protocol; the command `vsod eval`.

Nothing here imports torch: the worker processes start without it.
"""

from .evaluator import Evaluation, SaliencyEvaluator, evaluate_folder
from .measures import MEASURES, score_frame
from .protocols import PROTOCOLS

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Evaluation",
    "SaliencyEvaluator",
    "evaluate_folder",
    "score_frame",
]
