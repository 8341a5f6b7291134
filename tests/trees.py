"""Miniature trees of datasets, for the tests of whoever reads them."""

import json

import numpy as np
from PIL import Image

SIZE = (12, 16)


def image(path, size=SIZE, value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def square(inside=255, outside=0, rows=slice(2, 6), size=SIZE):
    array = np.full(size, outside, np.uint8)
    array[rows, 3:9] = inside
    return array


def mask(path, array=None, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(square() if array is None else array)
    picture.convert(mode).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def davis(root, sequences=(("bear", 3), ("bike", 2)), split="train"):
    lines = []
    for name, count in sequences:
        for t in range(count):
            image(root / "JPEGImages/480p" / name / f"{t:05d}.jpg")
            mask(root / "Annotations/480p" / name / f"{t:05d}.png")
            lines.append(
                f"/JPEGImages/480p/{name}/{t:05d}.jpg /Annotations/480p/{name}/{t:05d}.png"
            )
    text(root / f"ImageSets/480p/{split}.txt", "\n".join(lines) + "\n")
    return root


def fbms(root):
    """Three frames a sequence; masks as each of the release's kinds has them."""
    for part, name in (("Trainingset", "cars2"), ("Testset", "camel01"), ("Testset", "tennis"),
                       ("Testset", "marple2"), ("Testset", "marple7")):  # fmt: skip
        for t in (1, 2, 10):
            stem = f"tennis{t + 454}" if name == "tennis" else f"{name}_{t:02d}"
            image(root / part / name / f"{stem}.jpg")
        text(root / part / name / f"{name}.bmf", "3 1\n")
    mask(root / "Trainingset/cars2/GroundTruth/cars2_01.pgm", square(64))
    mask(root / "Testset/tennis/GroundTruth/tennis455.pgm", square(1))
    mask(root / "Testset/marple2/GroundTruth/marple2_01.pgm", square(255, outside=76))
    mask(root / "Testset/marple7/GroundTruth/marple7_01.pgm", square(60, outside=8))
    truth = root / "Testset/camel01/GroundTruth"
    for number in (1, 10):
        colours = np.repeat(square(0, outside=255)[..., None], 3, 2)
        colours[2:4, 3:9] = (255, 0, 0)
        mask(truth / f"camel01_{number:04d}_gt.ppm", colours, "RGB")
        mask(truth / f"camel01_{number:04d}_PROB_gt.ppm", colours, "RGB")
    mask(truth / "camel01_0002.pgm")
    text(truth / "camel01Def.dat", "Total number of regions:\n2\n")
    return root


def segtrack(root):
    for name, ending in (("frog", "png"), ("bmx", "bmp"), ("worm", "png"), ("penguin", "bmp")):
        for t in range(2):
            image(root / "JPEGImages" / name / f"{name}_{t:05d}.{ending}")
    for t in range(2):
        mask(root / "GroundTruth/frog" / f"frog_{t:05d}.bmp")
        mask(root / "GroundTruth/worm" / f"worm_{t:05d}.png")
        mask(root / "GroundTruth/bmx/1" / f"bmx_{t:05d}.bmp", square(rows=slice(2, 4)))
        mask(root / "GroundTruth/bmx/2" / f"bmx_{t:05d}.png", square(rows=slice(4, 6)), "RGB")
        mask(root / "GroundTruth/penguin/1" / f"penguin_{t:05d}.png")
    mask(root / "GroundTruth/worm/0000000000.png")
    return root


# x 20..90, y 10..80: 4900 pixels
BOX = [[20.0, 10.0, 90.0, 10.0, 90.0, 80.0, 20.0, 80.0]]


def coco_tree(root, images=12):
    annotations = []

    def add(image_id, category, segmentation, area, crowd=0):
        annotations.append(dict(id=len(annotations), image_id=image_id, category_id=category,
                                segmentation=segmentation, area=area, iscrowd=crowd))  # fmt: skip

    for i in range(images):
        image(root / "train2017" / f"{i:012d}.jpg", (100, 120))
        add(i, 1, BOX, 4900.0)
        add(i, 2, [[0, 0, 9, 0, 9, 9, 0, 9]], 81.0)  # too small for a group of its own
    add(0, 1, [[100.0, 90.0, 110.0, 90.0, 110.0, 100.0, 100.0, 100.0]], 100.0)
    add(1, 1, dict(counts=[12000], size=[100, 120]), 9000.0, crowd=1)
    content = dict(
        categories=[dict(id=1, name="polar bear"), dict(id=2, name="cup")],
        images=[
            dict(id=i, file_name=f"{i:012d}.jpg", height=100, width=120) for i in range(images)
        ],
        annotations=annotations,
    )
    text(root / "annotations/instances_train2017.json", json.dumps(content))
    return root
