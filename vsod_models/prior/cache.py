"""Motion priors of a dataset, on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.records import Record, Records
from ..files import inside, write_png
from .flow import PriorSource, frame_prior, naming
from .motion import neighbour


def default_cache() -> Path:
    """`vsod/priors` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vsod" / "priors"


def make_priors(
    records: Records,
    source: PriorSource,
    cache: str | Path | None = None,
    *,
    on_frame: Callable[[], object] = lambda: None,
) -> Records:
    """The records with `prior` set; made where the cache has none yet.

    Files are `<cache>/<key>/<dataset>/<sequence>-<stamp>/<name>.png`, 8-bit grey: `key` is what
    made them and `stamp` what they were made from (names, sizes and times of the pictures).
    Nothing is written beside the pictures.

    Args:
        cache: folder; None: `default_cache()`.
        on_frame: called after each frame.

    Raises:
        InputError: a picture that cannot be read, or of another size than the one before it.
    """
    root = Path(cache or default_cache()) / source.key() / records.dataset
    found: dict[tuple[str, str], Path] = {}
    for sequence, frames in records.sequences.items():
        folder = inside(root, f"{sequence}-{stamp(frames)}")
        paths = {(sequence, record.name): inside(folder, f"{record.name}.png") for record in frames}
        found |= paths
        if all(path.is_file() for path in paths.values()):
            for _ in frames:
                on_frame()
            continue
        for record, prior in sequence_priors(frames, source):
            write_png(paths[sequence, record.name], prior)
            on_frame()
    done = [replace(r, prior=found[r.sequence, r.name]) for r in records]
    return Records(records.dataset, records.split, done)


def sequence_priors(
    frames: Sequence[Record], source: PriorSource
) -> Iterator[tuple[Record, np.ndarray]]:
    """Each record of a sequence with its prior (H, W) uint8; each picture is read once."""
    pictures: dict[int, np.ndarray] = {}
    for i, record in enumerate(frames):
        other = neighbour(i, len(frames))
        for t in (i, other):
            if t not in pictures:
                pictures[t] = frames[t].read_image()
        with naming(record, frames[other]):
            prior = frame_prior(source, pictures[i], pictures[other])
        yield record, np.rint(255 * prior).astype(np.uint8)
        pictures.pop(i - 1, None)


def stamp(frames: Sequence[Record]) -> str:
    """Changes when the pictures of a sequence do."""
    digest = hashlib.sha256()
    for record in frames:
        if isinstance(record.image, Path):
            status = record.image.stat()
            facts = (str(record.image.resolve()), status.st_size, status.st_mtime_ns)
            digest.update(repr(facts).encode())
    if not isinstance(frames[0].image, Path):  # pictures made when read: the first stands for all
        digest.update(frames[0].read_image().tobytes() + str(len(frames)).encode())
    return digest.hexdigest()[:12]
