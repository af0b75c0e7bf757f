"""Frames of a video file, a folder of images, a camera or a network stream, one after the other."""

from mae_deploy.runtime.video.frame import Frame
from mae_deploy.runtime.video.source import SourceLost, Video, open_video

__all__ = ["Frame", "SourceLost", "Video", "open_video"]
