"""Models by name: the shipped ones, and those that were saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from .errors import InputError
from .networks.contract import SaliencyModel, Trainable
from .networks.foreign import from_factory, import_factory
from .networks.saved import (
    build_model,
    hub_folder,
    load_config,
    load_folder,
    load_state,
    read_checkpoint,
)

SHIPPED = Path(__file__).parent / "weights"
MODELS = {"mssa": "MSSA", "msst": "MSST"}  # a file in networks/, and its class


def model_class(name: str, source: str = "") -> type[Trainable]:
    """The class of "mssa" or "msst"; `source`: who names it, for the error."""
    if not isinstance(name, str) or name not in MODELS:
        named = f"{source}: model {name!r}" if source else f"model {name!r}"
        raise InputError(f"{named} is unknown; there are {' and '.join(MODELS)}")
    return getattr(import_module(f".networks.{name}", __package__), MODELS[name])


def load_model(
    source: str | Path,
    *,
    options: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> SaliencyModel:
    """A model in evaluation mode, on the CPU.

    Args:
        source: the name of a shipped model ("vsod-mobile", "mssa-tiny"), a folder written by
            `save_pretrained`, or a checkpoint (.ckpt) of `vsod train`; "module:factory", anything
            that can be imported and returns a `SaliencyModel` or an `nn.Module`; a name of the
            group `vsod.models` of entry points; "hub:owner/name", a model of ours on the Hugging
            Face hub; "onnx:FILE"; "aoti:FILE", compiled code, which runs with your rights;
            "transformers:owner/name".
        options: of "onnx:" and "transformers:", see docs/models.md.
        trust_remote_code: run the code in a repository of "transformers:".

    Raises:
        InputError: it is none of these, it is a motion prior, its files are damaged or belong to
            another model, or its factory fails.
    """
    name = str(source)
    scheme, colon, rest = name.partition(":")
    if options and scheme not in ("onnx", "transformers"):
        raise InputError(f"model {name}: takes no options ({', '.join(options)})")
    if trust_remote_code and scheme != "transformers":
        raise InputError(f"model {name}: has no remote code to trust")
    if colon and scheme == "hub":
        return _from_folder(hub_folder(rest), name).eval()
    if colon and scheme == "onnx":
        from .networks.onnx import OnnxModel

        return OnnxModel(Path(rest), options).eval()
    if colon and scheme == "aoti":
        from .networks.package import PackageModel

        return PackageModel(Path(rest)).eval()
    if colon and scheme == "transformers":
        from .networks.transformers import load_transformers

        return load_transformers(rest, options, trust_remote_code).eval()
    path = Path(source)
    if not path.exists():
        shipped = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
        if name not in shipped:
            return _from_factory(name, shipped).eval()
        path = SHIPPED / name
    if path.is_file():
        return _from_checkpoint(path).eval()
    return _from_folder(path, name).eval()


def _from_folder(path: Path, source: str) -> SaliencyModel:
    name = load_config(path)["model"]
    if name == "motionprior":
        raise InputError(f"{source}: a motion prior, not a model of saliency")
    return load_folder(path, model_class(name, str(path / "config.json")))


def _from_factory(name: str, shipped: list[str]) -> SaliencyModel:
    points = {point.name: point for point in entry_points(group="vsod.models")}
    if name in points:
        return from_factory(import_factory(points[name].value), name)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
        return from_factory(import_factory(name), name)
    raise InputError(
        f"model {name!r} is neither a folder or checkpoint nor shipped with the package "
        f"({', '.join(shipped) or 'none is'}){_installed(list(points))}, nor module:factory, "
        "hub:owner/name, onnx:FILE, aoti:FILE or transformers:owner/name"
    )


def _installed(names: list[str]) -> str:
    return f" or another one ({', '.join(sorted(names))})" if names else ""


def _from_checkpoint(file: Path) -> SaliencyModel:
    config, state = read_checkpoint(file)
    arguments = dict(config["model"])
    model = build_model(model_class(arguments.pop("name", "mssa"), str(file)), arguments, str(file))
    load_state(model, state, str(file))
    return model
