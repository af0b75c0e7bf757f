"""Files whose changes Atheris chooses by the code that they reach, for what reads them.

Run: python -m tests.hostile.guided TARGET [-max_total_time=180] [-seed=1], and more of libFuzzer's options; it ends
with the first file that is met by an error that is not ours, and writes it to the working folder. TARGET is one of
`tests.hostile.fuzz`.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    atheris = importlib.import_module("atheris")
except ImportError:
    sys.exit("error: Atheris is not installed\nhint: pip install atheris==3.0.0, on Linux with Python 3.11 to 3.13")

with atheris.instrument_imports(include=["mae_deploy"]):
    from tests.hostile.fuzz import TARGETS, contents_of, refusals


def main() -> None:
    """Never returns."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"error: which of {', '.join(TARGETS)}?")
    target = sys.argv[1]
    name, _, read = TARGETS[target]
    with TemporaryDirectory() as folder:
        corpus, path = Path(folder) / "corpus", Path(folder) / name
        corpus.mkdir()
        for number, (_, content) in enumerate(contents_of(target, Path(folder))):
            (corpus / str(number)).write_bytes(content)

        def read_one(content: bytes) -> None:
            path.write_bytes(content)
            with suppress(*refusals(target)):
                read(path)

        atheris.Setup([sys.argv[0], "-max_len=100000", *sys.argv[2:], str(corpus)], read_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
