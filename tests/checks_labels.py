"""Clips with coarse labels to correct: three textured blocks a frame, one of them wrong, moving."""

import cv2
import numpy as np

from vsod_models.data import open_dataset
from vsod_models.labels.coarse import make_labels

SIZE = (120, 160)
WRONG = (12, 14, 30, 26)  # top, left, height, width in the first frame; moves right by 3
RIGHT = (60, 80, 36, 44)
SMALL = (20, 120, 12, 12)


def block(of, t=0):
    top, left, height, width = of
    return np.s_[top : top + height, left + 3 * t : left + 3 * t + width]


def labelled_clips(folder, sequences=("one", "two"), frames=6):
    """Records in `folder/clips` and their labels in `folder/labels`, made of `folder/maps`."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    ground = cv2.GaussianBlur(noise, (0, 0), 3)
    clips = folder / "clips"
    for sequence in sequences:
        for t in range(frames):
            frame = ground.copy()
            truth, saliency = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
            for of in (WRONG, RIGHT, SMALL):
                frame[block(of, t)] = noise[block(of)] // 2 + (100, 40, 0)
                saliency[block(of, t)] = 200
            truth[block(RIGHT, t)] = 255
            for kind, picture, ending in (
                ("clips/JPEGImages/480p", frame[..., ::-1], "jpg"),
                ("clips/Annotations/480p", truth, "png"),
                ("maps", saliency, "png"),
            ):
                path = folder / kind / sequence / f"{t:05d}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), picture)
    lists = clips / "ImageSets" / "480p"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        lines = [
            f"/JPEGImages/480p/{s}/{t:05d}.jpg /Annotations/480p/{s}/{t:05d}.png\n"
            for s in sequences for t in range(frames)
        ]  # fmt: skip
        (lists / f"{split}.txt").write_text("".join(lines))
    records = open_dataset("folder", clips, "train")
    make_labels(records, folder / "labels", [str(folder / "maps")])
    return records


def remade(folder, records):
    """The labels of `label coarse --erase`, by frame; None where a frame has none."""
    out = folder / f"remade-{len(list(folder.glob('remade-*')))}"
    make_labels(records, out, [str(folder / "maps")], erase_list=folder / "labels.erase.json")
    found = {}
    for record in records:
        picture = cv2.imread(str(out / record.sequence / f"{record.name}.png"), 0)
        found[f"{record.sequence}/{record.name}"] = None if picture is None else picture > 0
    return found
