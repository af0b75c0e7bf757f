"""Follow a camera at the cost of what changes in a part of its frame.

    mae-deploy export runs/student --out bundles/cached --tokens cached
    python examples/camera.py bundles/cached --camera /dev/video0 --region 0,0.3,1,1

--camera takes whatever PyAV opens: a device of Video4Linux, a file, an RTSP address. Without it frames are made.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mae_deploy.runtime import Backbone
from mae_deploy.runtime.selection import Motion, Region


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="exported with --tokens cached")
    parser.add_argument("--camera", help="default: made frames")
    parser.add_argument("--region", default="0,0,1,1", help="left,top,right,bottom, in pixels or shares of the frame")
    parser.add_argument("--frames", type=int, help="stop after so many")
    given = parser.parse_args(arguments)

    region = Region(tuple(float(side) for side in given.region.split(",")))
    frames = made_frames() if given.camera is None else camera_frames(given.camera)
    with Backbone.load(given.bundle, crop_mode="squash") as backbone:  # squash: the model sees all of the frame
        stream = backbone.stream(select=Motion() & region)
        for index, frame in enumerate(itertools.islice(frames, given.frames)):
            seen = stream(frame)
            why = f"  {seen.event}" if seen.event else ""
            print(f"frame {index}: {len(seen.keep)} of {len(seen.age)} patches, cost {seen.cost:.2f}{why}")
            # seen.cls, seen.tokens and seen.pooled are of the whole frame: use them here.


def camera_frames(name: str) -> Iterator[Any]:
    import av  # pip install 'mae-deploy[video]'

    with av.open(name, format="v4l2" if name.startswith("/dev/video") else None) as source:
        for frame in source.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def made_frames() -> Iterator[Any]:
    background = np.random.default_rng(0).integers(60, 120, (240, 320, 3), np.uint8)
    for index in itertools.count():
        frame = background.copy()
        left = 4 * index % 260
        frame[90:150, left : left + 60] = (240, 180, 40)
        yield frame


if __name__ == "__main__":
    main()
