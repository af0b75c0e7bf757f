#!/usr/bin/env bash
# What only an NVIDIA GPU can show, in one go: the GPU tests, then engines of a checkpoint, checked and timed.
#
#   scripts/gpu_check.sh CKPT PHOTOS OUT [options]   PHOTOS: at least 128, for parity and for calibrating INT8
#
#   --budget SECONDS          for all of it; a step gets what is left at most, and what gets nothing is named [3600]
#   --tokens "MODE..."        bundles of OUT/bundles, for each of the precisions ["full visible:49"]
#   --engine trt|trt-rtx      TensorRT, or TensorRT for RTX, on GPUs that it supports [trt]
#   --precisions "P..."       ["fp16 int8", of trt-rtx "fp16"]
#   --profiles SIZES          one for each batch that is timed: kernels are chosen for it ["B:1,1,1; B:8,8,8; B:32,32,32"]
#   --optimization-level N    of TensorRT's builder: 0 builds fastest [its own default]
#   --typing auto|weak|strong of the graphs: weak for TensorRT 8.6, where another machine exports [auto]
#   --dry-run                 without a GPU: tests are only collected, bundles run on ONNX Runtime, nothing is built
#
# Each step's whole output is OUT/logs/STEP.log, its time and exit status a line here. A step that was done is not done
# again, so a call that was cut goes on; a bundle that is there (export --no-build, on another machine) is not exported,
# and needs no PyTorch here. OUT/benchmark.json holds what `mae-deploy benchmark` times, OUT/calls.json our calls beside
# TensorRT's bare ones and PyTorch's. PYTHON: the interpreter. Exit status: 1 where a
# step failed, ran out of time or had none, 3 without a GPU or TensorRT.
set -uo pipefail
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
budget=3600 tokens="full visible:49" engine=trt precisions="" profiles="B:1,1,1; B:8,8,8; B:32,32,32" level=() typing=() dry=
[ $# -ge 3 ] || usage
checkpoint=$(realpath "$1") photos=$(realpath "$2") out=$(realpath -m "$3")
shift 3
while [ $# -ge 1 ]; do
  [ "$1" != --dry-run ] || { dry=yes; shift; continue; }
  [ $# -ge 2 ] || usage
  case $1 in
    --budget) budget=$2 ;;
    --tokens) tokens=$2 ;;
    --engine) engine=$2 ;;
    --precisions) precisions=$2 ;;
    --profiles) profiles=$2 ;;
    --optimization-level) level=(--optimization-level "$2") ;;
    --typing) typing=(--typing "$2") ;;
    *) usage ;;
  esac
  shift 2
done
case $engine in
  trt) load="from mae_deploy.runtime.tensorrt.api import load_tensorrt as load" all="fp16 int8" ;;
  trt-rtx) load="from mae_deploy.runtime.tensorrt.rtx import load_rtx as load" all=fp16 ;;
  *) usage ;;
esac
precisions=${precisions:-$all}
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python} failed=0 build_limit=$((600 + 300 * $(tr -cd ';' <<<"$profiles" | wc -c)))
export PYTHONUNBUFFERED=1
mkdir -p "$out/bundles" "$out/logs"

step() { # NAME LIMIT COMMAND...: 0 where it is done, now or before; its output on stdout is also OUT/logs/NAME.out
  local name=$1 limit=$2 log=$out/logs/$1.log left=$((budget - SECONDS)) start=$SECONDS status=0
  shift 2
  [ ! -e "$out/logs/$name.done" ] || { echo "$name: done before"; return 0; }
  [ "$left" -gt 5 ] || { echo "$name: left out, the budget of $budget s is spent"; failed=1; return 1; }
  [ "$limit" -le "$left" ] || limit=$left
  echo "+ $*" >"$log"
  timeout --signal TERM --kill-after 10 "$limit" "$@" 2>>"$log" >"$out/logs/$name.out" || status=$?
  cat "$out/logs/$name.out" >>"$log"
  case $status in
    0) touch "$out/logs/$name.done"; echo "$name: $((SECONDS - start)) s" ;;
    124 | 137) failed=1; echo "$name: stopped after $limit s: $log" ;;
    *) failed=1; echo "$name: exit status $status after $((SECONDS - start)) s: $log"; tail -n 5 "$log" | sed 's/^/    /' ;;
  esac
  return $status
}

runs_on=$engine collect=() timed=(--batch-size 1,8,32 --repeats 100)
[ -z "$dry" ] || { runs_on=onnxruntime collect=(--collect-only) timed=(--batch-size 1 --repeats 1 --warmup 0); }
[ -n "$dry" ] || step gpu 60 "$python" -c "$load; api = load(); print(api.title, api.gpu)" || exit 3
step tests 900 "$python" -m pytest -q -rfE -p no:cacheprovider -m gpu "${collect[@]}" --confcutdir tests/gpu tests/gpu
for mode in $tokens; do
  for precision in $precisions; do
    name=${mode/:/-}-$precision bundle=$out/bundles/${mode/:/-}-$precision
    calibration=()
    [ "$precision" != int8 ] && [ "$precision" != fp8 ] || calibration=(--calib-data "$photos" --calib-images 128)
    [ -d "$bundle" ] || step "export-$name" 900 "$python" -m mae_deploy export "$checkpoint" --out "$bundle" --engine $engine \
      --no-build --tokens "$mode" --precision "$precision" "${typing[@]}" --profile B:1,8,32 --samples "$photos" \
      "${calibration[@]}" --device auto || continue
    # INT8 that is not faster than FP16 is an answer, not a failure: FP16 is kept in its place.
    [ -n "$dry" ] || step "build-$name" $build_limit "$python" -m mae_deploy build-engine "$bundle" --engine $engine --profile "$profiles" "${level[@]}" \
      --prefer fp16 || continue
    step "verify-$name" 300 "$python" -m mae_deploy verify "$bundle" --engine $runs_on
  done
done
shopt -s nullglob
bundles=("$out"/bundles/*) halves=("$out"/bundles/*-fp16) torch=()
! "$python" -c 'import torch' 2>/dev/null || torch=(--checkpoint "$checkpoint" --compile)
if [ ${#bundles[@]} -gt 0 ] && step benchmark 600 "$python" -m mae_deploy benchmark "${bundles[@]}" --engine $runs_on \
  "${timed[@]}" --json; then cp "$out/logs/benchmark.out" "$out/benchmark.json"; fi
# Calls are compared with TensorRT's bare ones, which of TensorRT for RTX are others.
if [ -z "$dry" ] && [ $engine = trt ] && [ ${#halves[@]} -gt 0 ] && step calls 600 "$python" -m scripts.measure_gpu "${halves[@]}" "${torch[@]}"; then
  cp "$out/logs/calls.out" "$out/calls.json"
fi
[ -z "$dry" ] || step calls 60 "$python" -m scripts.measure_gpu --help
exit $failed
