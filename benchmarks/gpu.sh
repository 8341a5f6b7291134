#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes: builds the CUDA module for
# this GPU, runs the tests on CUDA tensors and the benchmarks, and writes logs, JSON and plots to OUT.
#     bash benchmarks/gpu.sh OUT             (PYTHON=python3 chooses the interpreter)
#     bash benchmarks/gpu.sh --dry-run OUT   prints the steps and runs none
# Needs torch with CUDA, triton, nvcc, ninja, pybind11, einops, pytest, rich and matplotlib; installs
# nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
out=${1:?usage: bash benchmarks/gpu.sh [--dry-run] OUT}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 VSOD_OPS_BUILD=cuda
failed=()

# step NAME SECONDS COMMAND...: runs it under a time limit, its output in OUT/NAME.log
step() {
  local name=$1 seconds=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $seconds s): $*"
  [ -n "$dry_run" ] && return
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 12 "$out/$name.log"
  echo "== $name: exit code $code after $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || failed+=("$name")
}

if [ -z "$dry_run" ]; then
  mkdir -p "$out" || exit 1
  TORCH_CUDA_ARCH_LIST=$("$python" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
    echo "torch finds no GPU" >&2
    exit 1
  }
  export TORCH_CUDA_ARCH_LIST
fi

step build 120 "$python" setup.py build_ext --inplace
step doctor 30 "$python" -m vsod_ops.doctor
step tests 170 "$python" -m pytest -q -m cuda tests
step attention 100 "$python" -m benchmarks attention --device cuda --out "$out/attention"
step conv_lstm 60 "$python" -m benchmarks conv_lstm --device cuda --seconds 1 --out "$out/conv_lstm"

if [ "${#failed[@]}" -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
[ -n "$dry_run" ] || echo "all steps passed; results are in $out"
