"""Predictions and downloads, one at a time; those that wait are in a queue that the page shows.

A prediction keeps the saliency of each frame as a PNG, so that every view and format is made of
it later without the model.  Its preview has each frame above what was made of it, in one video:
the two halves cannot run apart.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, describe
from .clips import MAX_FRAMES, Clip

FORMATS = ("mp4", "mov", "webm", "gif", "png")
PREVIEW_SIDE = 960  # pixels; previews are no larger
VIEWS = ("overlay", "mask", "matte", "cutout")
KEPT = 20  # jobs that are over; older ones go


class Cancelled(Exception):
    """The user does not want it any more."""


@dataclass
class Job:
    """A prediction, or (with `of`) a file made of one."""

    clip: Clip
    view: str
    model: str = ""
    crf: str | None = None
    of: Job | None = None
    format: str = ""  # of a file; "preview": what the page plays
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "waiting"  # running, done, failed, cancelled
    done: int = 0
    total: int | None = None
    began: float = 0.0
    seconds: float = 0.0
    runs_on: str = ""  # device, model, backends
    error: str = ""
    notes: list[str] = field(default_factory=list)
    file: Path | None = None
    latest: Any = None  # the last pair of frames, for the page to show while it works
    stop: threading.Event = field(default_factory=threading.Event)

    def about(self) -> dict[str, Any]:
        kept = (
            "id", "view", "model", "crf", "format", "state", "done", "total", "runs_on", "error",
            "notes",
        )  # fmt: skip
        seconds = time.monotonic() - self.began if self.state == "running" else self.seconds
        return {
            **{key: getattr(self, key) for key in kept},
            "clip": self.clip.about(),
            "of": self.of.id if self.of else None,
            "speed": round(self.done / seconds, 2) if self.done and seconds > 0 else 0,
        }

    @property
    def name(self) -> str:
        """What its file is called where it is saved."""
        ending = ".zip" if self.format == "png" and not self.clip.picture else f".{self.format}"
        return f"{Path(self.clip.name).stem}-{self.view}{ending}"


class Jobs:
    """The queue, and the one thread that works on it.

    folder: where everything is written.  device: as for `VideoPredictor`.
    """

    def __init__(self, folder: Path, device: str = "auto"):
        self.folder, self.device = folder, device
        self.of: dict[str, Job] = {}  # oldest first
        self.changed = threading.Condition()
        self.closed = False
        self.loaded: tuple[Any, Any] = (None, None)  # (model, CRF) and predictor used last
        self.thread = threading.Thread(target=self._work, name="vsod-jobs", daemon=True)
        self.thread.start()

    def add(self, job: Job) -> Job:
        with self.changed:
            self.of[job.id] = job
            over = [j for j in self.of.values() if j.state not in ("waiting", "running")]
            for old in over[: max(0, len(over) - KEPT)]:
                self._forget(old)
            self.changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        job.stop.set()
        with self.changed:
            if job.state == "waiting":
                job.state = "cancelled"

    def remove(self, job: Job) -> None:
        """Cancels it, and the files that are made of it, and forgets what is there of them."""
        self.cancel(job)
        with self.changed:
            for other in [*self.of.values()]:
                if other is job or other.of is job:
                    other.stop.set()
                    self._forget(other)

    def _forget(self, job: Job) -> None:
        self.of.pop(job.id, None)
        if job.state != "running":
            shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            for job in self.of.values():
                job.stop.set()
            self.changed.notify_all()
        self.thread.join(10)

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.closed and (job := self._next()) is None:
                    self.changed.wait()
                if self.closed:
                    return
                assert job is not None
                job.began, job.state = time.monotonic(), "running"
            state, error = "done", ""
            try:
                (self._predict if job.of is None else self._render)(job)
            except Cancelled:
                state = "cancelled"
            except (InputError, OSError) as problem:
                state, error = "failed", self._told(describe(problem), job)
            except Exception as problem:  # the server goes on, and the page says what it was
                state, error = "failed", f"{type(problem).__name__}: {problem}"
            with self.changed:
                if state != "done" or job.id not in self.of:
                    shutil.rmtree(self.folder / job.id, ignore_errors=True)
                job.seconds = time.monotonic() - job.began
                job.error, job.latest = error, None
                job.state = state  # last: who sees that it is over sees all of its end

    def _next(self) -> Job | None:
        return next((job for job in self.of.values() if job.state == "waiting"), None)

    def _told(self, message: str, job: Job) -> str:
        """The command's own sentence, with the names that the user knows."""
        return message.replace(str(job.clip.path), job.clip.name).replace(
            f"{self.folder / job.id}/", ""
        )

    def _predict(self, job: Job) -> None:
        from ..media.reading import ahead, open_source
        from ..media.writing import encode_png

        source = open_source(job.clip.path)
        job.total = source.frames
        folder = self.folder / job.id
        (folder / "masks").mkdir(parents=True)
        predictor = self._predictor(job)
        job.runs_on = predictor.describe()
        job.began = time.monotonic()
        with (
            contextlib.closing(ahead(predictor.stream(source))) as results,
            self._preview(job, source, folder) as show,
        ):
            for result in results:
                self._go_on(job)
                mask = _levels(result.saliency)
                (folder / "masks" / f"{result.index:06d}.png").write_bytes(encode_png(mask))
                show(result.source, result.saliency)
        job.total = job.done

    def _predictor(self, job: Job) -> Any:
        from ..prediction import load_predictor

        asked = (job.model, job.crf)
        if self.loaded[0] != asked:
            self.loaded = (None, None)  # one in memory at a time
            predictor = load_predictor(job.model, self.device, precision="auto", crf=job.crf)
            self.loaded = (asked, predictor)
        self._go_on(job, step=0)
        return self.loaded[1]

    def _go_on(self, job: Job, step: int = 1) -> None:
        if job.stop.is_set():
            raise Cancelled
        if job.done >= MAX_FRAMES:
            raise InputError(f"{job.clip.name}: more than {MAX_FRAMES} frames")
        job.done += step

    @contextlib.contextmanager
    def _preview(self, job: Job, source: Any, folder: Path) -> Iterator[Any]:
        """Gives `show(frame, saliency)`; the file is there when the block ends well."""
        import numpy as np

        from ..media.views import VIEWS as MAKE
        from ..media.writing import open_writer

        make = MAKE[job.view]
        path = folder / ("preview.png" if job.clip.picture else "preview.mp4")
        with open_writer(path, source) as writer:

            def show(frame: Any, saliency: Any) -> None:
                small, of = _small(frame.picture), _small(saliency)
                shown = _flat(make(small, of, (255, 255, 255)))
                job.latest = np.vstack([small, shown])
                writer.write(job.latest, frame)

            yield show
            writer.close()
        job.file = path

    def _render(self, job: Job) -> None:
        """The clip again, with the masks of a prediction, in a view and a format."""
        from ..media.reading import open_source
        from ..media.views import VIEWS as MAKE
        from ..media.views import check_view
        from ..media.writing import open_writer

        assert job.of is not None
        masks = self.folder / job.of.id / "masks"
        source = open_source(job.clip.path)
        job.total = job.of.total
        folder = self.folder / job.id
        folder.mkdir()
        if job.format == "preview":
            with self._preview(job, source, folder) as show:
                for frame in source:
                    self._go_on(job)
                    show(frame, _read(masks, frame.index))
            return
        zipped = job.format == "png" and not job.clip.picture
        output = folder / ("frames" if zipped else f"made.{job.format}")
        make = MAKE[check_view(job.view, output)]
        with open_writer(output, source) as writer:
            for frame in source:
                self._go_on(job)
                saliency = _read(masks, frame.index)
                writer.write(make(frame.picture, saliency, (255, 255, 255)), frame)
            writer.close()
        job.notes = [self._told(note, job) for note in writer.notes]
        job.file = output
        if zipped:
            job.file = folder / "made.zip"
            with zipfile.ZipFile(job.file, "w") as archive:  # PNG is packed already
                for picture in sorted(output.iterdir()):
                    archive.write(picture, picture.name)
            shutil.rmtree(output)


