"""Motion priors by name or folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..networks.saved import hub_folder, load_config, load_folder, read_checkpoint
from .flow import FLOW_MAGNITUDE, FlowMagnitude, PriorSource
from .regions import MotionPrior


def load_prior(source: str | Path) -> PriorSource:
    """`flow-magnitude`, or a folder that `vsod prior train` wrote."""
    if str(source) == FLOW_MAGNITUDE:
        return FlowMagnitude()
    if not Path(source).is_dir():
        raise InputError(
            f"motion prior {str(source)!r}: no such folder; `vsod prior train` makes one, "
            f"{FLOW_MAGNITUDE} is a substitute without training"
        )
    folder = Path(source)
    kind = load_config(folder)["model"]
    if kind != "motionprior":
        raise InputError(f"{source}: a model of kind {kind}, not a motion prior")
    return load_folder(folder, MotionPrior).eval()


def prior_of(model: str | Path) -> str:
    """What to give to `load_prior` for a saved model: the prior that it was trained with.

    Args:
        model: as for :func:`vsod_models.zoo.load_model`, of an MSST.  A checkpoint names its
            prior; a folder, and a repository on the hub, says which kind, and holds a region prior
            in its folder `prior`.  What else there is takes flow-magnitude.

    Raises:
        InputError: the region prior is not there.
    """
    path, hub = Path(model), str(model).removeprefix("hub:")
    if hub != str(model):
        path = hub_folder(hub)
    elif not path.exists():
        return FLOW_MAGNITUDE
    if path.is_file():
        return read_checkpoint(path)[0]["data"]["prior"]
    if load_config(path).get("prior", FLOW_MAGNITUDE) == FLOW_MAGNITUDE:
        return FLOW_MAGNITUDE
    if hub != str(model):
        return str(hub_folder(hub, "prior"))
    if not (path / "prior").is_dir():
        raise InputError(
            f"{path / 'prior'}: no motion prior here, and {model} was trained with one"
        )
    return str(path / "prior")
