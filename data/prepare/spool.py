"""The results of a file, window by window, on their way from the process that made them to the one that stores them.

They are in a file of the unit's folder, so that neither process holds more than one window, whatever the length of the
film. A record is a line of json, with the sizes of what follows, and then the bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data.clip import Bucket
from data.errors import DataError

REMEDY = "free space, then run the same command again: it resumes"


class OutputError(DataError):
    """The output cannot be written (a full disk), which is no fault of any file. It ends the work; a restart resumes
    it."""


@dataclass
class Thumbnail:
    """What the report shows of a window: a JPEG (b"" without picture), peaks of the sound (0 to 1)."""

    jpeg: bytes
    peaks: list[float]


@dataclass
class EncodedWindow:
    """An encoded window: the two members of its sample, and their bucket."""

    tensors: bytes
    meta: bytes
    bucket: Bucket


@dataclass
class WindowResult:
    """What one window gave. row: as in data.windows.table; segment: its number in the file; sample: None when it is not
    stored;
    thumbnail: of the first windows."""

    row: dict[str, Any]
    segment: int = 0
    sample: EncodedWindow | None = None
    thumbnail: Thumbnail | None = None

    @property
    def rejected(self) -> str:
        """Why the window is not stored, "" when it is."""
        return "" if self.row["stored"] else self.row["reason"] or f"filtered: fails {self.row['failed']}"


@dataclass
class FileResult:
    """What one file gave beside its windows. rejected: why the whole file is refused, or ""; then no window counts.

    refused: (start or None, reason) of segments without a window, and of windows that another one has given already;
    windows: how many there are; span: seconds of the file; rest_seconds: what no window covers; cpu: seconds by stage;
    sha256: of the content, "" where it is not known.
    """

    rejected: str = ""
    refused: list[tuple[float | None, str]] = field(default_factory=list)
    windows: int = 0
    span: float = 0.0
    rest_seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    sha256: str = ""


class Spool:
    """Takes the windows of one file. A context manager. OutputError when the disk is full."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "wb")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"{path} can't be written ({error.strerror}); {REMEDY}") from error

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()  # writes what is left
        except OSError as failure:
            raise OutputError(f"{self.path} can't be written ({failure.strerror}); {REMEDY}") from failure

    def add(self, window: WindowResult) -> None:
        """Append one window."""
        sample, thumbnail = window.sample, window.thumbnail
        parts = [sample.tensors, sample.meta] if sample else []
        parts += [thumbnail.jpeg] if thumbnail else []
        head = {
            "row": window.row,
            "segment": window.segment,
            "bucket": sample.bucket.to_dict() if sample else None,
            "peaks": thumbnail.peaks if thumbnail else None,
            "sizes": [len(part) for part in parts],
        }
        try:
            self._file.write(json.dumps(head).encode() + b"\n")
            for part in parts:
                self._file.write(part)
        except OSError as error:
            raise OutputError(f"{self.path} can't be written ({error.strerror}); {REMEDY}") from error


def read_spool(path: Path) -> Iterator[WindowResult]:
    """The windows of a file in order, one at a time."""
    with open(path, "rb") as file:
        while line := file.readline():
            head = json.loads(line)
            parts = [file.read(size) for size in head["sizes"]]
            sample = None
            if head["bucket"] is not None:
                sample = EncodedWindow(parts[0], parts[1], Bucket.from_dict(head["bucket"]))
            thumbnail = Thumbnail(parts[-1], head["peaks"]) if head["peaks"] is not None else None
            yield WindowResult(head["row"], head["segment"], sample, thumbnail)
