"""COCO-2017 as clips: groups of five different images of one category.

    annotations/instances_train2017.json    train2017/<id>.jpg
    annotations/instances_val2017.json      val2017/<id>.jpg

This stands for the "COCO-SEG" of the MSSA paper, which is not to be had, as UFO, its closest public
relative, rebuilds it: an image counts for a category when one of its instances has an area above
4000 pixels.  Its mask is the union of all instances of the category, the small ones too, since they
look the same; an image with a crowd region of the category is left out, since a crowd's outline is
not the objects'.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...files import is_plain, read_json
from ..records import Record, Records
from .folders import OnProblem, fail, gathered, need_folder, unknown_split

SPLITS = ("train", "val")


def open_coco(
    root: Path,
    split: str,
    *,
    group: int = 5,
    min_area: float = 4000.0,
    seed: int = 0,
    on_problem: OnProblem = fail,
) -> Records:
    """Sequences `<category>-<number>` of `group` images; `seed` decides which.

    Images that are left over after the last whole group of a category are not used.
    """
    if split not in SPLITS:
        raise unknown_split("coco", split, SPLITS)
    images = need_folder(root / f"{split}2017", "<id>.jpg")
    path = root / "annotations" / f"instances_{split}2017.json"
    categories, files, instances = read_instances(path, min_area)
    present = {entry.name for entry in images.iterdir()}
    records: list[Record] = []
    for category in sorted(instances):
        ids = []
        for identity in sorted(instances[category]):
            if files[identity]["file_name"] in present:
                ids.append(identity)
            else:
                missing = images / files[identity]["file_name"]
                on_problem(f"{missing}: no such image, but {path} lists it")
        ids = list(np.random.default_rng([seed, category]).permutation(ids))
        for number in range(len(ids) // group):
            sequence = f"{categories[category].replace(' ', '-')}-{number:05d}"
            for t, identity in enumerate(ids[number * group : (number + 1) * group]):
                info = files[identity]
                image = images / info["file_name"]
                shapes = tuple(instances[category][identity])
                mask = partial(union, shapes, info["height"], info["width"])
                records.append(Record(sequence, t, image.stem, image, mask, split))
    return gathered("coco", split, records, path)


def read_instances(
    path: Path, min_area: float
) -> tuple[dict[int, str], dict[int, dict[str, Any]], dict[int, dict[int, list[Any]]]]:
    """(category id -> name, image id -> file, category id -> image id -> segmentations)."""
    try:
        content = read_json(path, "instances file of COCO")
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        files = {entry["id"]: entry for entry in content["images"]}
        found: dict[int, dict[int, list[Any]]] = {}
        large: set[tuple[int, int]] = set()
        crowded: set[tuple[int, int]] = set()
        for entry in content["annotations"]:
            key = entry["category_id"], entry["image_id"]
            if entry.get("iscrowd"):
                crowded.add(key)
                continue
            found.setdefault(key[0], {}).setdefault(key[1], []).append(entry["segmentation"])
            if entry["area"] > min_area:
                large.add(key)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not an instances file of COCO ({error!r})") from None
    for name in categories.values():
        if not isinstance(name, str) or not is_plain(name):
            raise InputError(f"{path}: category {name!r} cannot be the name of a folder")
    kept = {
        category: {i: shapes for i, shapes in by.items() if (category, i) in large - crowded}
        for category, by in found.items()
    }
    return categories, files, kept


def union(segmentations: tuple[Any, ...], height: int, width: int) -> np.ndarray:
    """(height, width) uint8, 0 or 255: the pixels whose centre lies in a segmentation."""
    from skimage.draw import polygon

    mask = np.zeros((height, width), np.uint8)
    for segmentation in segmentations:
        if isinstance(segmentation, dict):
            mask[decode_rle(segmentation, height, width)] = 255
            continue
        for outline in segmentation:
            points = np.asarray(outline, np.float64).reshape(-1, 2)
            # COCO's (0, 0) is the corner of the first pixel, here it is its centre.
            columns, rows = points.T - 0.5
            mask[polygon(rows, columns, mask.shape)] = 255
    return mask


def decode_rle(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """(height, width) bool of a run-length code: run lengths, background first, down the columns.

    Lengths are a list, or COCO's text: six bits a character from "0" on, five of them digits, the
    lowest first, the sixth "more follows"; from the fourth length on, differences to the last but
    one.  `pycocotools` decodes them too, but fills up lengths that are too few with what lies in
    memory, and a size that does not fit into memory ends the process.
    """
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        counts = decode_text(counts.encode() if isinstance(counts, str) else counts)
    if sum(counts) != height * width or list(segmentation["size"]) != [height, width]:
        raise InputError(
            f"run lengths of size {segmentation['size']} and sum {sum(counts)} do not fill "
            f"{height}x{width} pixels"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def decode_text(text: bytes) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digits = character - 48
        value |= (digits & 31) << shift
        shift += 5
        if digits & 32:
            continue
        if digits & 16:  # the highest digit is the sign
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
