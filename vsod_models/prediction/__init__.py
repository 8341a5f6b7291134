"""Saliency of videos of any length, frame by frame, and from file to file."""

from .outputs import Recorded, Written, predict_dataset, predict_file
from .predictor import (
    Result,
    VideoPredictor,
    choose_device,
    fitted,
    load_predictor,
    resized,
)

__all__ = [
    "Recorded",
    "Result",
    "VideoPredictor",
    "Written",
    "choose_device",
    "fitted",
    "load_predictor",
    "predict_dataset",
    "predict_file",
    "resized",
]
