"""Frames of whatever FFmpeg opens, through PyAV: files, cameras and network streams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_deploy.errors import ConfigError, MaeDeployError, MissingDependency, import_optional
from mae_deploy.images.video_image import VideoImage
from mae_deploy.progress import notice
from mae_deploy.runtime.video.counts import Counts
from mae_deploy.runtime.video.options import VideoOptions

_MOST_CORRUPT = 1000
"""So many corrupt packets in a row are no video."""


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        MissingDependency: it is not installed.
    """
    return import_optional("av", extra="video")


class Reader:
    """An opened source."""

    def __init__(self, name: str, container: Any, counts: Counts) -> None:
        """Args: name: for messages."""
        self.name, self._container, self._counts = name, container, counts
        self._stream = container.streams.video[0]

    @property
    def has_end(self) -> bool:
        """Whether it is a recording, whose duration is known."""
        return self._container.duration is not None

    @property
    def rate(self) -> float | None:
        """Frames a second, where the source says."""
        rate = self._stream.average_rate
        return float(rate) if rate else None

    @property
    def num_frames(self) -> int | None:
        """How many frames there are, about; None where nothing says."""
        if self._stream.frames:
            return int(self._stream.frames)
        if self.rate is None or self._container.duration is None:
            return None
        return round(float(self._container.duration) / 1e6 * self.rate)

    def frames(self) -> Iterator[tuple[VideoImage, float | None, tuple[str, ...]]]:
        """Each frame, its time in seconds, and what happened since the one before. What cannot be decoded is
        skipped, counted, and said the first time.

        Raises:
            av.FFmpegError: the source broke.
        """
        av = import_av()
        corrupt, first = 0, None
        size: tuple[int, int] | None = None
        for packet in self._packets():
            if packet is None:
                corrupt += 1
                continue
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError as error:
                self._say_corrupt(error.strerror)
                corrupt += 1
                continue
            for frame in decoded:
                if frame.is_corrupt:
                    self._say_corrupt("a frame is incomplete")
                    corrupt += 1
                    continue
                events: tuple[str, ...] = ()
                if corrupt:
                    events = (f"{corrupt} corrupt packet{'s' * (corrupt != 1)} skipped",)
                corrupt = 0
                if size is not None and size != (frame.width, frame.height):
                    self._counts.resized += 1
                    events += (f"frames are {frame.width}x{frame.height} from here on, not {size[0]}x{size[1]}",)
                    notice("size:", f"{self.name}: {events[-1]}")
                size = (frame.width, frame.height)
                if first is None:
                    first = frame.time
                time = None if frame.time is None or first is None else frame.time - first
                yield VideoImage(frame, rotation=frame.rotation), time, events

    def close(self) -> None:
        """Let go of the file or the device."""
        self._container.close()

    def _packets(self) -> Iterator[Any]:
        """Packets of the video; None for one that could not be read."""
        invalid = import_av().error.InvalidDataError
        packets = self._container.demux(self._stream)
        broken = 0
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except invalid as error:
                broken += 1
                if broken > _MOST_CORRUPT:
                    raise
                self._say_corrupt(error.strerror)
                packets = self._container.demux(self._stream)
                yield None
            else:
                broken = 0
                yield packet

    def _say_corrupt(self, reason: str) -> None:
        if not self._counts.corrupt:
            notice("corrupt:", f"{self.name}: a packet was skipped ({reason}); further ones are counted")
        self._counts.corrupt += 1


def open_reader(name: str, place: str, form: str | None, options: VideoOptions, counts: Counts) -> Reader:
    """Open a source.

    Args:
        name: as the user called it.
        place: file, URL or device.
        form: of a device, its FFmpeg format.

    Raises:
        ConfigError: a file that is no video, or has none in it.
        MaeDeployError: a URL that cannot be read.
        MissingDependency: PyAV, or a camera that is not there.
    """
    av = import_av()
    given = {"rtsp_flags": "prefer_tcp"} if place.startswith("rtsp") else {}
    timeout = options.timeout if "://" in place or form else None
    try:
        container = av.open(place, format=form, options=given, timeout=timeout)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = reason_of(error, options)
        if form is not None:
            raise MissingDependency(f"the camera {name} cannot be opened: {reason}", hint=_cameras()) from error
        if "://" in place:
            raise MaeDeployError(f"{name} cannot be read: {reason}") from error
        raise ConfigError(
            f"{name} is no video: {reason}", hint="a source is a video, images, a camera or a URL"
        ) from error
    if not container.streams.video:
        container.close()
        raise ConfigError(f"{name} has no video in it")
    return Reader(name, container, counts)


def reason_of(error: Exception, options: VideoOptions) -> str:
    """Why a source broke, in words."""
    if isinstance(error, import_av().error.ExitError):  # which FFmpeg calls "Immediate exit requested"
        return f"nothing came for {options.timeout:g} s"
    return getattr(error, "strerror", None) or str(error)


def _cameras() -> str:
    there = sorted(str(path) for path in itertools.islice(Path("/dev").glob("video*"), 8))
    return f"there are: {', '.join(there)}" if there else "there is no camera"
