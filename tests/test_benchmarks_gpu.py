"""benchmarks/gpu.sh, without a GPU: what it would run, and a run with a stand-in for Python."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
BENCHMARKS = ("attention", "attention-sweep", "conv_lstm", "dense_crf", "msst", "mssa")
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture(scope="module")
def steps():
    """[(name, seconds or None, command)] of a dry run."""
    done = subprocess.run(
        ["bash", SCRIPT, "--dry-run", "OUT"],
        env=os.environ | {"PYTHON": "python3"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"^== (\S+) \((.*?)\): (.*)$", done.stdout, re.MULTILINE)
    assert len(found) == done.stdout.count("\n")
    limits = (re.fullmatch(r"at most (\d+) s", when) for _, when, _ in found)
    return [
        (name, int(limit[1]) if limit else None, command)
        for (name, _, command), limit in zip(found, limits, strict=True)
    ]


def test_tests_come_first_and_eight_minutes_are_enough(steps):
    timed = [name for name, seconds, _ in steps if seconds]
    assert timed == ["build", "doctor", "tests", *BENCHMARKS]
    assert sum(seconds or 0 for _, seconds, _ in steps) <= 8 * 60 - 15


def test_every_benchmark_understands_its_arguments(steps):
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    pytest.importorskip("torchvision", reason="the extra `models` is not installed")
    seen = []
    for name, _, command in steps:
        match = re.fullmatch(r"python3 -m benchmarks (\w+) (.*)", command)
        if match is None:
            assert name in ("build", "doctor", "tests")
            continue
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"benchmarks.{match[1]}").add_arguments(parser)
        arguments, unknown = parser.parse_known_args(match[2].split())
        assert not unknown and arguments.device == "cuda", command
        assert arguments.out == Path("OUT" if name in BENCHMARKS else "OUT/warm")
        seen.append(name)
    assert set(BENCHMARKS) < set(seen)


PYTHON = """#!/usr/bin/env bash
# Stands in for python: writes what a benchmark writes; `msst` fails, `mssa` never ends.
case "$*" in
  *get_device_capability*) echo 9.0; exit ;;
  *pytest*) sleep 2; exit ;;
  -m\\ benchmarks*) ;;
  *) echo "$TORCH_CUDA_ARCH_LIST"; exit ;;
esac
name=$3
[[ "$*" == *--sweep* ]] && name=$name-sweep
out=${@: -1}
mkdir -p "$out"
[ "$name" = msst ] && { echo "WRONG"; exit 1; }
[ "$name" = mssa ] && exec sleep 30  # one process: it takes the signal at any time
echo "{}" >"$out/$name.json"
echo >"$out/$name.csv"
"""


def test_what_it_leaves(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    short = tmp_path / "benchmarks" / "gpu.sh"  # the script finds the repository by its own place
    short.parent.mkdir()
    short.write_text(SCRIPT.read_text().replace("step mssa 35", "step mssa 1"))
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", short, out],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout.endswith("FAILED: msst mssa\n"), done.stdout
    assert "== mssa: exit code 124" in done.stdout and "WRONG" in done.stdout
    assert {path.name for path in out.iterdir()} == {
        "run.tar.gz", *(f"{name}.json" for name in BENCHMARKS[:-2])
    }  # fmt: skip
    with tarfile.open(out / "run.tar.gz") as tar:
        packed = {name.removeprefix("./") for name in tar.getnames()}
        log = tar.extractfile("./build.log").read()
    assert {f"{name}.log" for name in BENCHMARKS} | {"tests.log", "attention.csv"} <= packed
    assert "warm-attention.log" in packed and not any("warm/" in name for name in packed)
    assert log == b"9.0\n"
