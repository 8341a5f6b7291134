"""torchvision's classification networks, imported in half of the time.

torchvision imports torch's compiler, which takes over a second, for one function that says whether
there is a compiler.  Where nothing has imported the compiler yet, that function is stood in for
while torchvision is imported, and answers once it is asked.
"""

from __future__ import annotations

import sys
from types import ModuleType

COMPILER = "torch._dynamo.utils"


def _is_compile_supported(device: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


if COMPILER in sys.modules or "torchvision" in sys.modules:
    import torchvision
else:
    stand_in = ModuleType(COMPILER)
    stand_in.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules[COMPILER] = stand_in
    try:
        import torchvision
    finally:
        del sys.modules[COMPILER]

from torchvision import models  # noqa: E402
from torchvision.models import vgg  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

__all__ = ["create_feature_extractor", "models", "torchvision", "vgg"]
