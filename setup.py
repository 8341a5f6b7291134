"""Builds the compiled backends of vsod_ops with ninja: _cpu always, _cuda where nvcc is found.

VSOD_OPS_BUILD = auto (default) | cpu | cuda | none
    auto  the CPU module; the CUDA module too if nvcc is there and its compilation works
    cpu   the CPU module alone
    cuda  both, and an error that says what is missing where the CUDA module cannot be built
    none  neither: the ops run through Triton and plain PyTorch
TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0+PTX"
MAX_JOBS              compilations at a time (default: as cores and memory allow)

Modules are plain libraries that register with torch through its stable ABI and know nothing of
Python, so one that was built against torch 2.10 or newer runs with any torch from 2.10 on, and with
any Python.  Why a module was not built is kept in vsod_ops/_build_report.json, where
`python -m vsod_ops.doctor` finds it.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU_OPS = ["shunted_attention", "conv_lstm", "dense_crf"]  # csrc/<op>/{cpu,cpu_kernel}.cpp
CUDA_OPS = ["conv_lstm", "dense_crf"]  # csrc/<op>/cuda.cu
ON_HOST = ["conv_lstm", "dense_crf"]  # csrc/<op>/cuda_on_host.cpp: on the CPU, for tests
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
TORCH_TARGET = "0x020a000000000000"  # torch 2.10: the oldest that a build runs with

_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
X86_LEVELS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": _AVX512,
    "avx512bf16": _AVX512 + " -mavx512bf16",
}


class BuildError(RuntimeError):
    pass


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (nvcc := Path(home) / "bin" / "nvcc").exists():
        return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def run_text(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit's folder as nvcc itself sees it: an nvcc on the PATH may be a wrapper."""
    dry_run = run_text([nvcc, "--dryrun", "x.cu"])
    if match := re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE):
        return Path(match[1].strip()).resolve()
    return nvcc.resolve().parent.parent


def cuda_architectures(nvcc: Path) -> list[str]:
    """nvcc's -gencode flags."""
    known = run_text([nvcc, "--list-gpu-arch"]).split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    names = asked or [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    if not names:
        raise BuildError(f"nvcc knows none of the architectures {DEFAULT_ARCHITECTURES}")
    flags = []
    for i, name in enumerate(names):
        if not (match := re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", name)):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {name!r} is no architecture; it takes 9.0 or 9.0+PTX"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3] or (not asked and i == len(names) - 1):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def parallel_jobs(gigabytes_each: float) -> int:
    if jobs := os.environ.get("MAX_JOBS"):
        return max(1, int(jobs))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / gigabytes_each)))


def revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


