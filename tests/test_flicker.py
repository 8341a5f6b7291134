"""Flicker: zero for masks that move with the picture, and what it counts for those that do not."""

import numpy as np
import pytest

pytest.importorskip("cv2")

from vsod_models.cli.app import main
from vsod_models.data import open_dataset
from vsod_models.errors import InputError
from vsod_models.evaluation.flicker import change, flicker_of_folder
from vsod_models.media.writing import encode_png

HEIGHT, WIDTH = 96, 128


def dataset(root, frames=5):
    """A textured picture that moves by 3 pixels a frame, a square in it; the DAVIS layout."""
    texture = np.random.default_rng(0).integers(0, 255, (HEIGHT // 4, WIDTH // 2, 3), np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    for t in range(frames):
        picture = texture[:, 3 * t : 3 * t + WIDTH]
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[30:60, 60 - 3 * t : 100 - 3 * t] = 255
        for kind, image in (("JPEGImages", picture), ("Annotations", mask)):
            folder = root / kind / "480p" / "clip"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{t:05d}.png").write_bytes(encode_png(np.ascontiguousarray(image)))
    (root / "ImageSets" / "480p").mkdir(parents=True)
    (root / "ImageSets" / "480p" / "train.txt").write_text("clip\n")
    return open_dataset("folder", root, "train")


def saved(folder, maps):
    for t, levels in enumerate(maps):
        (folder / "clip").mkdir(parents=True, exist_ok=True)
        (folder / "clip" / f"{t:05d}.png").write_bytes(encode_png(levels))
    return folder


def test_masks_that_move_with_the_picture_do_not_flicker(tmp_path):
    records = dataset(tmp_path / "data")
    truth = [record.read_mask() * np.uint8(255) for record in records]
    still = flicker_of_folder(saved(tmp_path / "a", truth), records)
    assert still.predictions == pytest.approx(still.truth) and still.truth < 0.01
    blinking = [mask * (t % 2) for t, mask in enumerate(truth)]
    found = flicker_of_folder(saved(tmp_path / "b", blinking), records)
    share = (truth[0] > 0).mean()
    assert found.predictions == pytest.approx(share, rel=0.1) and found.pairs == 4


def test_the_change_is_along_the_flow():
    first = np.zeros((8, 8), np.float32)
    first[2:4, 2:4] = 1
    second = np.roll(first, (1, 2), (0, 1))
    flow = np.zeros((8, 8, 2), np.float32)
    assert change(first, second, flow) == pytest.approx(8 / 64)
    flow[...] = 2, 1
    assert change(first, second, flow) == 0
    flow[...] = 100
    assert change(first, second, flow) == 0, "nothing left inside the picture"


def test_the_command_reports_it(tmp_path, capsys):
    records = dataset(tmp_path / "data", 4)
    maps = saved(tmp_path / "maps", [r.read_mask() * np.uint8(255) for r in records])
    common = ["--data", str(tmp_path / "data"), "--dataset", "folder", "--split", "train"]
    with pytest.raises(SystemExit) as end:
        main(["eval", "--pred", str(maps), *common, "--workers", "1", "--flicker"])
    assert end.value.code == 0
    assert "Flicker: 0.00" in capsys.readouterr().out


def test_a_clip_of_one_frame_has_none(tmp_path):
    records = dataset(tmp_path / "data", 1)
    with pytest.raises(InputError, match="no two neighbouring frames"):
        flicker_of_folder(saved(tmp_path / "a", [np.zeros((8, 8), np.uint8)]), records)
