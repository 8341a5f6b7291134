"""Video salient object detection with `vsod_ops`: MSSA and MSST-ConvLSTM, complete systems."""

from importlib import import_module
from typing import Any

_HOMES = {
    "MSSA": "networks.mssa",
    "MSST": "networks.msst",
    "SaliencyEvaluator": "evaluation",
    "VideoPredictor": "prediction",
    "load_model": "zoo",
    "open_dataset": "data",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Names are imported when they are used: the command answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
