#!/usr/bin/env bash
# Compare the listings in tests/packaging/tensorrt_api/ with TensorRT's real Python bindings, and try what we derive from the library on them.
# No GPU: the bindings are imported over stub libraries.
#
#   scripts/check_tensorrt_api.sh [--record] [VERSION ...]
#
# --record writes the listings instead. Without versions: those whose bindings are a small wheel. 8.6.0 comes with all of TensorRT (819 MB), and
# needs a CPython 3.10 with NumPy and Pillow, which PYTHON310 names. Exit code 3: the bindings cannot be had here, or gcc or readelf is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

record=
if [ "${1:-}" = --record ]; then record=1; shift; fi
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(10.3.0 10.16.1.11 11.4.0.106)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for tool in gcc readelf; do command -v "$tool" >/dev/null || { echo "this needs $tool"; exit 3; }; done

for version in "${versions[@]}"; do
  package=tensorrt-cu12-bindings
  run=.venv/bin/python
  if [[ $version == 8.* ]]; then package=tensorrt run=${PYTHON310:?the path of a CPython 3.10 with NumPy and Pillow}; fi
  "$run" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder/$version" "$package==$version" ||
    { echo "$package $version cannot be downloaded here"; exit 3; }
  "$run" - "$folder/$version" <<'PY'
import sys, zipfile
from pathlib import Path
folder = Path(sys.argv[1])
archive = zipfile.ZipFile(next(folder.glob("*.whl")))
for name in archive.namelist():
    top, _, rest = name.partition("/")
    if top in ("tensorrt", "tensorrt_bindings") and (rest.endswith(".py") or rest == "tensorrt.so"):
        (folder / "tensorrt" / rest).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tensorrt" / rest).write_bytes(archive.read(name))
PY
  rm "$folder/$version"/*.whl
  for library in $(readelf -d "$folder/$version/tensorrt/tensorrt.so" | grep -o 'libnv[a-z_]*\.so\.[0-9]*'); do
    gcc -shared -fPIC -Wl,-soname,"$library" -o "$folder/$version/tensorrt/$library" scripts/tensorrt_stubs.c
  done
  listing=tests/packaging/tensorrt_api/$version.json
  PYTHONPATH=$folder/$version "$run" scripts/record_tensorrt_api.py >"$folder/listing.json"
  if [ -n "$record" ]; then
    cp "$folder/listing.json" "$listing"
  else
    diff "$listing" "$folder/listing.json" || { echo "$listing is not what the bindings have; record it again: $0 --record $version"; exit 1; }
  fi
  PYTHONPATH=$folder/$version:. "$run" scripts/try_tensorrt_api.py
done
