#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes: builds the CUDA module for
# this GPU, runs the tests on CUDA tensors and the benchmarks.
#     bash benchmarks/gpu.sh OUT             (PYTHON=python3 chooses the interpreter)
#     bash benchmarks/gpu.sh --dry-run OUT   prints the steps and runs none
# Leaves in OUT, after each step, the results of every benchmark that is done (attention.json,
# attention-sweep.json, conv_lstm.json, dense_crf.json, msst.json, mssa.json) and run.tar.gz with
# the log of every step, the CSV files and the plots: seven files and no folder.  From the JSON, CSV
# and SVG files in benchmarks/results/GPU/, `python -m benchmarks report` makes the tables.
# Needs torch with CUDA, triton, nvcc, ninja, einops, pytest, rich, matplotlib and, for
# the systems, torchvision, huggingface_hub, safetensors, opencv and scikit-image; runs the tests in
# several processes where pytest-xdist is there; installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=yes; shift; fi
out=${1:?usage: bash benchmarks/gpu.sh [--dry-run] OUT}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 VSOD_OPS_BUILD=cuda
run=$out  # for --dry-run; else a folder for what goes into run.tar.gz
failed=() companions=()

# step NAME SECONDS COMMAND...: runs it, and what was put beside it, under one time limit, at which
# it is interrupted as by Ctrl-C: pytest then still says what failed
step() {
  local name=$1 seconds=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $seconds s): $*"
  [ -n "$dry_run" ] && return
  timeout -s INT -k 3 "$seconds" "$@" >"$run/$name.log" 2>&1
  code=$?
  while [ -n "$(jobs -pr)" ] && [ $((SECONDS - start)) -lt "$seconds" ]; do sleep 1; done
  [ "${#companions[@]}" -eq 0 ] || kill "${companions[@]}" 2>/dev/null
  companions=()
  tail -n 12 "$run/$name.log"
  echo "== $name: exit code $code after $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || failed+=("$name")
  cp "$run"/*.json "$out" 2>/dev/null
  tar -czf "$out/run.tar.gz" -C "$run" --exclude=warm --exclude='*.json' .
}

# beside NAME COMMAND...: runs it during the next step; whether it ends well does not matter
beside() {
  local name=$1
  shift
  echo "== $name (during the next step): $*"
  [ -n "$dry_run" ] && return
  timeout 600 "$@" >"$run/$name.log" 2>&1 &  # passes the end on to all of its processes
  companions+=("$!")
}

if [ -z "$dry_run" ]; then
  mkdir -p "$out" && run=$(mktemp -d) || exit 1
  trap 'rm -rf "$run"' EXIT
  TORCH_CUDA_ARCH_LIST=$("$python" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
    echo "torch finds no GPU" >&2
    exit 1
  }
  export TORCH_CUDA_ARCH_LIST
fi
processes=()
"$python" -c 'import xdist' 2>/dev/null && processes=(-n 14 --maxschedchunk 1)

benchmark=("$python" -m benchmarks)
attention=(attention --device cuda --dtype bfloat16)
everyone=(--shape 4x5x28x28 --shape 4x5x14x14 --shape 1x5x28x28
  --baselines reference,sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,sdpa-math,padded,flex,varlen)
lengths=(--sweep --baselines reference,sdpa,sdpa-cudnn)
conv_lstm=(conv_lstm --device cuda --baselines eager,compile,pointwise-cl)

step build 70 "$python" setup.py build_ext --inplace
step doctor 10 "$python" -m vsod_ops.doctor
# The tests mostly wait for compilers; meanwhile what the rivals need compiled gets into the caches.
warm=(--seconds 0.001 --out "$run/warm")
beside warm-attention "${benchmark[@]}" "${attention[@]}" "${everyone[@]}" "${warm[@]}"
beside warm-conv_lstm "${benchmark[@]}" "${conv_lstm[@]}" "${warm[@]}"
step tests 180 "$python" -m pytest -q -m cuda --sweep 4 "${processes[@]}" tests
step attention 50 "${benchmark[@]}" "${attention[@]}" "${everyone[@]}" --seconds 0.3 --out "$run"
step attention-sweep 25 "${benchmark[@]}" "${attention[@]}" "${lengths[@]}" --seconds 0.5 \
  --out "$run"
step conv_lstm 60 "${benchmark[@]}" "${conv_lstm[@]}" --seconds 0.2 --out "$run"
step dense_crf 12 "${benchmark[@]}" dense_crf --device cuda --size 512x512 --seconds 2 --out "$run"
step msst 20 "${benchmark[@]}" msst --device cuda --precision bfloat16 --prior flow-magnitude \
  --full-resolution --seconds 3 --out "$run"
step mssa 35 "${benchmark[@]}" mssa --device cuda --precision bfloat16 --sizes 224 448 --seconds 1 \
  --out "$run"

if [ "${#failed[@]}" -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
[ -n "$dry_run" ] || echo "all steps passed; results are in $out"