def _levels(saliency: Any) -> Any:
    import numpy as np

    return np.rint(saliency * 255).astype(np.uint8)


def _read(masks: Path, index: int) -> Any:
    import cv2
    import numpy as np

    path = masks / f"{index:06d}.png"
    levels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if levels is None:
        raise InputError(f"{path.name}: the mask of this frame is gone")
    return levels.astype(np.float32) / 255


def _small(picture: Any) -> Any:
    """Of even sides, as H.264 needs them, and none above PREVIEW_SIDE."""
    import cv2

    height, width = picture.shape[:2]
    factor = min(1.0, PREVIEW_SIDE / max(height, width))
    size = [max(2, round(side * factor) // 2 * 2) for side in (width, height)]
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _flat(picture: Any) -> Any:
    """(H, W, 3): grey as RGB, alpha over a chequerboard."""
    import cv2
    import numpy as np

    if picture.ndim == 2:
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    if picture.shape[2] == 3:
        return picture
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] // 8
    board = np.where(((x + y) % 2)[..., None], 160, 220).astype(np.uint8).repeat(3, 2)
    alpha = picture[..., 3].astype(np.float32) / 255
    return cv2.blendLinear(np.ascontiguousarray(picture[..., :3]), board, alpha, 1 - alpha)


def jpeg(picture: Any) -> bytes:
    """Of (H, W, 3) uint8 RGB."""
    import cv2

    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
