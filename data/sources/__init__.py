"""The sources of a dataset: files, each with its segments, their captions and their scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class SourceSegment:
    """A part of a file with its own caption.

    span: (start, end) in seconds on the file's clock, None for the whole file; captions: all that it has, the first of
    them counts; scores: numeric columns of its row in the manifest; reason: why the row is refused, or "".
    """

    span: tuple[float, float] | None = None
    captions: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class SourceFile:
    """One source file. name: its path below the source folder; reason: why it is refused before it is opened, or "".

    size: bytes; segments: one, the whole file, unless a manifest names several; sha256: of the content, "" = not known.
    """

    path: Path | str  # on disk, or an address
    name: str
    size: int = 0
    segments: list[SourceSegment] = field(default_factory=lambda: [SourceSegment()])
    sha256: str = ""
    reason: str = ""