class Ninja:
    """A build.ninja file: rules, then one edge an object and one a module."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler -shared $in -o $out $flags",
        ]

    @staticmethod
    def _path(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def _edge(self, rule: str, out: Path, inputs: list[Path], compiler: str, flags: str) -> Path:
        paths = " ".join(self._path(p) for p in inputs)
        self.lines += [
            f"build {self._path(out)}: {rule} {paths}",
            f"  compiler = {compiler}",
            f"  flags = {flags.replace('$', '$$')}",
        ]
        return out

    def compile(self, source: Path, name: str, compiler: str, flags: str) -> Path:
        return self._edge("compile", self.folder / f"{name}.o", [source], compiler, flags)

    def link(self, objects: list[Path], out: Path, compiler: str, flags: str) -> None:
        self._edge("link", out, objects, compiler, flags)

    def run(self, jobs: int) -> None:
        import ninja

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", self.folder, "-j", str(jobs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            raise BuildError("compilation failed: " + (errors or ["see the output above"])[0])


class BuildExtensions(build_ext):
    def run(self) -> None:
        self.source_build = bool(self.inplace)
        super().run()

    def build_extensions(self) -> None:
        mode = os.environ.get("VSOD_OPS_BUILD", "auto")
        if mode not in ("auto", "cpu", "cuda", "none"):
            sys.exit(f"VSOD_OPS_BUILD must be auto, cpu, cuda or none, got {mode!r}")
        report = {}
        if mode in ("none", "cpu"):
            report["_cuda"] = f"left out by VSOD_OPS_BUILD={mode}"
        if mode == "none":
            report["_cpu"] = "left out by VSOD_OPS_BUILD=none"
        else:
            try:
                self.build_cpu()
            except BuildError as error:
                sys.exit(f"vsod_ops._cpu: {error}")
        if mode in ("auto", "cuda"):
            try:
                self.build_cuda()
            except BuildError as error:
                if mode == "cuda":
                    sys.exit(f"vsod_ops._cuda: {error}")
                report["_cuda"] = str(error)
                print(f"vsod_ops._cuda is not built: {error}", flush=True)
        self.extensions = [e for e in self.extensions if e.name.split(".")[1] not in report]
        folders = [Path(self.get_ext_fullpath("vsod_ops._cpu")).parent]
        if self.source_build:
            folders.append(ROOT / "vsod_ops")
            for name in report:  # a module left by an earlier build would still be found
                Path(self.source_build_path(name)).unlink(missing_ok=True)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_report.json").write_text(json.dumps(report, indent=2) + "\n")

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python, since none is in it."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def source_build_path(self, name: str) -> str:
        return str(ROOT / self.get_ext_filename(f"vsod_ops.{name}"))

    def common_flags(self) -> tuple[str, Path]:
        import torch

        torch_root = Path(torch.__file__).parent
        flags = f'-I"{torch_root / "include"}" -std=c++17 -O3 -DTORCH_TARGET_VERSION={TORCH_TARGET}'
        return flags, torch_root

    @staticmethod
    def build_info_flags(**defines: str) -> str:
        """What a module tells about its build; one object alone is made again for each."""
        import torch

        defines |= {"VSOD_REVISION": revision(), "VSOD_BUILD_TORCH": torch.__version__}
        return "".join(f' -D{name}="\\"{value}\\""' for name, value in defines.items())

    def target(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(f"vsod_ops.{name}")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def build_cpu(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if not shutil.which(compiler.split()[0]):
            raise BuildError(f"no C++ compiler: {compiler!r} is not on the PATH (set CXX)")
        version = run_text([*compiler.split(), "--version"]).splitlines()[0]
        flags, torch_root = self.common_flags()
        # gcc 12's own AVX-512 headers set off -Wmaybe-uninitialized.
        flags += " -fPIC -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized"
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = X86_LEVELS if x86 else {"portable": ""}
        if x86:
            flags += " -DVSOD_X86_LEVELS"
        kernel_flags = flags + " -ffp-contract=fast -fno-math-errno -fno-trapping-math"

        folder = Path(self.build_temp).resolve() / "cpu"
        ninja = Ninja(folder)
        csrc = (ROOT / "csrc").resolve()
        objects = [
            ninja.compile(
                csrc / "common/cpu_module.cpp",
                "cpu_module",
                compiler,
                flags + self.build_info_flags(VSOD_COMPILER=version),
            )
        ]
        source = csrc / "common/checked_input.cpp"
        objects.append(ninja.compile(source, "checked_input", compiler, flags))
        kernels = {"peak": csrc / "common/peak.cpp"}
        for op in CPU_OPS:
            objects.append(ninja.compile(csrc / op / "cpu.cpp", op, compiler, flags))
            kernels[op] = csrc / op / "cpu_kernel.cpp"
        kernels["shunted_attention_linear"] = csrc / "shunted_attention/cpu_linear_kernel.cpp"
        for op in ON_HOST:
            source = csrc / op / "cuda_on_host.cpp"
            objects.append(ninja.compile(source, f"{op}_cuda_on_host", compiler, flags))
        for name, source in kernels.items():
            for level, level_flags in levels.items():
                objects.append(
                    ninja.compile(
                        source,
                        f"{name}_{level}",
                        compiler,
                        f"{kernel_flags} {level_flags} -DVSOD_LEVEL={level}",
                    )
                )
        link = f'-L"{torch_root / "lib"}" -ltorch_cpu -lc10'
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        ninja.link(objects, self.target("_cpu"), compiler, link)
        ninja.run(parallel_jobs(gigabytes_each=1))

    def build_cuda(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("nvcc is not on the PATH and CUDA_HOME is not set")
        import torch

        if torch.version.cuda is None:
            raise BuildError(f"torch {torch.__version__} has no CUDA support")
        version = re.search(r"release ([\d.]+)", run_text([nvcc, "--version"]))
        if version is None:
            raise BuildError(f"{nvcc} --version prints no release")
        root = toolkit_root(nvcc)
        libraries = [d for d in ("lib64", "targets/x86_64-linux/lib", "lib") if (root / d).is_dir()]
        if not (root / "include" / "cuda_runtime.h").exists() or not libraries:
            raise BuildError(f"nvcc belongs to {root}, which has no CUDA headers and libraries")

        flags, torch_root = self.common_flags()
        flags += f' -I"{root / "include"}" -DUSE_CUDA'
        architectures = cuda_architectures(nvcc)
        names = ", ".join(sorted({f.rsplit("=", 1)[1] for f in architectures}))
        nvcc_flags = f"{flags} {' '.join(architectures)} -Xcompiler -fPIC"
        folder = Path(self.build_temp).resolve() / "cuda"
        ninja = Ninja(folder)
        csrc = (ROOT / "csrc").resolve()
        compiler = os.environ.get("CXX", "c++")
        module_flags = f"{flags} -fPIC -fvisibility=hidden" + self.build_info_flags(
            VSOD_COMPILER=f"nvcc {version[1]}", VSOD_ARCHITECTURES=names
        )
        objects = [
            ninja.compile(csrc / "common/cuda_module.cpp", "cuda_module", compiler, module_flags),
            ninja.compile(csrc / "common/probe.cu", "probe", str(nvcc), nvcc_flags),
        ]
        for op in CUDA_OPS:
            objects.append(ninja.compile(csrc / op / "cuda.cu", op, str(nvcc), nvcc_flags))
        link = f'-L"{torch_root / "lib"}" -ltorch_cuda -ltorch_cpu -lc10'
        link += f' -L"{root / libraries[0]}" -lcudart'
        ninja.link(objects, self.target("_cuda"), compiler, link)
        ninja.run(parallel_jobs(gigabytes_each=3))


class BuildWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Of a platform, and of no Python, since none is in the modules."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("vsod_ops._cpu", []), Extension("vsod_ops._cuda", [])],
    cmdclass={"build_ext": BuildExtensions, "bdist_wheel": BuildWheel},
)
