"""`vsod export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="As --model of `vsod predict`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .onnx file, or a .pt2 package.")
    ],
    precision: Annotated[
        str, typer.Option(help="float32 or bfloat16, of a .pt2 package.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Write a model as an ONNX file for onnxruntime, or as a package that runs from C++."""
    from .. import zoo
    from ..errors import InputError
    from ..export import OPSET, export_onnx, export_package

    package = output.suffix == ".pt2"
    if not package and precision != "float32":
        raise InputError(f"precision {precision}: an ONNX file has float32")
    loaded = zoo.load_model(model)
    name = Path(model).name
    if package:
        shapes = export_package(loaded, output, name=name, overwrite=overwrite, precision=precision)
    else:
        shapes = export_onnx(loaded, output, name=name, overwrite=overwrite)
    inputs = " and ".join(f"{n} ({', '.join(map(str, s))})" for n, s in shapes.items())
    kind = f"compiled for this CPU, {precision}" if package else f"opset {OPSET}"
    print(f"{output}: {inputs} -> logits, {kind}; a dense CRF stays outside")
    if loaded.terms:
        print(f"note: weights for {loaded.terms}")
