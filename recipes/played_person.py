"""Plays the person who erases wrong regions of coarse labels, by the ground truth.

python recipes/played_person.py LABELS DATASET ROOT SPLIT LIST.json

LABELS is a folder of `vsod label coarse`.  On every second labelled frame, each region of which
most is background goes onto the list, which `vsod label coarse --erase` takes.
"""

import json
import sys
from pathlib import Path

import cv2

from vsod_models.data import open_dataset
from vsod_models.data.records import grey, read_as_stored
from vsod_models.files import read_json, whole_file


def main(labels: Path, dataset: str, root: Path, split: str, file: Path) -> None:
    labelled = read_json(labels / "manifest.json", "manifest of `vsod label coarse`")["frames"]
    truth = {f"{r.sequence}/{r.name}": r for r in open_dataset(dataset, root, split)}
    entries, looked_at = [], list(labelled)[::2]
    for frame in looked_at:
        mask = truth[frame].read_mask()
        assert mask is not None
        label = grey(read_as_stored(labels / f"{frame}.png")) > 127
        count, regions = cv2.connectedComponents(label.astype("uint8"))
        for region in range(1, count):
            inside = regions == region
            if mask[inside].mean() < 0.5:
                y, x = next(zip(*inside.nonzero(), strict=True))
                entries.append({"frame": frame, "point": [int(x), int(y)]})
    with whole_file(file) as part:
        part.write_text(json.dumps(entries))
    print(f"{file}: {len(entries)} regions erased, of {len(looked_at)} of {len(labelled)} labels")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
