"""Models by name: the shipped ones, and those that were saved."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import InputError
from .networks.saved import (
    PretrainedModel,
    build_model,
    load_config,
    load_folder,
    load_state,
    read_checkpoint,
)

SHIPPED = Path(__file__).parent / "weights"
MODELS = {"mssa": "MSSA", "msst": "MSST"}  # file in networks/ -> class


def model_class(name: str) -> type[PretrainedModel]:
    """The class of "mssa" or "msst"."""
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown; there are {' and '.join(MODELS)}")
    return getattr(import_module(f".networks.{name}", __package__), MODELS[name])


def new_model(name: str, arguments: dict[str, Any], source: str) -> PretrainedModel:
    """A model by name, without trained weights."""
    return build_model(model_class(name), arguments, source)


def load_model(source: str | Path) -> PretrainedModel:
    """A model in evaluation mode, on the CPU.

    Args:
        source: the name of a shipped model ("mssa-tiny"), a folder written by `save_pretrained`,
            or a checkpoint (.ckpt) of `vsod train`.

    Raises:
        InputError: nothing of these, or a file that is damaged or belongs to another model.
    """
    path = Path(source)
    if not path.exists():
        shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
        if str(source) not in shipped:
            raise InputError(
                f"model {str(source)!r} is neither a folder or checkpoint nor shipped with the "
                f"package ({', '.join(shipped) or 'none is'})"
            )
        path = SHIPPED / str(source)
    if path.is_file():
        return _from_checkpoint(path).eval()
    name = load_config(path)["model"]
    if name == "motionprior":
        raise InputError(f"{source}: a motion prior, not a model of saliency")
    return load_folder(path, model_class(name)).eval()


def _from_checkpoint(file: Path) -> PretrainedModel:
    config, state = read_checkpoint(file)
    arguments = dict(config["model"])
    model = new_model(arguments.pop("name", "mssa"), arguments, str(file))
    load_state(model, state, str(file))
    return model
