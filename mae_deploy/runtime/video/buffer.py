"""Decoded frames on their way from the thread that decodes to the one that computes: a bounded queue."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Generator, Iterator

from mae_deploy.progress import notice
from mae_deploy.runtime.video.counts import Counts
from mae_deploy.runtime.video.frame import Frame
from mae_deploy.runtime.video.options import OnFull

_PATIENCE = 1.0
"""Seconds that `close` waits for the thread: a read of a camera that says nothing cannot be broken off."""


class Buffer:
    """A thread that reads ahead by at most so many frames; iterate over what it read."""

    def __init__(
        self,
        frames: Generator[Frame, None, None],
        size: int,
        on_full: OnFull,
        counts: Counts,
        name: str,
        changed: threading.Condition,
    ) -> None:
        """Args: changed: is told of every frame and of the end; several buffers may share one."""
        self._frames, self._size, self._on_full, self._counts, self._name = frames, size, on_full, counts, name
        self._waiting: deque[Frame] = deque()
        self._changed = changed
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="video", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.ready)
                if not self._waiting or self._closed:
                    break
                frame = self._waiting.popleft()
                self._changed.notify_all()
            yield frame
        if self._error is not None:
            raise self._error

    @property
    def ready(self) -> bool:
        """Whether a frame is there, or no more will come."""
        return bool(self._waiting) or self._ended or self._closed

    def stop(self) -> None:
        """End the frames; what waits for one goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading."""
        self.stop()
        self._thread.join(_PATIENCE)

    def _fill(self) -> None:
        try:
            for frame in self._frames:
                if not self._put(frame):
                    break
        except BaseException as error:
            self._error = error
        finally:
            self._frames.close()  # which lets go of the device
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        """Whether more is wanted."""
        with self._changed:
            if self._on_full == "wait":
                self._changed.wait_for(lambda: len(self._waiting) < self._size or self._closed)
            elif len(self._waiting) >= self._size:
                frame = self._without_oldest(frame)
            self._waiting.append(frame)
            self._changed.notify_all()
            return not self._closed

    def _without_oldest(self, frame: Frame) -> Frame:
        """Make room: the frame behind the dropped one tells of it."""
        if not self._counts.dropped:
            notice("dropped:", f"{self._name}: frames come faster than they are computed; the oldest are dropped")
        self._counts.dropped += 1
        oldest = self._waiting.popleft()
        after = self._waiting.popleft() if self._waiting else frame
        told = dataclasses.replace(
            after, dropped=after.dropped + oldest.dropped + 1, events=oldest.events + after.events
        )
        if after is frame:
            return told
        self._waiting.appendleft(told)
        return frame
