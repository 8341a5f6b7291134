"""Models by name: the shipped ones, and those that were saved."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from .errors import InputError
from .networks.contract import SaliencyModel, Trainable
from .networks.saved import build_model, load_config, load_folder, load_state, read_checkpoint

SHIPPED = Path(__file__).parent / "weights"
MODELS = {"mssa": "MSSA", "msst": "MSST"}  # a file in networks/, and its class


def model_class(name: str, source: str = "") -> type[Trainable]:
    """The class of "mssa" or "msst"; `source`: who names it, for the error."""
    if not isinstance(name, str) or name not in MODELS:
        named = f"{source}: model {name!r}" if source else f"model {name!r}"
        raise InputError(f"{named} is unknown; there are {' and '.join(MODELS)}")
    return getattr(import_module(f".networks.{name}", __package__), MODELS[name])


def load_model(source: str | Path) -> SaliencyModel:
    """A model in evaluation mode, on the CPU.

    Args:
        source: the name of a shipped model ("vsod-mobile", "mssa-tiny"), a folder written by
            `save_pretrained`, or a checkpoint (.ckpt) of `vsod train`.

    Raises:
        InputError: it is none of these, it is a motion prior, or its files are damaged or belong
            to another model.
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
    return load_folder(path, model_class(name, str(path / "config.json"))).eval()


def _from_checkpoint(file: Path) -> SaliencyModel:
    config, state = read_checkpoint(file)
    arguments = dict(config["model"])
    model = build_model(model_class(arguments.pop("name", "mssa"), str(file)), arguments, str(file))
    load_state(model, state, str(file))
    return model
