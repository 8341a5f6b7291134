"""Augmentation by one warp a frame: a virtual camera over frames that keep their aspect ratio.

The camera's crop, turn, flip and stretch are drawn once a clip.  A still image becomes a clip by
a camera that walks, and by an object that moves on its own: the object is lifted off by its mask,
the hole behind it is filled in from around it, and each gets its own path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from .transforms import Augmentation


class Camera:
    """Where each pixel of a sample of `size` (height, width) comes from in a frame of `frame`.

    `at(t)` is the matrix from sample pixels to frame pixels in frame t of the clip.
    """

    def __init__(
        self,
        frame: tuple[int, int],
        size: tuple[int, int],
        augmentation: Augmentation | None,
        rng: np.random.Generator,
        walk: int = 0,
    ):
        (height, width), (rows, columns) = frame, size
        self.size = size
        if augmentation is None:  # the whole frame
            self.matrices = [scaling(width / columns, height / rows)]
            return
        stretch = math.exp(rng.uniform(-1, 1) * math.log(STRETCH) / 2)
        across, along = columns * stretch, rows / stretch
        share = rng.uniform(*augmentation.crop)
        scale = min(width / across, height / along) * math.sqrt(share)
        turn = math.radians(rng.uniform(-1, 1) * augmentation.rotation)
        flip = -1.0 if rng.random() < augmentation.flip else 1.0
        spare_x, spare_y = width - scale * across, height - scale * along
        x = width / 2 + rng.uniform(-0.5, 0.5) * spare_x
        y = height / 2 + rng.uniform(-0.5, 0.5) * spare_y
        centre = shift(-columns / 2, -rows / 2)
        sides = scaling(flip * scale * stretch, scale / stretch)
        path = walked(walk, augmentation, rng) if walk else np.zeros((1, 4))
        self.matrices = [
            shift(x + dx * scale * across, y + dy * scale * along)
            @ rotation(turn + angle)
            @ scaling(zoom, zoom)
            @ sides
            @ centre
            for dx, dy, angle, zoom in ((*row[:3], math.exp(row[3])) for row in path)
        ]

    def at(self, t: int) -> np.ndarray:
        return self.matrices[min(t, len(self.matrices) - 1)]

    def picture(
        self, frame: np.ndarray, t: int, object_path: np.ndarray | None = None
    ) -> np.ndarray:
        """The frame as the camera sees it; outside of it is its mirror image."""
        matrix = self.at(t) if object_path is None else object_path @ self.at(t)
        border = cv2.BORDER_REFLECT_101 if object_path is None else cv2.BORDER_CONSTANT
        return cv2.warpAffine(
            frame,
            matrix[:2],
            self.size[::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=border,
        )


STRETCH = 1.35  # widest against narrowest, of a picture's aspect ratio
OBJECT_STEP = 0.04  # of the side, an object's own way from one frame to the next
OBJECT_TURN = math.radians(4.0)
OBJECT_ZOOM = 0.03
LEAST_KEPT = 0.6  # of the mask, for a still to be a sample


def shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def walked(steps: int, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """(steps, 4): shift of x and y in shares of the side, angle and log zoom, of a smooth walk."""
    speed = rng.uniform(-1, 1, 4)
    jolt = rng.uniform(-0.3, 0.3, (steps, 4))
    path = np.cumsum(speed + jolt, axis=0)
    path -= path[rng.integers(steps)]
    return path * (
        augmentation.drift,
        augmentation.drift,
        math.radians(augmentation.drift_rotation),
        augmentation.drift_zoom,
    )


def video_clip(
    frames: Sequence[np.ndarray],
    planes: Sequence[Sequence[np.ndarray]],
    size: tuple[int, int],
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Frames (H, W, 3) and planes (H, W) of a clip -> the same of `size`, by one camera."""
    small = [_smaller(f, p, size) for f, p in zip(frames, planes, strict=True)]
    camera = Camera(small[0][0].shape[:2], size, augmentation, rng)
    return (
        [camera.picture(frame, 0) for frame, _ in small],
        [[camera.picture(plane, 0) for plane in row] for _, row in small],
    )


