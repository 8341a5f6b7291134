"""Draws docs/synthetic.jpg: clips that are procedural to the last pixel.

python docs/data_pictures.py
"""

from pathlib import Path

import cv2
import numpy as np

from vsod_models.data.synthetic import synthetic_clip

CLIPS = (0, 5, 8, 14, 23, 24, 31, 39)
SHOWN = (0, 6, 12)
SIDE = 112


def strip(index: int) -> np.ndarray:
    """Three frames of a clip and the mask of the last, side by side."""
    images, masks = synthetic_clip(0, index, max(SHOWN) + 1, (SIDE, SIDE), photos=False)
    mask = np.repeat(masks[SHOWN[-1], :, :, None] * np.uint8(255), 3, axis=2)
    cells = [*(images[t] for t in SHOWN), mask]
    return np.concatenate([np.pad(cell, ((2, 2), (2, 2), (0, 0))) for cell in cells], axis=1)


def main() -> None:
    strips = [strip(index) for index in CLIPS]
    half = len(strips) // 2
    left, right = np.concatenate(strips[:half]), np.concatenate(strips[half:])
    sheet = np.concatenate([left, np.zeros((len(left), 12, 3), np.uint8), right], axis=1)
    path = Path(__file__).with_name("synthetic.jpg")
    cv2.imwrite(str(path), sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
