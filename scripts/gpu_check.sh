#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can show, in one command: GPU tests, TensorRT engines of ViT-T/S/B/L/H, parity, speed, a report in docs/results/.
# Runs what this machine has the packages for, and goes on where it was cut; see scripts/gpu_check.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
exec "$python" -m scripts.gpu_check "$@"
