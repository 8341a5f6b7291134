"""``python -m vsod_ops.doctor``: what is installed, what was built, which backend runs where."""

import importlib.metadata
import importlib.util
import os
import platform

import torch

from . import __version__, backends
from .conv_lstm import op as conv_lstm_op
from .shunted_attention import op as shunted_attention_op

OPS = {
    "shunted_attention": shunted_attention_op.SUPPORT,
    "conv_lstm": conv_lstm_op.SUPPORT,
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _module_lines(name: str) -> list[str]:
    module = backends.compiled_module(name)
    if isinstance(module, str):
        return [f"  {name}: no ({module})"]
    return [f"  {name}: built"] + [f"    {k}: {v}" for k, v in module.build_info().items()]


def _gpu_line() -> str:
    if torch.version.cuda is None:
        return "none (this torch has no CUDA support)"
    if not torch.cuda.is_available():
        return "none found"
    module = backends.compiled_module("_cuda")
    lines = []
    for i in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        line = f"{torch.cuda.get_device_name(i)}, compute capability {capability}"
        if not isinstance(module, str):
            line += f", _cuda {module.probe(i) or 'runs'}"
        lines.append(line)
    return "; ".join(lines)


def report() -> str:
    """The doctor's findings as text."""
    lines = [
        f"vsod_ops {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "  " + ", ".join(f"{p} {_version(p)}" for p in ("torch", "triton", "numpy", "einops")),
        "Compiled modules",
        *_module_lines("_cpu"),
        *_module_lines("_cuda"),
        "Machine",
        f"  CPU threads: {torch.get_num_threads()}",
        f"  GPU: {_gpu_line()}",
    ]
    settings = [
        f"{k}={v}" for k, v in os.environ.items() if k in ("VSOD_OPS_SIMD", "TRITON_INTERPRET")
    ]
    if settings:
        lines.append("  set: " + ", ".join(settings))
    for name, support in OPS.items():
        lines.append(f"Backends of {name}")
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                chosen = backends.choose(name, support, None, device, dtype)
                lines.append(f"  {device} {str(dtype).removeprefix('torch.')}: {chosen}")
                for other in support:
                    if other == chosen:
                        break
                    reason = backends.why_not(other, support, device, dtype)
                    lines.append(f"    not {other}: {reason or 'a debugger, only on request'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
