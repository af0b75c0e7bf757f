"""Does somebody's ONNX file compute what our checkpoint computes? Their graph, our PyTorch reference.

    mae-deploy export runs/mae --out bundles/reference --tokens full
    python examples/verify_their_onnx.py bundles/reference theirs.onnx

The bundle holds images and what PyTorch made of them, so this needs no PyTorch; where PyTorch is, `mae-deploy verify
runs/mae --graph theirs.onnx` does more. Their file takes one input, normalised float images (B, C, H, W); each of its
outputs is compared with that of ours which has its name, or else its shape. Exit code 1 where one misses the tolerance.
"""

import argparse
from pathlib import Path

from mae_deploy.runtime import Bundle
from mae_deploy.runtime.parity.compare import Comparison, compare
from mae_deploy.runtime.registry import open_graph
from mae_deploy.runtime.tolerance import TOLERANCES


def main(arguments: list[str] | None = None) -> int:
    """0 where all outputs agree, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("graph", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    given = parser.parse_args(arguments)

    golden = Bundle.load(given.bundle).golden()
    with open_graph(given.graph, given.engine) as engine:
        if len(engine.input_names) != 1:
            raise SystemExit(f"{given.graph} takes {', '.join(engine.input_names)}; one input of images is wanted")
        theirs = engine.run({engine.input_names[0]: golden["images"]})

    ours = Bundle.load(given.bundle).output_names
    failures = []
    for name, found in theirs.items():
        twin = name if name in ours else next((own for own in ours if golden[own].shape == found.shape), None)
        if twin is None:
            failures.append(f"{name}: none of ours has its shape {found.shape}")
            continue
        comparison: Comparison = compare(golden[twin], found, name)
        failures += comparison.failures(TOLERANCES["fp32"])
        print(f"{name} as {twin}: cosine {comparison.cosine:.7f}, SQNR {comparison.sqnr_db:.1f} dB")
    print("\n".join(failures) or f"{given.graph} computes what {given.bundle} was exported from")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
