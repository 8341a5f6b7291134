"""setup.py's decisions and the doctor."""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import pytest

from vsod_ops import backends, doctor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build():
    """setup.py as a module, its call of setup() left out."""
    spec = importlib.util.spec_from_file_location("vsod_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def fake_nvcc(folder, script):
    path = folder / "nvcc"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_toolkit_root_is_what_nvcc_says(build, tmp_path):
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    wrapper = fake_nvcc(tmp_path, f"echo '#$ TOP={toolkit}/bin/..' >&2\n")
    assert build.toolkit_root(wrapper) == toolkit


def test_architectures(build, tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "echo compute_80; echo compute_90; echo compute_100\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.cuda_architectures(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert build.cuda_architectures(nvcc) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="'Hopper' is no architecture"):
        build.cuda_architectures(nvcc)


def test_jobs(build, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.parallel_jobs(1) == 3
    monkeypatch.delenv("MAX_JOBS")
    assert build.parallel_jobs(10**6) == 1


def run_build(tmp_path, mode, path=None):
    """build_ext of a copy of the sources; compilers come from `path` if it is given."""
    source = tmp_path / "source"
    if not source.exists():
        shutil.copytree(ROOT / "csrc", source / "csrc")
        shutil.copytree(
            ROOT / "vsod_ops",
            source / "vsod_ops",
            ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"),
        )
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source / name)
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")}
    env["VSOD_OPS_BUILD"] = mode
    if path is not None:
        env["PATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
    )
    return source, done


def in_source(source, code):
    # An editable installation would find what the copy lacks, for example its compiled modules.
    code = (
        "import sys\n"
        "for finder in list(sys.meta_path):\n"
        "    if 'Editable' in getattr(finder, '__name__', ''): sys.meta_path.remove(finder)\n"
    ) + code
    env = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True
    )


SCHEMAS = """
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("vsod_ops::"):
        packet, _, overload = name.partition(".")
        print(torch._C._get_schema(packet, overload))
"""


def test_without_any_compiled_module_the_ops_work(tmp_path):
    source, done = run_build(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    report = json.loads((source / "vsod_ops" / "_build_report.json").read_text())
    assert set(report) == {"_cpu", "_cuda"}
    ran = in_source(
        source,
        "import torch\n"
        "from vsod_ops import shunted_attention, doctor\n"
        "q = torch.randn(1, 2, 3, 4, requires_grad=True)\n"
        "shunted_attention(q, [q], [q]).sum().backward()\n"
        "print(doctor.report())\n"
        f"{SCHEMAS}"
        "shunted_attention(q, [q], [q], backend='cpu')\n",
    )
    here = subprocess.run(
        [sys.executable, "-c", "import torch, vsod_ops\n" + SCHEMAS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    schemas = re.findall(r"^vsod_ops::.*\n", ran.stdout, re.M)
    assert len(schemas) > 20 and set(schemas) <= set(here.stdout.splitlines(keepends=True))
    assert "cpu float32: reference" in ran.stdout
    assert "VSOD_OPS_BUILD=none" in ran.stdout
    assert "backend 'cpu' cannot run: left out by VSOD_OPS_BUILD=none" in ran.stderr


def test_cuda_without_nvcc_is_an_error_that_says_so(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    # A "compiler" that only touches its output: what is tested is what comes after it.
    compiler = bin_folder / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake 1.0; exit; }\n'
        'for a; do [ "$last" = -o ] && : > "$a"; last=$a; done\n'
    )
    compiler.chmod(0o755)
    (bin_folder / "sh").symlink_to("/bin/sh")
    source, done = run_build(tmp_path, "cuda", path=bin_folder)
    assert done.returncode != 0
    assert "vsod_ops._cuda: nvcc is not on the PATH and CUDA_HOME is not set" in done.stderr
    _, done = run_build(tmp_path, "auto", path=bin_folder)
    assert done.returncode == 0, done.stderr
    assert "vsod_ops._cuda is not built: nvcc is not on the PATH" in done.stdout
    report = json.loads((source / "vsod_ops" / "_build_report.json").read_text())
    assert "nvcc is not on the PATH" in report["_cuda"]


def test_unknown_mode_is_refused(tmp_path):
    _, done = run_build(tmp_path, "gpu")
    assert done.returncode != 0 and "VSOD_OPS_BUILD must be" in done.stderr


def test_doctor_says_what_runs_where():
    text = doctor.report()
    assert "Backends of shunted_attention" in text
    assert "cuda float64: reference" in text
    module = backends.compiled_module("_cpu")
    if not isinstance(module, str):
        assert "cpu bfloat16: cpu" in text
        assert module.build_info()["level"] in text


@pytest.mark.skipif(
    isinstance(backends.compiled_module("_cuda"), str), reason="the CUDA module is not built"
)
def test_cuda_module_loads_without_a_gpu():
    import torch

    module = backends.compiled_module("_cuda")
    assert "sm_90" in module.build_info()["architectures"]
    if not torch.cuda.is_available():
        assert torch.ops.vsod_ops.cuda_probe(0) != ""
    else:
        assert torch.ops.vsod_ops.cuda_probe(0) == ""


def tracked(*folders):
    """The files of a checkout that a package has."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a checkout")
    return set(listed.stdout.split())


def test_an_sdist_has_what_the_build_reads(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        there = {name.partition("/")[2] for name in files.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert needed | tracked("csrc", "vsod_ops", "vsod_models") <= there


def test_the_tests_of_the_wheels_and_of_the_workflow_are_there():
    command = re.search(r'^test-command = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    files = re.findall(r"\{project\}/(\S+)", command[1])
    assert files and all((ROOT / file).is_file() for file in files)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert "run: bash .ci/run\n" in workflow and (ROOT / ".ci" / "run").is_file()


PYTHONS = ["cp310", "cp311", "cp312", "cp313", "cp314"]


@pytest.mark.parametrize(
    ("config", "platform", "machine", "expected"),
    [
        ("pyproject.toml", "linux", "x86_64", [f"{p}-manylinux_x86_64" for p in PYTHONS]),
        ("pyproject.toml", "linux", "aarch64", [f"{p}-manylinux_aarch64" for p in PYTHONS]),
        ("pyproject.toml", "macos", "arm64", [f"{p}-macosx_arm64" for p in PYTHONS]),
        ("pyproject.toml", "windows", "AMD64", []),
        (".github/wheels-cuda.toml", "linux", "x86_64", ["cp312-manylinux_x86_64"]),
    ],
)
def test_what_cibuildwheel_makes_of_its_configuration(config, platform, machine, expected):
    pytest.importorskip("cibuildwheel", reason="the extra `test` is not installed")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--config-file", config, "--platform", platform, "--archs", machine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected
    assert config in (ROOT / ".github" / "workflows" / "wheels.yml").read_text()


def test_the_name_of_a_wheel_is_of_a_platform_and_of_no_python(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build", "--build-base", str(tmp_path / "build")]
    command += ["bdist_wheel", "--dist-dir", str(tmp_path), "--build-number", "1cu130"]
    env = os.environ | {"VSOD_OPS_BUILD": "none"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"vsod_ops-[\d.]+-1cu130-py3-none-\w+\.whl", wheel.name)


def test_a_wheel_has_what_the_models_read(tmp_path):
    """Recipes, weights and pages lie in the package, and so does all of its code."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    egg = ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command[:3], *egg, *command[3:]], cwd=ROOT, check=True, capture_output=True)
    for name in tracked("vsod_models"):
        assert (tmp_path / "built" / name).is_file(), name
