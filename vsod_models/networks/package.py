"""Packages of AOTInductor (.pt2) as models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import vsod_ops  # noqa: F401  whose ops a package calls

from ..errors import InputError, one_line
from ..files import need_file
from .exported import ExportedModel

_LEVELS = ["DEFAULT", "AVX2", "AVX512"]  # each has what those before it have


def package_metadata(inputs: dict[str, tuple[str | int, ...]]) -> dict[str, str]:
    """What a package says of itself beside METADATA: its inputs and what compiled it."""
    return {
        "inputs": json.dumps(inputs),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


class PackageModel(ExportedModel):
    """A package that `vsod export` wrote.  It is compiled code, which runs with your rights.

    Raises:
        InputError: the file is no such package, or is for another machine.
    """

    def __init__(self, file: Path):
        source = f"aoti:{file}"
        need_file(file)
        if not file.exists():
            raise InputError(f"{file}: no such file")
        try:
            package = torch._inductor.aoti_load_package(str(file))
            said = package.get_metadata()
        except Exception as error:  # torch raises several kinds
            raise InputError(f"{file}: no package that can be run ({one_line(error)})") from None
        if "inputs" not in said:
            raise InputError(f"{file}: a package that vsod export did not write")
        super().__init__(source, file, said, json.loads(said["inputs"]))
        has = torch.backends.cpu.get_cpu_capability()
        if has in _LEVELS and said["cpu"] in _LEVELS[_LEVELS.index(has) + 1 :]:
            raise InputError(
                f"{file}: is for a CPU with {said['cpu']}, and this one has {has}; export it here"
            )
        self.package = package

    def _run(self, inputs: list[Tensor]) -> Tensor:
        return self.package(*inputs)
