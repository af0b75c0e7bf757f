#!/usr/bin/env bash
# What only an NVIDIA GPU can show, in one go: the GPU tests, then engines of a checkpoint, checked and timed.
#
#   scripts/gpu_check.sh CKPT PHOTOS OUT       PHOTOS: at least 128, for parity and for calibrating INT8
#
# TOKENS="full visible:49" and PRECISIONS="fp16 int8" are the bundles of OUT/bundles; one that is there already is not
# exported again, so those of another machine (export --no-build) need no PyTorch here. OUT/benchmark.json holds what
# `mae-deploy benchmark` times, OUT/calls.json our calls beside TensorRT's bare one and PyTorch's.
set -euo pipefail
[ $# -eq 3 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
checkpoint=$(realpath "$1") photos=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mae_deploy="$python -m mae_deploy"
sizes='B:1,1,1; B:8,8,8; B:32,32,32'   # kernels are chosen for the usual size: a profile for each batch that is timed
mkdir -p "$out/bundles"

$python -m pytest -q -m gpu --confcutdir tests/gpu tests/gpu
for tokens in ${TOKENS:-full visible:49}; do
  for precision in ${PRECISIONS:-fp16 int8}; do
    bundle=$out/bundles/${tokens/:/-}-$precision
    calibration=()
    [ "$precision" != int8 ] && [ "$precision" != fp8 ] || calibration=(--calib-data "$photos" --calib-images 128)
    [ -d "$bundle" ] || $mae_deploy export "$checkpoint" --out "$bundle" --engine trt --no-build --tokens "$tokens" \
      --precision "$precision" --profile B:1,8,32 --samples "$photos" "${calibration[@]}" --device cuda
    # INT8 that is not faster than FP16 is an answer, not a failure: FP16 is kept in its place.
    $mae_deploy build-engine "$bundle" --profile "$sizes" --prefer fp16
    $mae_deploy verify "$bundle" --engine trt
  done
done
$mae_deploy benchmark "$out"/bundles/* --engine trt --batch-size 1,8,32 --repeats 100 --json > "$out/benchmark.json"
torch=()
! $python -c 'import torch' 2> /dev/null || torch=(--checkpoint "$checkpoint" --compile)
$python -m scripts.measure_gpu "$out"/bundles/*-fp16 "${torch[@]}" > "$out/calls.json"
