"""Saliency of videos of any length, frame by frame."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import vsod_ops
from vsod_ops import backends
from vsod_ops.dense_crf import PRESETS

from .. import zoo
from ..errors import InputError, one_line
from ..limits import MOST_PIXELS
from ..media.live import Live
from ..media.reading import Frame, PathLike, Source, ahead, open_source
from ..networks.contract import SaliencyModel
from ..networks.inference import bfloat16_pays, for_inference, with_fused_activations
from ..networks.sam2 import FRAMES, Sam2Refiner
from ..prior.motion import motion


@dataclass(frozen=True)
class Result:
    """One frame and its saliency."""

    source: Frame
    saliency: np.ndarray  # (H, W) float32 in [0, 1], of the frame's own size

    @property
    def frame(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return self.source.picture

    @property
    def index(self) -> int:
        return self.source.index

    @property
    def time(self) -> float:
        """Seconds from the start."""
        return self.source.time


class _Input(NamedTuple):
    """A frame as the model takes it."""

    frame: Frame
    small: Tensor  # (3, h, w) uint8
    beside: Tensor | None  # its motion prior (1, h, w), or its motion (4, h / 4, w / 4)


@dataclass
class _Held:
    """A frame that windows still need: its maps, and what the windows so far say of it."""

    frame: Frame
    maps: list[Tensor]  # each (C, h, w)
    total: Tensor | None = None  # (h, w), weighted sum of the probabilities
    weight: float = 0.0


class VideoPredictor:
    """Runs a model over videos of any length; each frame goes through its backbone once.

    A model that masks every frame of a window (MSSA) sees windows of `clip_length` frames that
    share `overlap` frames; where windows overlap their probabilities are averaged, the frames in
    the middle of a window weighing more than those at its ends.  The last window reaches back so
    that it is whole.  A model that masks the last frame of a window (MSST) sees each frame with
    the clip_length - 1 frames before it; the first frame stands in for those before the start.

    Args:
        model: see :class:`vsod_models.networks.contract.SaliencyModel`.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        size: (height, width) that frames are resized to for the model; None: its `image_size`,
            or as many pixels in the frames' own aspect ratio if it has a `side_multiple`; frames
            of another size are then a clip of their own.
        overlap: frames that neighbouring windows share; None: 2, none of windows of 4
            or less, whose masks it does not change enough to pay for.
        batch: windows that go through the model at once; None: 1 on the CPU, 4 elsewhere.
        precision: "float32", or "bfloat16" or "float16" for autocast; "auto": bfloat16 on a CPU
            that multiplies in it and for a model of this package, else float32.
        crf: refine each mask with :func:`vsod_ops.dense_crf` at the frame's size, with the numbers
            of this preset, "dss" or "deeplab".
        prior: `prior(frame, neighbour) -> (H, W)` in [0, 1], for a model that needs a motion
            prior, and frames that bring none; the neighbour is the next frame, and for the last
            one the frame before it.
        name: of the model, for `describe`.
        refine: tracks the surest of these masks, :mod:`vsod_models.networks.sam2`.
        causal: a frame is masked as soon as it comes, as the last one of a window; a motion prior
            is that of the flow to the frame before.

    Raises InputError for an argument that is not valid.
    """

    def __init__(
        self,
        model: SaliencyModel,
        device: str | torch.device = "auto",
        size: tuple[int, int] | None = None,
        *,
        overlap: int | None = None,
        batch: int | None = None,
        precision: str = "float32",
        crf: str | None = None,
        prior: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        name: str | None = None,
        refine: Sam2Refiner | None = None,
        causal: bool = False,
    ):
        self.device = choose_device(device)
        self.name = name or type(model).__name__
        self.source = model.source
        self.length = int(model.clip_length)
        self.multiple = model.side_multiple if size is None else None
        height, width = size or model.image_size
        self.size = (int(height), int(width))
        if min(self.size) < 1 or self.size[0] * self.size[1] > MOST_PIXELS:
            raise InputError(
                f"size must be at least 1x1 and at most {MOST_PIXELS} pixels, got {width}x{height}"
            )
        if overlap is None:
            overlap = 2 if self.length > 4 else 0
        if not 0 <= overlap < self.length:
            raise InputError(
                f"overlap must be 0 to {self.length - 1} for windows of {self.length} frames, "
                f"got {overlap}"
            )
        if causal and refine is not None:
            raise InputError("refine sees frames that are to come; it cannot be causal")
        self.refine = refine
        self.causal = causal
        self.last = causal or model.outputs == "last"  # a window gives the mask of its last frame
        self.stride = 1 if self.last else self.length - overlap
        if batch is None:
            batch = 1 if causal or self.device.type == "cpu" else 4
        self.batch = batch
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        if precision == "auto":
            pays = self.device.type == "cpu" and not self.source and bfloat16_pays()
            precision = "bfloat16" if pays else "float32"
        dtypes = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }
        if precision not in dtypes:
            raise InputError(f"precision must be one of auto, {', '.join(dtypes)}, got {precision}")
        self.dtype = dtypes[precision]
        if model.needs_prior and prior is None:
            raise InputError(f"model {self.name} needs a motion prior: pass prior=")
        if crf is not None and crf not in PRESETS:
            raise InputError(f"crf must be one of {', '.join(PRESETS)}, got {crf}")
        self.crf, self.prior = crf, prior
        self.needs_motion = model.needs_motion
        self.prior_name = ""  # where it has one, for `describe`
        with self._foreign_errors():
            made = for_inference(model, self.dtype, fold=not self.source)
            if self.device.type == "cpu" and not self.source:
                with_fused_activations(made, self.dtype)
            self.model = made.to(self.device)

    def describe(self) -> str:
        """One line: device, model, and which backend runs each of our operators."""
        device = f"cpu ({torch.get_num_threads()} threads)"
        if self.device.type == "cuda":
            device = f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        chosen: dict[str, set[str]] = {}
        for module in self.model.modules():
            if isinstance(module, vsod_ops.ShuntedAttention):
                op = "shunted_attention"
            elif isinstance(module, vsod_ops.ConvLSTM):
                op = "conv_lstm"
            else:
                continue
            taken = module.chosen_backends(self.device.type, self.dtype)
            chosen[op] = chosen.get(op, set()) | taken
        if self.crf is not None:
            chosen["dense_crf"] = {
                backends.choose("dense_crf", None, self.device.type, torch.float32)
            }
        terms = self.model.terms
        model = f"model {self.name}" + (f" (weights for {terms})" if terms else "")
        lines = [f"device {device}", model, str(self.dtype).removeprefix("torch.")]
        for op, names in chosen.items():
            lines.append(f"{op} on backend {' and '.join(sorted(names))}")
        if self.refine is not None:
            lines.append(f"refined by {self.refine.name}")
        if self.prior_name:
            lines.append(f"prior {self.prior_name}")
        return ", ".join(lines)

    def record(self) -> dict[str, Any]:
        """What its masks depend on: the model's hash, and the options."""
        arguments = dict(getattr(self.model, "_hub_mixin_config", None) or {})
        arguments.pop("backend", None)  # computes the same
        about = [type(self.model).__name__, arguments]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        prior = getattr(self.prior, "args", (None,))[0] if self.model.needs_prior else None
        return {
            "model": self.name,
            "hash": digest.hexdigest()[:16],
            "size": list(self.size),
            "window": [self.length, self.stride],
            "precision": str(self.dtype).removeprefix("torch."),
            "crf": self.crf,
            "prior": prior.key() if prior is not None and hasattr(prior, "key") else None,
            **({"causal": True} if self.causal else {}),
            **({} if self.refine is None else {"refine": self.refine.name}),
        }

    def stream(
        self,
        source: PathLike | Source | Iterable[np.ndarray],
        rate: Fraction | float = 25,
    ) -> Generator[Result]:
        """A result for each frame, in order, a few frames behind the reading.

        source: a video, a picture, a folder or a glob of pictures, or (H, W, 3) uint8 RGB arrays.
        rate: frames per second of what is not a video.
        """
        if isinstance(source, (str, os.PathLike)):
            source = open_source(source, rate)
        frames = _as_frames(source, rate)
        if not isinstance(source, Live):  # what waits there is not what is happening now
            frames = ahead(frames)
        with contextlib.closing(frames):
            for clip in self._clips(frames):
                chunks = self._encoded(clip)
                if self.side_by_side(source):
                    chunks = ahead(chunks, depth=2)
                with contextlib.closing(chunks):
                    held = self._last(chunks) if self.last else self._all(chunks)
                    results = (Result(one.frame, self._saliency(one)) for one in held)
                    yield from results if self.refine is None else self._refined(results)

    def reach(self) -> tuple[int, int]:
        """(unit, before): what makes the masks of a part of a video those of the whole, to the bit.

        A run over the frames from number n on, a multiple of `unit` (or 0), gives those of the
        frames from n + before on: windows and batches are the same ones there.
        """
        unit = self.batch * self.stride
        return unit, self.length + unit

    def side_by_side(self, source: object) -> bool:
        """Whether `stream` runs the model's two halves, each in a thread of its own.

        Not for what is live, which is not read ahead, nor for code of somebody else, which may not
        bear it.
        """
        return not isinstance(source, Live) and not self.source

    def _refined(self, results: Iterator[Result]) -> Iterator[Result]:
        assert self.refine is not None
        for _, same in groupby(results, lambda result: result.frame.shape):
            while part := list(islice(same, FRAMES)):
                made = self.refine([r.frame for r in part], [r.saliency for r in part])
                for result, saliency in zip(part, made, strict=True):
                    yield replace(result, saliency=saliency)

    def predict_clip(self, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Frames (H, W, 3) uint8 RGB -> the saliency (H, W) float32 in [0, 1] of each."""
        return [result.saliency for result in self.stream(frames)]

    def _clips(self, frames: Iterable[Frame]) -> Iterator[Iterable[Frame]]:
        """The frames, cut where the size changes that the model sees; `self.size` follows."""
        if self.multiple is None:
            yield frames
            return
        pixels = self.size[0] * self.size[1]
        for shape, clip in groupby(frames, lambda frame: frame.picture.shape[:2]):
            self.size = fitted(shape, pixels, self.multiple)
            yield clip

    def _encoded(self, frames: Iterable[Frame]) -> Generator[list[_Held]]:
        """The frames with their maps, in chunks of the frames that are new in `batch` windows."""
        chunk: list[_Input] = []
        for made in self._inputs(frames):
            chunk.append(made)
            if len(chunk) == self.batch * self.stride:
                yield self._encode(chunk)
                chunk = []
        if chunk:
            yield self._encode(chunk)

    def _inputs(self, frames: Iterable[Frame]) -> Iterator[_Input]:
        small = ((f, resized(as_planes(f.picture), self.size)) for f in frames)
        if not (self.model.needs_prior or self.needs_motion):
            yield from (_Input(*one, None) for one in small)
            return
        before = this = None
        if self.causal:
            for this in small:
                yield _Input(*this, self._beside(this, before or this))
                before = this
            return
        for following in small:
            if this is not None:
                yield _Input(*this, self._beside(this, following))
            before, this = this, following
        if this is not None:
            yield _Input(*this, self._beside(this, before or this))

    def _beside(self, this: tuple[Frame, Tensor], other: tuple[Frame, Tensor]) -> Tensor:
        """What the model takes beside a frame, from this frame and its neighbour."""
        if self.needs_motion:
            pictures = [small.movedim(0, -1).contiguous().numpy() for _, small in (this, other)]
            return torch.from_numpy(motion(*pictures))
        frame, neighbour = this[0], other[0]
        prior = frame.prior
        if prior is None:
            assert self.prior is not None
            try:
                prior = self.prior(frame.picture, neighbour.picture)
            except InputError as error:
                raise InputError(f"frames {frame.name} and {neighbour.name}: {error}") from None
        return resized(torch.from_numpy(prior)[None].float(), self.size)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        try:
            with torch.inference_mode(), autocast, self._foreign_errors():
                yield
        except torch.OutOfMemoryError:
            raise InputError(
                f"{self.device} ran out of memory: take a smaller batch (now {self.batch}) or "
                f"size (now {self.size[1]}x{self.size[0]})"
            ) from None

    @contextlib.contextmanager
    def _foreign_errors(self) -> Iterator[None]:
        """What code of somebody else raises is about their model, and no fault of ours."""
        try:
            yield
        except (InputError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            if not self.source or "memory" in str(error):
                raise
            kind = type(error).__name__
            raise InputError(f"model {self.source}: {kind}: {one_line(error)}") from error

    def _encode(self, chunk: Sequence[_Input]) -> list[_Held]:
        with self._running():
            inputs = [torch.stack([one.small for one in chunk])[None].to(self.device).float() / 255]
            beside = [one.beside for one in chunk if one.beside is not None]
            if beside:
                inputs.append(torch.stack(beside)[None].to(self.device))
            maps = self.model.encode(*inputs)
            return [_Held(one.frame, [m[0, t] for m in maps]) for t, one in enumerate(chunk)]

    def _decode(self, windows: Sequence[Sequence[_Held]]) -> Tensor:
        """Windows of equal length -> probabilities (B, T, h, w), or (B, h, w) for "last"."""
        with self._running():
            levels = range(len(windows[0][0].maps))
            maps = [
                torch.stack([_stacked([one.maps[k] for one in window]) for window in windows])
                for k in levels
            ]
            logits = self.model.decode(maps, self.size)
            if self.source:
                self._check_logits(logits, windows)
            return logits.float().sigmoid().squeeze(-3)

    def _check_logits(self, logits: Any, windows: Sequence[Sequence[_Held]]) -> None:
        wanted = [len(windows)] if self.model.outputs == "last" else [len(windows), len(windows[0])]
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or list(logits.shape[:-2]) != [*wanted, 1]:
            shape = ", ".join(map(str, [*wanted, 1]))
            raise InputError(f"model {self.source}: decode gives {got}; ({shape}, H, W) is needed")

    def _all(self, chunks: Iterable[list[_Held]]) -> Iterator[_Held]:
        held: deque[_Held] = deque()
        first = 0  # index of held[0]
        count = 0  # frames so far
        start = 0  # of the next window; frames before it are final

        def window(at: int, length: int) -> list[_Held]:
            return [held[at - first + t] for t in range(length)]

        for chunk in chunks:
            held.extend(chunk)
            count += len(chunk)
            starts = range(start, count - self.length + 1, self.stride)
            if not starts:
                continue
            self._add([window(at, self.length) for at in starts])
            final, start = start, starts[-1] + self.stride
            yield from window(final, start - final)
            while first < count - self.length and first < start:
                held.popleft()
                first += 1
        if count > start:
            if held[-1].total is None:  # the last frames are in no window yet
                length = min(self.length, count)
                self._add([window(count - length, length)])
            yield from window(start, count - start)

    def _add(self, windows: Sequence[Sequence[_Held]]) -> None:
        length = len(windows[0])
        for window, probabilities in zip(windows, self._decode(windows), strict=True):
            for t, (one, probability) in enumerate(zip(window, probabilities, strict=True)):
                weight = min(t + 1, length - t)
                one.total = weight * probability + (0 if one.total is None else one.total)
                one.weight += weight

    def _last(self, chunks: Iterable[list[_Held]]) -> Iterator[_Held]:
        before: list[_Held] = []
        for chunk in chunks:
            row = (before or [chunk[0]] * (self.length - 1)) + chunk
            windows = [row[t : t + self.length] for t in range(len(chunk))]
            probabilities = self._decode(windows)
            if self.model.outputs == "all":
                probabilities = probabilities[:, -1]
            for one, probability in zip(chunk, probabilities, strict=True):
                one.total, one.weight = probability, 1.0
            yield from chunk
            before = row[len(row) - self.length + 1 :]

    def _saliency(self, one: _Held) -> np.ndarray:
        assert one.total is not None
        small = (one.total / one.weight).cpu().numpy()
        if not np.isfinite(small).all():
            raise InputError(
                f"model {self.name} gives NaN for frame {one.frame.name}: its weights do not fit "
                f"{str(self.dtype).removeprefix('torch.')}, or are damaged"
            )
        height, width = one.frame.picture.shape[:2]
        saliency = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).clip(0, 1)
        if self.crf is not None:
            picture = as_planes(one.frame.picture)[None].to(self.device)
            probability = torch.from_numpy(saliency)[None].to(self.device)
            refined = vsod_ops.dense_crf(probability, picture, preset=self.crf)
            saliency = refined[0].cpu().numpy()
        return saliency


def _stacked(maps: Sequence[Tensor]) -> Tensor:
    """(C, h, w) of each frame -> (T, C, h, w) in the layout they have, channels last or not."""
    if maps[0].stride(0) == 1:
        return torch.stack([m.movedim(0, -1) for m in maps]).movedim(-1, 1)
    return torch.stack(list(maps))


def as_planes(picture: np.ndarray) -> Tensor:
    """(H, W, C) -> (C, H, W)."""
    return torch.from_numpy(picture).movedim(-1, 0)


def load_predictor(
    model: str,
    device: str = "auto",
    size: tuple[int, int] | None = None,
    *,
    prior: str | None = None,
    options: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    refine: str | None = None,
    **others: Any,
) -> VideoPredictor:
    """A model by its name, with the motion prior that it needs.

    Args:
        model, options, trust_remote_code: see :func:`vsod_models.zoo.load_model`.
        prior: see :func:`vsod_models.prior.load.load_prior`; None: the one it was trained with.
        refine: "sam2:owner/name" or "sam2:FOLDER".
        device, size, others: see `VideoPredictor`.

    Raises:
        InputError: an argument is not valid, or a file is damaged.
    """
    loaded = zoo.load_model(model, options=options, trust_remote_code=trust_remote_code)
    if prior is not None and not loaded.needs_prior:
        raise InputError(f"prior {prior}: model {model} takes no motion prior")
    make_prior = None
    if loaded.needs_prior:
        from ..prior.flow import frame_prior
        from ..prior.load import load_prior, prior_of

        prior = prior or prior_of(model)
        make_prior = functools.partial(frame_prior, load_prior(prior).to(choose_device(device)))
    name = Path(model).name if Path(model).exists() else model
    refiner = None
    if refine is not None:
        if not refine.startswith("sam2:"):
            raise InputError(f"refine {refine}: sam2:owner/name is needed")
        refiner = Sam2Refiner(refine.removeprefix("sam2:"), choose_device(device))
    predictor = VideoPredictor(
        loaded, device, size, prior=make_prior, name=name, refine=refiner, **others
    )
    predictor.prior_name = prior or ""
    return predictor


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) -> (C, h, w), bilinear with antialiasing, uint8 or floating point."""
    return F.interpolate(planes[None], size, mode="bilinear", antialias=True)[0]


def fitted(shape: Sequence[int], pixels: int, multiple: int) -> tuple[int, int]:
    """(height, width) of about `pixels`, multiples of `multiple`, nearest to the aspect ratio.

    shape: (height, width) of a frame; one that is longer than 8:1 is treated as 8:1.
    """
    aspect = min(max(shape[1] / shape[0], 1 / 8), 8.0)
    height = math.sqrt(pixels / aspect) / multiple
    choices = [
        (rows * multiple, columns * multiple)
        for rows in {max(1, math.floor(height)), math.ceil(height)}
        for columns in {max(1, math.floor(height * aspect)), math.ceil(height * aspect)}
    ]

    def distance(choice: tuple[int, int]) -> float:
        rows, columns = choice
        squeeze = abs(math.log(columns / rows / aspect))
        return 2 * squeeze + abs(math.log(rows * columns / pixels))

    return min(sorted(choices), key=distance)


def choose_device(name: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one; a device that is not there is an InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu or cuda, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {name}")
    if device.type == "cuda":
        if torch.version.cuda is None:
            raise InputError(f"device {name}: this torch ({torch.__version__}) is without CUDA")
        if not torch.cuda.is_available():
            raise InputError(f"device {name}: no CUDA device found")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name}: there are only {torch.cuda.device_count()}")
    return device


def _as_frames(source: Any, rate: Fraction | float) -> Generator[Frame]:
    step = 1 / Fraction(rate).limit_denominator(1001)
    for index, frame in enumerate(source):
        if isinstance(frame, Frame):
            yield frame
            continue
        if getattr(frame, "dtype", None) != np.uint8 or frame.shape[2:] != (3,) or not frame.size:
            got = f"{getattr(frame, 'dtype', type(frame).__name__)} {getattr(frame, 'shape', '')}"
            raise InputError(f"frame {index} must be (H, W, 3) uint8 RGB, got {got}")
        yield Frame(np.ascontiguousarray(frame), index, f"{index:05d}", index, step, 1)
