"""A source of frames by its name: a video file, images, a camera's number, or a URL."""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mae_deploy.errors import MaeDeployError
from mae_deploy.images.find import is_image_file
from mae_deploy.images.read import read_image
from mae_deploy.progress import notice
from mae_deploy.runtime.video.buffer import Buffer
from mae_deploy.runtime.video.counts import Counts
from mae_deploy.runtime.video.decode import Reader, import_av, open_reader, reason_of
from mae_deploy.runtime.video.frame import Frame
from mae_deploy.runtime.video.options import OnFull, VideoOptions
from mae_deploy.runtime.video.pictures import Pictures

if TYPE_CHECKING:
    from typing_extensions import Self

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
"""FFmpeg's format of a camera, and how it calls the one of a number (on Windows, of a name)."""

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
"""Seconds before a lost source is tried again; each time twice as long."""

Raw = tuple[Any, float | None, tuple[str, ...]]
"""Image, time and events, as readers give them."""


class SourceLost(MaeDeployError):
    """A live source broke off and did not come back."""


def open_video(source: str | os.PathLike[str], *, read: Callable[[Path], Any] | None = None, **options: Any) -> Video:
    """Open a source of frames; a context manager to iterate over.

    Args:
        source: a video file; a folder of images, a pattern such as 'frames/*.png' or one image, taken in the order of
            the numbers in their names; a camera's number or device; an RTSP, HTTP or other URL. What is there as a file
            or folder always stands for itself.
        read: how an image file is read, such as `backbone.read`; default: as 8-bit RGB.
        options: see `VideoOptions`.

    Raises:
        ConfigError: no such source, no video, or no image in it.
        MaeDeployError: a URL that cannot be read.
        MissingDependency: PyAV is not installed, or there is no such camera.
    """
    return Video(str(source), VideoOptions(**options), read or read_image)


class Video:
    """An opened source: iterate over its frames once.

    A live source (a camera, or a stream without an end) is decoded in a thread of its own, up to `queue` frames ahead.
    """

    def __init__(self, source: str, options: VideoOptions, read: Callable[[Path], Any]) -> None:
        self.name, self.options = source, options
        self.counts = Counts()
        """What has happened until now."""
        self.changed = threading.Condition()
        """Is told of every frame that is read ahead; several sources may share one."""
        self._stop = threading.Event()
        self._buffer: Buffer | None = None
        self._place, self._form = _device(source)
        if self._form is None and "://" not in source and _is_images(source):
            self._reader: Reader | Pictures = Pictures(source, read, self.counts)
        else:
            self._reader = self._open()
        self.live = isinstance(self._reader, Reader) and ("://" in source or self._form is not None)
        if isinstance(self._reader, Reader) and self._reader.has_end:
            self.live = False
        self._on_full: OnFull = options.on_full or ("drop-oldest" if self.live else "wait")

    @property
    def num_frames(self) -> int | None:
        """How many frames will come, about; None where nothing says."""
        count = len(self._reader.paths) if isinstance(self._reader, Pictures) else self._reader.num_frames
        most = self.options.max_frames
        count = None if count is None or self.live else -(-count // self.options.every)
        return most if count is None else min(count, most or count)

    @property
    def rate(self) -> float | None:
        """Frames a second of the source, those that are left out too; None where nothing says."""
        return None if isinstance(self._reader, Pictures) else self._reader.rate

    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            CheckFailed: no image can be read.
            SourceLost: a live source broke off and did not come back.
        """
        decoded = self._frames()
        ahead = self.live or self._on_full == "drop-oldest"
        frames = iter(self._buffered(decoded)) if ahead else decoded
        return itertools.islice(frames, self.options.max_frames)

    @property
    def ready(self) -> bool:
        """Whether the next frame, or the end, is there or only needs to be decoded: none is waited for."""
        return self._buffer is None or self._buffer.ready

    def stop(self) -> None:
        """End the frames, from another thread or a signal: an iteration that waits for one ends."""
        self._stop.set()
        if self._buffer is not None:
            self._buffer.stop()

    def close(self) -> None:
        """Stop, and let go of the source."""
        self.stop()
        if self._buffer is not None:
            self._buffer.close()
        else:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _buffered(self, frames: Generator[Frame, None, None]) -> Buffer:
        self._buffer = Buffer(frames, self.options.queue, self._on_full, self.counts, self.name, self.changed)
        return self._buffer

    def _frames(self) -> Generator[Frame, None, None]:
        """Every so many-th frame, with the events of those between."""
        started: float | None = None
        told: tuple[str, ...] = ()
        try:
            for index, (image, at, events) in enumerate(self._connected() if self.live else self._whole()):
                if self._stop.is_set():
                    return
                if self.live:
                    now = time.monotonic()
                    started = now if started is None else started
                    at = now - started
                told += events
                if index % self.options.every == 0:
                    yield Frame(index=index, time=at, image=image, events=told)
                    told = ()
        finally:
            self._reader.close()

    def _whole(self) -> Iterator[Raw]:
        """A recording, up to its end or to where it breaks."""
        if isinstance(self._reader, Pictures):
            yield from self._reader.frames()
            return
        empty = True
        try:
            for raw in self._reader.frames():
                empty = False
                yield raw
        except import_av().FFmpegError as error:
            raise MaeDeployError(f"{self.name} breaks off: {reason_of(error, self.options)}") from error
        if empty:
            raise MaeDeployError(f"{self.name} has no frame that can be decoded")

    def _connected(self) -> Iterator[Raw]:
        """A live source, opened again where it is lost."""
        tries = 0
        events: tuple[str, ...] = ()
        while True:
            reason = "it ended"
            try:
                assert isinstance(self._reader, Reader)
                for image, at, told in self._reader.frames():
                    yield image, at, events + told
                    tries, events = 0, ()
            except import_av().FFmpegError as error:
                reason = reason_of(error, self.options)
            self._reader.close()
            self.counts.lost += 1
            while True:
                if tries == self.options.reconnect:
                    if not tries:
                        notice("lost:", f"{self.name}: {reason}")
                        return
                    raise SourceLost(
                        f"{self.name} is lost: {reason}", hint="--reconnect says how often a lost source is tried again"
                    )
                wait = min(_FIRST_WAIT * 2**tries, _LONGEST_WAIT)
                tries += 1
                notice("lost:", f"{self.name}: {reason}; try {tries} of {self.options.reconnect} in {wait:g} s")
                if self._stop.wait(wait):
                    return
                try:
                    self._reader = self._open()
                except MaeDeployError as error:
                    reason = str(error).removeprefix(f"{self.name} ")
                else:
                    break
            events += (f"lost ({reason}) and found again",)
            notice("found again:", self.name)

    def _open(self) -> Reader:
        return open_reader(self.name, self._place, self._form, self.options, self.counts)


def _device(source: str) -> tuple[str, str | None]:
    """What FFmpeg opens, and its format for a camera."""
    form, place = _CAMERAS.get(sys.platform, _CAMERAS["linux"])
    if re.fullmatch(r"\d+", source) and not os.path.exists(source):
        return place.format(source), form
    if source.startswith("/dev/video"):
        return source, form
    return source if "://" in source else os.path.abspath(source), None


def _is_images(source: str) -> bool:
    """Whether it is a folder, a pattern, a list, an image, or nothing at all, which whoever looks for images says."""
    path = Path(source)
    if not path.is_file():  # a pipe is left to FFmpeg: a look at its first bytes would take them away
        return not path.exists() or path.is_dir()
    return is_image_file(path) and path.suffix.lower() != ".gif"
