"""Files that `vsod export` writes, or others of their kind, as models.

`METADATA` names what a file says of itself, as strings in its metadata: a file that has them needs
no options.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .contract import SaliencyModel
from .foreign import read_numbers

METADATA = {
    "image_size": "height,width that the network was trained at",
    "side_multiple": "sides of frames that keep their aspect ratio are multiples of this",
    "mean": "r,g,b that are taken from frames in [0, 1]",
    "std": "r,g,b that they are divided by after that",
    "clip_length": "frames of a window; 1: frames come one by one, (N, 3, H, W)",
    "outputs": "all or last: which frames of a window get a mask",
    "values": "logits or probabilities: what the network gives",
    "needs_prior": "true or false: a motion prior is the second input",
    "needs_motion": "true or false: the motion of each frame is the second input",
    "class": "of the model that was exported",
    "version": "of what these words mean: 1",
    "terms": "what the weights may be used for",
}


def metadata_of(model: SaliencyModel, **others: str) -> dict[str, str]:
    """What an ONNX file of this model says of itself; `others` in place of, or beside, the same."""
    known = {
        "image_size": ",".join(map(str, model.image_size)),
        "mean": "0,0,0",  # our models normalise by themselves
        "std": "1,1,1",
        "clip_length": str(model.clip_length),
        "outputs": model.outputs,
        "values": "logits",
        "needs_prior": str(bool(model.needs_prior)).lower(),
        "needs_motion": str(bool(model.needs_motion)).lower(),
        "class": type(model).__name__,
        "version": "1",
    }
    if model.side_multiple is not None:
        known["side_multiple"] = str(model.side_multiple)
    if model.terms:
        known["terms"] = str(model.terms)
    return {**known, **others}


class ExportedModel(SaliencyModel):
    """A network in a file: windows (B, T, 3, H, W), or frames (N, 3, H, W) for `clip_length` 1.

    Its first input is the frames, the second what it needs beside them; it gives one channel for
    each frame or for the last one.

    Args:
        source: the file with its scheme, for errors.
        file: it alone.
        said: values of METADATA.
        inputs: the shape of each input; a free size is the name of its axis.

    Raises:
        InputError: a value cannot be.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, source: str, file: Path, said: Mapping[str, str], inputs: Mapping[str, Sequence[Any]]
    ):
        super().__init__()
        self.source = source
        self._read(said, inputs)
        # In the state, so that a record of what made a mask tells files apart.
        digest = np.frombuffer(hashlib.sha256(file.read_bytes()).digest(), np.uint8)
        self.register_buffer("digest", torch.from_numpy(digest.copy()))

    @abstractmethod
    def _run(self, inputs: list[Tensor]) -> Tensor:
        """The network itself, on the CPU, in float32."""

    def _read(self, said: Mapping[str, str], inputs: Mapping[str, Sequence[Any]]) -> None:
        if said.get("version", "1") != "1":
            raise InputError(
                f"model {self.source}: an exported file of version {said['version']}; this vsod "
                "reads version 1, so export it again"
            )
        shape = list(next(iter(inputs.values())))
        windows = len(shape) == 5
        fixed = [shape[-2], shape[-1]]
        if all(isinstance(n, int) for n in fixed):
            said = {"image_size": ",".join(map(str, fixed)), **said}
        if "image_size" not in said:
            raise InputError(
                f"model {self.source}: the file does not say at which size it was trained; give "
                "the option image_size=HEIGHT,WIDTH"
            )
        size = read_numbers(self.source, said, "image_size", 2, int)
        self.image_size = (size[0], size[1])
        if min(self.image_size) < 1:
            raise InputError(f"model {self.source}: image_size is {said['image_size']}")
        if all(isinstance(n, int) for n in fixed) and list(self.image_size) != fixed:
            raise InputError(
                f"model {self.source}: takes {fixed[0]},{fixed[1]} only, and image_size is "
                f"{said['image_size']}"
            )
        self.side_multiple = None
        if "side_multiple" in said and not all(isinstance(n, int) for n in fixed):
            self.side_multiple = max(1, read_numbers(self.source, said, "side_multiple", 1, int)[0])
        # A file with windows of a fixed length has no others: shorter videos repeat a frame.
        self.length = shape[1] if windows and isinstance(shape[1], int) else None
        length = read_numbers(self.source, said, "clip_length", 1, int, str(self.length or 1))[0]
        self.clip_length = max(1, length)
        if len(shape) not in (4, 5) or (self.clip_length > 1 and not windows):
            raise InputError(
                f"model {self.source}: takes {shape}; frames (N, 3, H, W), or windows "
                "(B, T, 3, H, W), are needed"
            )
        self.windows = windows
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.outputs = self._one_of(said, "outputs", "all", "last")
        self.values = self._one_of(said, "values", "logits", "probabilities")
        self.needs_prior = self._one_of(said, "needs_prior", "false", "true") == "true"
        self.needs_motion = self._one_of(said, "needs_motion", "false", "true") == "true"
        if len(inputs) != 1 + self.needs_prior + self.needs_motion:
            names = ", ".join(inputs)
            raise InputError(f"model {self.source}: has the inputs {names}; frames alone are given")
        self.terms = said.get("terms", "")
        mean = read_numbers(self.source, said, "mean", 3, float, "0,0,0")
        std = read_numbers(self.source, said, "std", 3, float, "1,1,1")
        if 0 in std:
            raise InputError(f"model {self.source}: std is {said['std']}, and 0 divides nothing")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def _one_of(self, said: Mapping[str, str], key: str, *allowed: str) -> Any:
        if said.get(key, allowed[0]) not in allowed:
            raise InputError(
                f"model {self.source}: {key} is {said[key]!r}; it has to be {' or '.join(allowed)}"
            )
        return said.get(key, allowed[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModel:
        return self  # what runs it cannot be copied, and nothing changes it

    def encode(self, frames: Tensor, prior: Tensor | None = None) -> list[Tensor]:
        """The frames themselves: the file has no part that sees frames alone."""
        normal = (frames.float() - self.mean) / self.std
        return [normal] if prior is None else [normal, prior.float()]

    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        count, length = maps[0].shape[:2]
        last = self.outputs == "last"
        lacking = 0 if self.length is None else max(0, self.length - length)
        whole = [torch.cat([m, *[m[:, -1:]] * lacking], 1) for m in maps]
        given = [m if self.windows else m.flatten(0, 1) for m in whole]
        out = self._run([m.cpu() for m in given])
        wanted = count if last else count * (length + lacking)
        if out.ndim < 3 or out.numel() != wanted * out.shape[-2] * out.shape[-1]:
            raise InputError(
                f"model {self.source}: gives {tuple(out.shape)} for {tuple(given[0].shape)}; "
                "one map a frame is needed"
            )
        logits = out.float().reshape(wanted, 1, *out.shape[-2:])
        if self.values == "probabilities":
            logits = logits.clamp(0, 1).logit(1e-6)
        if logits.shape[-2:] != tuple(size):
            logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
        logits = logits.to(maps[0].device)
        return logits if last else logits.unflatten(0, (count, -1))[:, :length]
