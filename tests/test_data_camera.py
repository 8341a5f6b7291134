"""The virtual camera: aspect ratio kept, masks that follow, objects that move on their own."""

from dataclasses import replace

import numpy as np
import pytest

from vsod_models.data.camera import Camera, still_clip, video_clip, without_object
from vsod_models.data.transforms import Augmentation

PLAIN = Augmentation(
    rotation=0, flip=0, crop=(1, 1), drift=0, drift_rotation=0, drift_zoom=0, keep_aspect=True
)


def disc(height=120, width=200, centre=(60, 100), radius=25):
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
    image = np.where(inside[..., None], (250, 20, 20), (20, 90, 20)).astype(np.uint8)
    return image, inside.astype(np.uint8) * 255


@pytest.mark.parametrize("size", [(60, 100), (64, 64), (96, 48)])
def test_a_round_thing_stays_round(size):
    """But for the stretch, which is at most 1.35 to 1."""
    image, mask = disc()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, (seen,) = still_clip(image, mask, 1, size, PLAIN, rng)
        rows, columns = np.nonzero(seen > 127)
        edge = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
        if not edge.any():
            ratio = (np.ptp(columns) + 1) / (np.ptp(rows) + 1)
            assert 1 / 1.45 < ratio < 1.45


def test_masks_follow_the_picture():
    """Colour tells where the object is: the mask says the same, moving or not."""
    image, mask = disc()
    augmentation = Augmentation(keep_aspect=True, object_motion=1.0)
    moved = []
    for seed in range(12):
        frames, masks = still_clip(
            image, mask, 3, (64, 96), augmentation, np.random.default_rng(seed)
        )
        for frame, seen in zip(frames, masks, strict=True):
            red = frame[..., 0] > frame[..., 1]
            assert (red != (seen > 127)).mean() < 0.02
        moved.append(any((masks[0] != later).any() for later in masks[1:]))
    assert all(moved)


def test_the_hole_behind_an_object_is_filled_from_around_it():
    image, mask = disc()
    filled = without_object(image, mask)
    assert np.abs(filled.astype(int) - (20, 90, 20)).max() < 40


def test_frames_of_a_video_share_one_camera():
    image, mask = disc()
    rng = np.random.default_rng(1)
    frames, planes = video_clip(
        [image] * 3,
        [[mask]] * 3,
        (64, 96),
        Augmentation(keep_aspect=True),
        rng,
    )
    assert all((frame == frames[0]).all() for frame in frames)
    assert all((row[0] == planes[0][0]).all() for row in planes)


def test_without_augmentation_the_whole_frame_is_seen():
    camera = Camera((100, 200), (50, 50), None, np.random.default_rng(0))
    corner = camera.at(0) @ (50, 50, 1)
    assert corner[:2].tolist() == [200, 100]


def test_copies_of_a_mover_stand_still_and_are_not_in_its_mask():
    image, mask = disc()
    augmentation = replace(PLAIN, object_motion=1.0, crowd=1.0)
    shown = 0
    for seed in range(6):
        frames, masks = still_clip(
            image, mask, 3, (120, 200), augmentation, np.random.default_rng(seed)
        )
        copies = [(f[..., 0] > 200) & (m == 0) for f, m in zip(frames, masks, strict=True)]
        moving = np.any([m > 0 for m in masks], 0)
        shown += bool(copies[0].any())
        for later in copies[1:]:
            assert (later == copies[0])[~moving].mean() > 0.99
    assert shown >= 4
