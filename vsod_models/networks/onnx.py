"""ONNX files as models, through onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, one_line
from ..files import need_file
from .exported import METADATA, ExportedModel


class OnnxModel(ExportedModel):
    """An ONNX file: see `ExportedModel`; of its outputs the first is taken.

    Args:
        file: the ONNX file.
        options: values of METADATA, where the file has none or others.

    Raises:
        InputError: onnxruntime is missing, the file is no ONNX file, or an option cannot be.
    """

    def __init__(self, file: Path, options: Mapping[str, str] | None = None):
        source = f"onnx:{file}"
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                f"model {source} needs onnxruntime: pip install -e '.[models,onnx]'"
            ) from None
        need_file(file)
        if not file.exists():
            raise InputError(f"{file}: no such file")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        there = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        try:
            session = onnxruntime.InferenceSession(
                str(file), settings, providers=[name for name in wanted if name in there]
            )
        except Exception as error:  # onnxruntime raises kinds of its own
            raise InputError(f"{file}: no ONNX file that can be run ({one_line(error)})") from None
        for key in options or {}:
            if key not in METADATA:
                raise InputError(f"model {source}: {key} is not one of {', '.join(METADATA)}")
        said = {**session.get_modelmeta().custom_metadata_map, **(options or {})}
        super().__init__(source, file, said, {i.name: i.shape for i in session.get_inputs()})
        self.session = session

    def _run(self, inputs: list[Tensor]) -> Tensor:
        names = [i.name for i in self.session.get_inputs()]
        halves = [i.type == "tensor(float16)" for i in self.session.get_inputs()]
        arrays = [x.numpy() for x in inputs]
        given = [a.astype(np.float16) if h else a for a, h in zip(arrays, halves, strict=True)]
        # A file with a fixed number of windows takes so many at a time.
        step = self.batch or len(given[0])
        parts = [
            self.session.run(
                None, {n: a[at : at + step] for n, a in zip(names, given, strict=True)}
            )[0]
            for at in range(0, len(given[0]), step)
        ]
        return torch.from_numpy(np.concatenate(parts))
