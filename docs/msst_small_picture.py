"""Draws docs/msst-small.jpg: four frames of each held-out clip, and the masks below them.

python docs/msst_small_picture.py clips maps    # as the commands of docs/training.md leave them
"""

import sys
from pathlib import Path

import cv2
import numpy as np

SHOWN = 4
SIZE = 134, 96  # of a frame, width and height


def block(frames: Path, masks: Path) -> np.ndarray:
    """(2 rows of SHOWN) of one sequence."""
    files = sorted(frames.iterdir())
    picked = [files[i] for i in np.linspace(0, len(files) - 1, SHOWN).round().astype(int)]
    rows = picked, [masks / f"{path.stem}.png" for path in picked]
    pictures = [
        [cv2.resize(cv2.imread(str(path)), SIZE, interpolation=cv2.INTER_AREA) for path in row]
        for row in rows
    ]
    sheet = np.concatenate([np.concatenate(row, 1) for row in pictures])
    return np.pad(sheet, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def main() -> None:
    clips, maps = Path(sys.argv[1]), Path(sys.argv[2])
    sequences = sorted(path.name for path in maps.iterdir() if path.is_dir())
    blocks = [block(clips / "JPEGImages/480p" / name, maps / name) for name in sequences]
    rows = [np.concatenate(blocks[i : i + 2], 1) for i in range(0, len(blocks), 2)]
    path = Path(__file__).with_name("msst-small.jpg")
    cv2.imwrite(str(path), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
