"""Draws docs/example.jpg: frames of `vsod example`, and what the default model finds in them.

python docs/example_picture.py [MODEL]
"""

import inspect
import sys
from pathlib import Path

import cv2
import numpy as np

from vsod_models import VideoPredictor, load_model
from vsod_models.cli.predict import predict
from vsod_models.media.example import PHOTOS, Example
from vsod_models.media.views import overlay

SHOWN = 10  # the frame of each clip


def main() -> None:
    default = inspect.signature(predict).parameters["model"].default
    predictor = VideoPredictor(load_model(sys.argv[1] if len(sys.argv) > 1 else default))
    columns = []
    for photo in PHOTOS:
        frames = [frame.picture for frame in Example(photo)][: 2 * SHOWN]
        saliency = predictor.predict_clip(frames)[SHOWN]
        frame = frames[SHOWN]
        columns.append(np.concatenate([frame, overlay(frame, saliency, (255, 255, 255))]))
    path = Path(__file__).with_name("example.jpg")
    cv2.imwrite(str(path), np.concatenate(columns, 1)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
