"""Segmentation models of the library `transformers`, one frame at a time.

Those that the library knows by itself give logits of classes; those whose repository brings its own
code (BiRefNet) give the logits of one map, or a list of which the last is the best.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, one_line
from .foreign import PerFrame, from_factory, read_numbers

OPTIONS = {
    "image_size": "height,width",
    "mean": "r,g,b that are taken from frames in [0, 1]",
    "std": "r,g,b that they are divided by after that",
    "labels": "names or numbers of the classes that count as salient",
}
REMOTE_CLASSES = ("AutoModelForImageSegmentation", "AutoModelForSemanticSegmentation", "AutoModel")
SIZE = "512,512"  # where neither the repository nor an option says
REMOTE_SIZE = "1024,1024"  # of BiRefNet and its relatives, which do not say


class Segmentation(nn.Module):
    """Frames -> logits (N, 1, h, w); salient: the classes that count, if there are several."""

    def __init__(self, model: nn.Module, salient: list[int] | None):
        super().__init__()
        self.model, self.salient = model, salient

    def forward(self, frames: Tensor) -> Any:
        made = self.model(frames)
        logits = getattr(made, "logits", made)
        if isinstance(logits, (list, tuple)) and logits:
            logits = logits[-1]
        if self.salient is None or not isinstance(logits, Tensor) or logits.shape[1] < 2:
            return logits
        chosen = torch.zeros(logits.shape[1], dtype=torch.bool)
        chosen[self.salient] = True
        salient, rest = logits[:, chosen].logsumexp(1), logits[:, ~chosen].logsumexp(1)
        return (salient - rest)[:, None]


def library_and_place(name: str, what: str) -> tuple[Any, str, str]:
    """The library, and the repository or folder, and the revision, that `name` stands for.

    Args:
        name: owner/name, owner/name@revision, or a folder.
        what: it is for, as errors begin.

    Raises:
        InputError: the library is missing, or `name` is none of these.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{what} needs {error.name}: pip install -e '.[models,transformers]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if Path(name).is_dir():
        return transformers, name, "main"
    place, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise InputError(f"{what}: owner/name or a folder is needed")
    return transformers, place, revision or "main"


def load_transformers(
    name: str, options: Mapping[str, str] | None = None, trust_remote_code: bool = False
) -> PerFrame:
    """A model of a repository (owner/name, owner/name@revision) or of a folder.

    Args:
        options: values of OPTIONS, in place of what the repository says.
        trust_remote_code: run the code of a repository that brings its own.

    Raises:
        InputError: the library is missing, the repository cannot be had, is of another kind, has
            no weights in safetensors, or has code that is not to be run.
    """
    source, said = f"transformers:{name}", dict(options or {})
    for key in said:
        if key not in OPTIONS:
            raise InputError(f"model {source}: {key} is not one of {', '.join(OPTIONS)}")
    transformers, place, revision = library_and_place(name, f"model {source}")
    try:
        config = transformers.PretrainedConfig.get_config_dict(place, revision=revision)[0]
        remote = config.get("model_type") not in transformers.CONFIG_MAPPING
        if remote and "auto_map" not in config:
            raise InputError(f"model {source}: {_kind(config)} is not known to transformers")
        if remote and not trust_remote_code:
            raise InputError(
                f"model {source}: is Python code in its repository, which would run with your "
                "rights: read it, and if you trust it give trust_remote_code=True"
            )
        model = _class(transformers, config, remote, source).from_pretrained(
            place, revision=revision, trust_remote_code=remote, use_safetensors=True
        )
        said = {**_processor(transformers, place, revision), **said}
    except InputError:
        raise
    except Exception as error:  # the library, the hub's client and remote code raise what they like
        raise InputError(f"model {source}: {type(error).__name__}: {one_line(error)}") from error
    salient = _salient(model.config, said.get("labels"), source)
    network = Segmentation(model, salient)
    size = read_numbers(source, said, "image_size", 2, int, REMOTE_SIZE if remote else SIZE)
    mean = read_numbers(source, said, "mean", 3, float, "0.485,0.456,0.406")
    std = read_numbers(source, said, "std", 3, float, "0.229,0.224,0.225")
    made = from_factory(lambda: PerFrame(network, source, size, mean=mean, std=std), source)
    assert isinstance(made, PerFrame)
    return made


def _kind(config: Mapping[str, Any]) -> str:
    return f"a model of type {config.get('model_type')}"


def _class(transformers: Any, config: Mapping[str, Any], remote: bool, source: str) -> Any:
    if remote:
        for name in REMOTE_CLASSES:
            if name in config["auto_map"]:
                return getattr(transformers, name)
        raise InputError(f"model {source}: its code names none of {', '.join(REMOTE_CLASSES)}")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    if config.get("model_type") not in known:
        raise InputError(
            f"model {source}: {_kind(config)} gives no maps of classes; one of {', '.join(known)} "
            "does"
        )
    return transformers.AutoModelForSemanticSegmentation


def _processor(transformers: Any, place: str, revision: str) -> dict[str, str]:
    """What preprocessor_config.json says, as options."""
    file = transformers.utils.cached_file(
        place, "preprocessor_config.json", revision=revision,
        _raise_exceptions_for_missing_entries=False,
    )  # fmt: skip
    if file is None:
        return {}
    config = json.loads(Path(file).read_text("utf-8"))
    said = {}
    for key in ("mean", "std"):
        if f"image_{key}" in config and config.get("do_normalize", True):
            said[key] = ",".join(str(float(n)) for n in config[f"image_{key}"])
    size = config.get("size")
    if isinstance(size, dict):
        size = [size.get("height", size.get("shortest_edge")), size.get("width")]
        size = [size[0], size[1] or size[0]]
    if isinstance(size, int):
        size = [size, size]
    if isinstance(size, list) and len(size) == 2 and size[0]:
        said["image_size"] = ",".join(str(int(n)) for n in size)
    return said


def _salient(config: Any, labels: str | None, source: str) -> list[int] | None:
    """The classes that count: those of `labels`, or all but the one called background."""
    names = {int(number): str(name).lower() for number, name in config.id2label.items()}
    if labels is None:
        background = [number for number, name in names.items() if name == "background"]
        if not background:
            return None  # one map; several are an error when they come
        return [number for number in names if number not in background]
    chosen = []
    for label in labels.lower().split(","):
        found = [n for n, name in names.items() if label.strip() in (str(n), name)]
        if not found:
            raise InputError(f"model {source}: has no class {label.strip()!r} (option labels)")
        chosen += found
    if len(set(chosen)) == len(names):
        raise InputError(f"model {source}: labels are all of its classes, and nothing is left")
    return sorted(set(chosen))
