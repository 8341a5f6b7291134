"""Models on disk: folders of `save_pretrained` and checkpoints of a training."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import InputError, one_line
from ..files import read_json
from ..limits import check_arguments

MOST_PARAMETERS = 2_000_000_000
FEW_PARAMETERS = 100_000_000  # are built at once; more are counted first, which costs seconds

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

    # Arguments that were renamed: configurations that were saved before say the former name.
    former_names: ClassVar[Mapping[str, str]] = {}
    terms: str = ""  # what the weights may be used for, where the data that made them limits it

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        # Before anything is built, also by `from_pretrained` of a file that somebody wrote.
        given = inspect.signature(cls.__init__).bind_partial(None, *arguments, **named).arguments
        check_arguments(cls, dict(list(given.items())[1:]), f"{cls.__name__}: ")
        return super().__new__(cls, *arguments, **named)

    @classmethod
    def _from_pretrained(cls, *, config: dict[str, Any] | None = None, **named: Any) -> Any:
        # Of `config` the library has put into `named` only what it knows as an argument.
        current = current_names(cls, config or {}, "config.json")
        for name in cls.former_names.values():
            if name in current:
                named.setdefault(name, current[name])
        return super()._from_pretrained(**named)

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
    if not file.exists():
        raise InputError(f"{folder}: no model here (config.json is missing)")
    config = read_json(file, "configuration of a vsod model")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise InputError(f"{file}: not the configuration of a vsod model")
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
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: not readable as weights ({error})") from None
    model.terms = terms
    return model


def hub_folder(name: str, inside: str = "") -> Path:
    """The two files of a model on the Hugging Face hub, in the cache of the hub's client.

    Args:
        name: owner/name, or owner/name@revision.
        inside: a folder of the repository that holds them.

    Raises:
        InputError: it cannot be had, or its weights are not in safetensors.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"model hub:{name}: hub:owner/name is needed")
    for file in ("config.json", "model.safetensors"):
        try:
            path = huggingface_hub.hf_hub_download(
                repository, file, subfolder=inside or None, revision=revision or None
            )
        except EntryNotFoundError:
            raise InputError(
                f"model hub:{name}: has no {file}, or it cannot be reached (weights in other "
                "files can hold code, and are not read)"
            ) from None
        except Exception as error:  # no such repository, no network: kinds of their client
            raise InputError(f"model hub:{name}: cannot be had: {one_line(error)}") from None
    return Path(path).parent


def read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration, and the weights of the model, of a checkpoint of a training."""
    try:
        with warnings.catch_warnings():  # about pickles that are none of ours: the error says it
            warnings.simplefilter("ignore")
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config, state = checkpoint["config"], checkpoint["state_dict"]
        for part in (config["model"], config["data"], state):  # or another program's checkpoint
            if not isinstance(part, dict):
                raise TypeError(part)
        if not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise TypeError(state)
    except FileNotFoundError:
        raise InputError(f"{file}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise InputError(
            f"{file}: not a checkpoint of `vsod train` ({type(error).__name__})"
        ) from None
    averaged = any(k.startswith("average.") for k in state)
    prefix = "average." if averaged else "model."
    return config, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def current_names(
    cls: type[PretrainedModel], arguments: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The arguments of a configuration, under the names that they have today.

    Raises:
        InputError: an argument is given by both of its names.
    """
    for former, name in cls.former_names.items():
        if former in arguments and name in arguments:
            raise InputError(
                f"{source}: model.{former} is the former name of model.{name}; give one of them"
            )
    return {cls.former_names.get(key, key): value for key, value in arguments.items()}


class _TooMany(Exception):
    pass


@contextlib.contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Modules that this thread builds may have so many parameters; else _TooMany, before more."""
    count, thread = 0, threading.get_ident()

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if parameter is not None and threading.get_ident() == thread:
            count += parameter.numel()
            if count > limit:
                raise _TooMany

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def build_model(cls: type[M], arguments: Mapping[str, Any], source: str) -> M:
    """Builds the model; InputError names an argument that it does not have."""
    arguments = current_names(cls, arguments, source)
    known = inspect.signature(cls.__init__).parameters
    for key in arguments:
        if key not in known:
            raise InputError(
                f"{source}: model.{key} is not an argument of {cls.__name__} "
                f"({', '.join(k for k in known if k != 'self')})"
            )
    check_arguments(cls, arguments, f"{source}: model.")
    state = torch.random.get_rng_state()
    try:
        with _at_most(FEW_PARAMETERS):
            return cls(**arguments)
    except (_TooMany, RuntimeError):
        torch.random.set_rng_state(state)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {one_line(error)}") from None
    try:
        # Without memory first: each value may be within its bounds and the whole without end.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            parameters = sum(p.numel() for p in cls(**arguments).parameters())
        if parameters > MOST_PARAMETERS:
            raise InputError(
                f"{source}: a model of {parameters:,} parameters; at most {MOST_PARAMETERS:,} are "
                "built"
            )
        return cls(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: {one_line(error)}") from None


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads weights into a model; InputError for those of another model."""
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
    check_finite(state, source)
    model.load_state_dict(state)


def check_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """InputError for weights that are NaN or infinite: every mask would be, too."""
    for name, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise InputError(f"{source}: weights that are NaN or infinite (in {name})")
