"""The start of `vsod predict`: what it does not import."""

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("av")

CODE = """
import sys
from vsod_models import prediction, zoo
zoo.load_model("mssa-tiny")
assert "torch._dynamo" not in sys.modules and "lightning" not in sys.modules
import torch, torchvision
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported is not None
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""


def test_the_compiler_is_not_imported_and_works_afterwards():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
