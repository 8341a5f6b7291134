"""Models on disk: folders of `save_pretrained` and checkpoints of a training."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from ..errors import InputError

M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(  # type: ignore[call-arg, unused-ignore]  # where the library is missing
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vsod-ops",
    tags=["video-salient-object-detection"],
):
    """`save_pretrained(folder)` and `from_pretrained(folder or Hub name)`, in safetensors.

    The class is written into config.json beside its arguments, so that `load_model` finds it, and
    the terms of the weights where there are any.
    """

    terms: str = ""  # what the weights may be used for, where the data that made them limits it

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        assert isinstance(self._hub_mixin_config, dict)  # a dataclass only for models that have one
        config = {"model": type(self).__name__.lower(), **self._hub_mixin_config}
        if self.terms:
            config["terms"] = self.terms
        text = json.dumps(config, indent=2, sort_keys=True)
        (save_directory / "config.json").write_text(text + "\n")


def load_config(folder: Path) -> dict[str, Any]:
    """What config.json of a saved model says: its arguments, and its class under "model"."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        config["model"]
    except FileNotFoundError:
        raise InputError(f"{folder}: no model here (config.json is missing)") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise InputError(f"{file}: not the configuration of a vsod model") from None
    return config


def load_folder(folder: Path, cls: type[M]) -> M:
    """A model of this class from a folder of `save_pretrained`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(folder)
    del config["model"]
    terms = str(config.pop("terms", ""))
    model = build_model(cls, config, str(folder / "config.json"))
    weights = folder / "model.safetensors"
    try:
        load_state(model, load_file(weights), str(weights))
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{weights}: not readable as weights ({error})") from None
    model.terms = terms
    return model


def read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration, and the weights of the model, of a checkpoint of a training."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config, state = checkpoint["config"], checkpoint["state_dict"]
        if not {"model", "data"} <= set(config):
            raise KeyError("model, data")  # another program's checkpoint
    except FileNotFoundError:
        raise InputError(f"{file}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(
            f"{file}: not a checkpoint of `vsod train` ({type(error).__name__})"
        ) from None
    averaged = any(k.startswith("average.") for k in state)
    prefix = "average." if averaged else "model."
    return config, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def build_model(cls: type[M], arguments: Mapping[str, Any], source: str) -> M:
    """The model with its arguments; an argument that it does not have is named."""
    known = inspect.signature(cls.__init__).parameters
    for key in arguments:
        if key not in known:
            raise InputError(
                f"{source}: model.{key} is not an argument of {cls.__name__} "
                f"({', '.join(k for k in known if k != 'self')})"
            )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {error}") from None


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Weights into a model; those of another model are refused in one line."""
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    unfit = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or unknown or unfit:
        raise InputError(
            f"{source}: weights of another model: {len(missing)} parameters missing, "
            f"{len(unknown)} unknown, {len(unfit)} of another shape "
            f"(first: {(missing + unknown + unfit)[0]})"
        )
    model.load_state_dict(state)
