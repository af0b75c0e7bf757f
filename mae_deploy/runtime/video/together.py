"""Frames of several sources, each as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from mae_deploy.errors import MaeDeployError
from mae_deploy.runtime.video.frame import Frame
from mae_deploy.runtime.video.source import Video


def together(
    videos: Sequence[Video], ended: Callable[[int, MaeDeployError | None], None]
) -> Iterator[dict[int, Frame]]:
    """The next frame of each source that has one, by the source's number, until the last source has ended.

    A source that has an end, and whose frames all count, gives one each time; a live one gives one where one waits, and
    none of them keeps the others waiting.

    Args:
        ended: told of a source that has ended, and of why, where it broke off; the others go on.
    """
    changed = threading.Condition()
    for video in videos:
        video.changed = changed
    open_ones = {number: iter(video) for number, video in enumerate(videos)}
    while open_ones:
        with changed:
            changed.wait_for(lambda: any(videos[number].ready for number in open_ones))
        found: dict[int, Frame] = {}
        for number in [number for number in open_ones if videos[number].ready]:
            reason = None
            try:
                if (frame := next(open_ones[number], None)) is not None:
                    found[number] = frame
                    continue
            except MaeDeployError as error:
                reason = error
            del open_ones[number]
            ended(number, reason)
        if found:
            yield found