def still_clip(
    image: np.ndarray,
    mask: np.ndarray,
    length: int,
    size: tuple[int, int],
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A still (H, W, 3) and its mask (H, W), 0 or 255 -> `length` frames and masks of `size`.

    The camera is drawn again, a few times, if it misses most of the object.
    """
    image, (mask,) = _smaller(image, [mask], size)
    for _ in range(4):
        camera = Camera(image.shape[:2], size, augmentation, rng, walk=length if length > 1 else 0)
        matrix = camera.at(length // 2)
        seen = float(camera.picture(mask, length // 2).mean()) * size[0] * size[1]
        whole = float(mask.mean()) * mask.size / max(abs(np.linalg.det(matrix)), 1e-9)
        if seen >= LEAST_KEPT * whole:
            break
    moves = length > 1 and rng.random() < augmentation.object_motion and not _cut_off(mask)
    if not moves:
        times = range(length)
        return [camera.picture(image, t) for t in times], [camera.picture(mask, t) for t in times]
    rows, columns = np.nonzero(mask > 127)
    centre = columns.mean(), rows.mean()
    side = math.sqrt(mask.shape[0] * mask.shape[1])
    speed = rng.uniform(-1, 1, 4)
    path = np.cumsum(speed + rng.uniform(-0.4, 0.4, (length, 4)), axis=0)
    path -= path[rng.integers(length)]
    behind = without_object(image, mask)
    layer = np.dstack([image, cv2.GaussianBlur(mask, (0, 0), 0.7)])
    if augmentation.crowd and rng.random() < augmentation.crowd:
        behind = crowded(behind, layer, centre, rng)
    frames, masks = [], []
    for t in range(length):
        dx, dy, turn, zoom = path[t] * (OBJECT_STEP * side, OBJECT_STEP * side, OBJECT_TURN,
                                        OBJECT_ZOOM)  # fmt: skip
        back = (
            shift(*centre)
            @ rotation(turn)
            @ scaling(math.exp(zoom), math.exp(zoom))
            @ shift(-centre[0] - dx, -centre[1] - dy)
        )
        frames.append(over(camera.picture(layer, t, back), camera.picture(behind, t)))
        masks.append(camera.picture(mask, t, back))
    return frames, masks


def over(layer: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """A layer (H, W, 4) with its alpha over a picture (H, W, 3)."""
    alpha = layer[:, :, 3:].astype(np.float32) / 255
    return (layer[:, :, :3] * alpha + behind * (1 - alpha)).astype(np.uint8)


def crowded(
    picture: np.ndarray, layer: np.ndarray, centre: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """The picture with one to three copies of an object, (H, W, 4), elsewhere in it."""
    height, width = picture.shape[:2]
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(0.6, 1.2)
        place = (
            shift(rng.uniform(0.1, 0.9) * width, rng.uniform(0.25, 0.75) * height)
            @ rotation(rng.uniform(-0.2, 0.2))
            @ scaling(size * rng.choice([-1.0, 1.0]), size)
            @ shift(-centre[0], -centre[1])
        )
        picture = over(cv2.warpAffine(layer, place[:2], (width, height)), picture)
    return picture


def without_object(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with what its mask covers filled in from around it, at a quarter of its size."""
    height, width = mask.shape
    small = (max(width // 4, 1), max(height // 4, 1))
    hole = cv2.dilate((mask > 8).astype(np.uint8), np.ones((9, 9), np.uint8))
    filled = cv2.inpaint(
        cv2.resize(image, small, interpolation=cv2.INTER_AREA),
        cv2.resize(hole, small, interpolation=cv2.INTER_NEAREST),
        3,
        cv2.INPAINT_TELEA,
    )
    share = cv2.GaussianBlur(hole.astype(np.float32), (0, 0), 2)
    return cv2.blendLinear(cv2.resize(filled, (width, height)), image, share, 1 - share)


def jittered(
    frames: Sequence[np.ndarray], augmentation: Augmentation, rng: np.random.Generator
) -> list[np.ndarray]:
    """The frames under one change of brightness, contrast and saturation, some of them blurred."""
    bright, contrast, colour = (
        1 + rng.uniform(-amount, amount)
        for amount in (augmentation.brightness, augmentation.contrast, augmentation.saturation)
    )
    blur = rng.uniform(0.4, 1.2) if rng.random() < 0.15 else 0.0
    middle = float(frames[0].mean())
    mixed = colour * np.eye(3) + (1 - colour) * np.array([0.299, 0.587, 0.114])
    matrix = np.empty((3, 4))
    matrix[:, :3] = bright * contrast * mixed
    matrix[:, 3] = bright * (1 - contrast) * middle
    changed = [cv2.transform(frame, matrix) for frame in frames]
    return [cv2.GaussianBlur(frame, (0, 0), blur) for frame in changed] if blur else changed


def _cut_off(mask: np.ndarray) -> bool:
    """Whether the object goes on outside of the image, or there is none."""
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool((edge > 127).mean() > 0.02) or not (mask > 127).any()


def _smaller(
    image: np.ndarray, planes: Sequence[np.ndarray], size: tuple[int, int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Image and planes, shrunk by area to at most 1.6 times what the sample needs."""
    factor = 1.6 * max(size[0] / image.shape[0], size[1] / image.shape[1])
    if factor >= 1:
        return image, list(planes)
    small = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return (
        cv2.resize(image, small, interpolation=cv2.INTER_AREA),
        [cv2.resize(plane, small, interpolation=cv2.INTER_AREA) for plane in planes],
    )
