"""Still images with masks: DUTS, or any folder of images beside a folder of masks.

    DUTS-TR/DUTS-TR-Image/<name>.jpg   DUTS-TR/DUTS-TR-Mask/<name>.png      (10553 pairs)
    DUTS-TE/DUTS-TE-Image/<name>.jpg   DUTS-TE/DUTS-TE-Mask/<name>.png      (5019 pairs)
    images/<name>.jpg                  masks/<name>.png

Each image is a sequence of one frame.  Masks are anti-aliased: grey above 127 counts.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..records import Record, Records
from .folders import Counts, OnProblem, fail, gathered, need_folder, pictures, unknown_split

SPLITS = ("train",)
DUTS_SPLITS = ("train", "test")
DUTS_COUNTS = {"train": Counts(10553, 10553, 10553), "test": Counts(5019, 5019, 5019)}
IMAGES = ("images", "image", "Images", "Image", "Imgs", "imgs", "img", "JPEGImages")
MASKS = (
    "masks", "mask", "Masks", "Mask", "GT", "gt", "GT_object_level", "ground-truth",
    "ground_truth_mask", "Annotations",
)  # fmt: skip


def open_stills(
    root: Path,
    split: str,
    *,
    images: str | None = None,
    masks: str | None = None,
    on_problem: OnProblem = fail,
) -> Records:
    """`images` and `masks`: names of the two folders of `root`, where they are unusual ones.

    split: a text file (.txt) with the names, without endings, of the pairs to take, one a line;
    any other name takes all pairs.
    """
    need_folder(root, "a folder of images and one of masks")
    image_folder = _folder(root, images, IMAGES, "images")
    mask_folder = _folder(root, masks, MASKS, "masks")
    records = _pairs("stills", split, image_folder, mask_folder, on_problem)
    return records.of_sequences(_listed(Path(split))) if split.endswith(".txt") else records


def _listed(file: Path) -> list[str]:
    try:
        names = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable list of names ({error})") from None
    if not names:
        raise InputError(f"{file}: a list without names")
    return names


def open_duts(root: Path, split: str, *, on_problem: OnProblem = fail) -> Records:
    if split not in DUTS_SPLITS:
        raise unknown_split("duts", split, DUTS_SPLITS)
    part = {"train": "DUTS-TR", "test": "DUTS-TE"}[split]
    base = root / part if (root / part).is_dir() else root
    image_folder = need_folder(base / f"{part}-Image", "<name>.jpg")
    mask_folder = need_folder(base / f"{part}-Mask", "<name>.png")
    return _pairs("duts", split, image_folder, mask_folder, on_problem)


def _folder(root: Path, name: str | None, usual: tuple[str, ...], what: str) -> Path:
    if name is not None:
        return need_folder(root / name, what)
    # By the listing, not by trial: some file systems do not tell `Images` from `images`.
    found = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name in usual]
    if len(found) != 1:
        state = "several folders" if found else "no folder"
        raise InputError(f"{root}: {state} of {what} in it; name one with {what}=...")
    return found[0]


def _pairs(dataset: str, split: str, images: Path, masks: Path, on_problem: OnProblem) -> Records:
    by_stem = pictures(masks, on_problem=on_problem)
    records = []
    for stem, image in pictures(images, on_problem=on_problem).items():
        mask = by_stem.pop(stem, None)
        if mask is None:
            on_problem(f"{image}: an image without its mask in {masks}")
            continue
        records.append(Record(stem, 0, stem, image, mask, split))
    for mask in by_stem.values():
        on_problem(f"{mask}: a mask without its image in {images}")
    return gathered(dataset, split, records, images)
