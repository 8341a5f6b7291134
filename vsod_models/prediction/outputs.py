"""Predictions from file to file: a video, a folder of frames, or the sequences of a dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..data import maps
from ..data.records import Record, Records
from ..errors import InputError
from ..files import inside, locked
from ..media.live import Live
from ..media.reading import Frame, PathLike, Source, ahead
from ..media.views import VIEWS, check_view, overlay_on
from ..media.window import Window
from ..media.writing import Png, Video, Writer, open_writer
from ..workers import ctrl_c_later
from .predictor import VideoPredictor


@dataclass(frozen=True)
class Written:
    """What `predict_file` left at its output."""

    frames: int
    stopped: bool  # by Ctrl-C, or with the window: the frames before it are there, playable
    notes: tuple[str, ...] = ()  # what the user should know of the file
    pace: str = ""  # of a live source: frames/s and latency


def predict_file(
    predictor: VideoPredictor,
    source: Source,
    output: PathLike | None,
    *,
    view: str | None = None,
    background: Sequence[int] = (255, 255, 255),
    overwrite: bool = False,
    only: range | None = None,
    progress: Callable[[int], None] = lambda frames: None,
    window: Window | None = None,
) -> Written:
    """Predict every frame of `source` and write the views of them to `output`.

    output: as `open_writer` takes it; None: nowhere, which leaves the window.
    view: a key of VIEWS; None: `default_view`.  background: RGB, of the cutout.
    only: numbers of the frames that are written, without a step; None: all.
    progress: called with the number of frames written, after each.
    window: shows them, too.

    Ctrl-C, or closing the window, ends the output with the frames that are done
    (KeyboardInterrupt if there are none); any other failure leaves nothing there.
    """
    view = check_view(view, output)
    done, stopped = 0, False
    opened: contextlib.AbstractContextManager[Writer | None] = contextlib.nullcontext()
    if output is not None:
        opened = open_writer(output, source, overwrite=overwrite)
    idle = None if window is None else window.update
    with (
        opened as writer,
        # The network runs beside the drawing and the encoding.
        contextlib.closing(
            ahead(predictor.stream(source), depth=1, stop=source.close, idle=idle)
            if isinstance(source, Live)
            else ahead(predictor.stream(source), idle=idle)
        ) as results,
    ):
        try:
            for result in results:
                if only is not None and result.index < only.start:
                    continue
                if only is not None and result.index >= only.stop:
                    break
                planes = None
                if view == "overlay" and window is None and isinstance(writer, Video):
                    planes = writer.planes(result.source)
                if planes is not None:
                    overlay_on(planes, result.saliency)
                else:
                    picture = VIEWS[view](result.frame, result.saliency, background)
                with ctrl_c_later():  # no frame is half-encoded
                    if planes is not None and isinstance(writer, Video):
                        writer.write_planes(planes, result.source)
                    elif writer is not None:
                        writer.write(picture, result.source)
                    done += 1
                if window is not None:
                    window.show(picture)
                if isinstance(source, Live):
                    source.written(result.source)
                progress(done)
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = True
        try:
            with ctrl_c_later():
                if writer is not None:
                    writer.close(stopped=stopped)
        except KeyboardInterrupt:
            pass  # all was written: there is nothing to stop
    notes = () if writer is None else tuple(writer.notes)
    if not isinstance(source, Live):
        return Written(done, stopped, notes)
    return Written(done, stopped, (*notes, *source.summary()), source.pace())


class Recorded:
    """The frames of one sequence of a dataset, as a source."""

    sound: Path | None = None
    pixel_aspect = Fraction(1)
    rate = Fraction(25)
    time_base = 1 / Fraction(25)

    def __init__(self, records: Sequence[Record]):
        self.records, self.name = list(records), records[0].sequence
        self.files = [record.image for record in records if isinstance(record.image, Path)]
        self.frames: int | None = len(records)

    def __iter__(self) -> Iterator[Frame]:
        for index, record in enumerate(self.records):
            picture, prior = record.read_image(), record.read_prior()
            yield Frame(picture, index, record.name, index, self.time_base, 1, prior)


def predict_dataset(
    predictor: VideoPredictor,
    records: Records,
    output: PathLike,
    *,
    view: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda frames: None,
) -> int:
    """Every sequence of a dataset into `<output>/<sequence>/<frame>.png`, for `vsod eval`.

    Motion priors of the records are used in place of the predictor's, see
    :func:`vsod_models.prior.cache.make_priors`.

    Sequences that are complete already are kept, unless `overwrite`; so a run that was stopped goes
    on.  Returns the number of frames written.

    Raises InputError where that would be a folder of the dataset's own pictures or masks, or where
    another model, other options or nobody known made the maps that are there.
    """
    own = {
        file.parent.resolve()
        for record in records
        for file in (record.image, record.mask)
        if isinstance(file, Path)
    }
    for sequence in records.sequences:
        if (Path(output) / sequence).resolve() in own:
            raise InputError(f"{output}: {sequence} in it is a folder of the dataset itself")
    with locked(output, "a prediction"):
        return _predict_dataset(predictor, records, Path(output), view, overwrite, progress)


def _predict_dataset(
    predictor: VideoPredictor,
    records: Records,
    output: Path,
    view: str | None,
    overwrite: bool,
    progress: Callable[[int], None],
) -> int:
    made_by = predictor.record() | {"view": view or "mask"}
    kept = set()
    if not overwrite:  # what does not fit is known before the work, not after it
        for sequence, frames in records.sequences.items():
            if maps.are_made_by(made_by, inside(output, sequence), [r.name for r in frames]):
                kept.add(sequence)
    done = written = 0
    for sequence, frames in records.sequences.items():
        folder = inside(output, sequence)
        source = Recorded(frames)
        if sequence not in kept:
            left_over = maps.left_over(folder, [r.name for r in frames])
            with open_writer(folder, source, overwrite=overwrite) as writer:
                for result in predictor.stream(source):
                    picture = VIEWS[view or "mask"](result.frame, result.saliency, (255, 255, 255))
                    writer.write(picture, result.source)
                    written += 1
                    progress(done + written)
                writer.close()
                assert isinstance(writer, Png)
                maps.write_record(writer.path, made_by, [r.name for r in frames])
            for path in left_over:
                path.unlink(missing_ok=True)
        else:
            done += len(frames)
    return written
