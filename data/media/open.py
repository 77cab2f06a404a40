"""Opens media files: only container formats, never another file or the network; every failure is a DataError."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from data.errors import DataError

# Demuxers of libavformat that read frames with timestamps out of one file. Left out with purpose: everything that
# opens other files by what it reads (concat, hls, dash, image2, ...), devices, and bare pictures without timestamps.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "gxf", "nut", "rm",
    "wtv", "dv", "ivf", "yuv4mpegpipe", "gif", "wav", "w64", "mp3", "aac", "flac", "aiff", "caf", "au", "amr", "ac3",
    "eac3", "wv", "ape", "tta",
)  # fmt: skip


def open_container(path: Path, only: int | None = None) -> Any:
    """An av container for reading. only: index of the one stream whose packets are wanted. av.FFmpegError, OSError."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    container = av.open(f"file:{path}", container_options=options, metadata_errors="replace")
    for stream in container.streams:
        if only is not None and stream.index != only:
            stream.discard = av.stream.Discard.all  # its bytes are not even read
        elif stream.type in ("video", "audio"):
            stream.codec_context.thread_count = 1  # workers are processes
    return container


@contextlib.contextmanager
def as_data_error(path: Path) -> Iterator[None]:
    """What decoding raises (FFmpegError, ValueError, MemoryError, ... of many kinds) is this file's verdict."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        words = (str(error).splitlines() or [""])[0][:200].replace(f"file:{path}", path.name)
        reason = f"{type(error).__name__}: {words}" if words.strip() else type(error).__name__
        raise DataError(f"{path} can't be decoded ({reason})") from error


def truncated(path: Path, what: str, declared: str, decoded: str) -> DataError:
    """A file holds less than it declares."""
    return DataError(f"{path} is truncated: its {what} declares {declared}, {decoded} could be decoded; get it again")
