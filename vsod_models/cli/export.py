"""`vsod export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="As --model of `vsod predict`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="An .onnx file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write a model as an ONNX file, for onnxruntime."""
    from .. import zoo
    from ..export import OPSET, export_onnx

    loaded = zoo.load_model(model)
    shapes = export_onnx(loaded, output, name=Path(model).name, overwrite=overwrite)
    inputs = " and ".join(f"{name} ({', '.join(map(str, s))})" for name, s in shapes.items())
    print(f"{output}: {inputs} -> logits, opset {OPSET}; a dense CRF stays outside")
    if loaded.terms:
        print(f"note: weights for {loaded.terms}")
