"""Pretrain a masked autoencoder on a folder of images, and look at what it predicts at three mask ratios.

    python examples/pretrain_and_look.py photos --out runs/first --epochs 100 --batch-size 64

Further options are those of `mae-deploy pretrain`. The same command goes on where a killed run was. Pictures:
runs/first/hidden-50.png, -75 and -90.
"""

import argparse
from pathlib import Path

from mae_deploy.cli import main as mae_deploy


def main(arguments: list[str] | None = None) -> int:
    """0, or the exit code of the command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="any tree of images; no labels")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    given, options = parser.parse_known_args(arguments)

    code = mae_deploy(["pretrain", str(given.photos), "--out", str(given.out), *options, "--resume"])
    for percent in (50, 75, 90):
        picture = given.out / f"hidden-{percent}.png"
        if code == 0 and not picture.exists():
            look = ["--checkpoint", str(given.out), "--mask-ratio", str(percent / 100), "--num-images", "6"]
            code = mae_deploy(["reconstruct", str(given.photos), *look, "--out", str(picture)])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
