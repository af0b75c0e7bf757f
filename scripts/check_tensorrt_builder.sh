#!/usr/bin/env bash
# Read and build every kind of graph that the exporter writes with NVIDIA's own parser and builder: TensorRT for RTX, which needs no GPU.
# Its wheels (147 MB) are fetched once into $MAE_DEPLOY_CACHE, by default ~/.cache/mae-deploy. NVIDIA's licence is theirs: nothing of it is kept here.
#
#   scripts/check_tensorrt_builder.sh [pytest's arguments]      Exit code 3: the wheels cannot be had here
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
packages=(tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0)
version=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
folder=${MAE_DEPLOY_CACHE:-$HOME/.cache/mae-deploy}/tensorrt-rtx-1.7.1-$version
if [ ! -d "$folder" ]; then
  echo "fetching TensorRT for RTX (147 MB) into $folder"
  mkdir -p "$(dirname "$folder")"
  aside=$(mktemp -d "$folder.XXXXXX")
  trap 'rm -rf "$aside"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --target "$aside" "${packages[@]}" ||
    { echo "TensorRT for RTX cannot be fetched here"; exit 3; }
  mv "$aside" "$folder"
fi
PYTHONPATH=$PWD:$folder OMP_NUM_THREADS=1 exec "$python" -m pytest --no-header -q --numprocesses=logical --maxprocesses=4 "$@" tests/builder
