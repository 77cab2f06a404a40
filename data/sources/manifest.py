"""Reads a manifest: a CSV, TSV, JSONL or Parquet file that names files, or segments of them, with their captions.

Columns that have a meaning (names of the file's own are given by `columns`, {path: video, start: begin}):

    path      relative to the manifest's folder, absolute, or an address
    caption   words, or a list of them
    start, end, seconds   a segment [start, end) or [start, start + seconds): seconds, or times such as 0:01:02.500
    segments  a pair of times, or a list of pairs; then `caption` and scores may be lists with one entry for each

All others whose cells are numbers are scores. Rows are read one after another and never held together.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sources.captions import MARK, captions_of, list_in
from data.sources.cells import Cells, TableLayout
from data.sources.times import span_of
from data.sources.verdict import name_of

MEANINGS = ("path", "caption", "start", "end", "seconds", "segments")
NO_SCORES = (  # columns of data.prepare's own tables: they are no scores where such a table comes back as a manifest
    "key", "source", "source_sha256", "frames", "height", "width", "kind", "has_video", "has_audio", "part", "stored",
    "failed", "reason", "unmeasured", *MEANINGS,
)  # fmt: skip


@dataclass
class ManifestRow:
    """A segment that a manifest names. number: of its row, from 1; reason: why it can't be used, or ""."""

    name: str
    number: int
    span: tuple[float, float] | None = None
    captions: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    has_caption: bool = False  # whether it brings one: else the file beside its file is asked
    size: int | None = None  # of the file, where the listing says it


class Manifest:
    """The rows of one manifest. words: columns met so far that hold something else than numbers."""

    def __init__(self, path: Path, layout: TableLayout):
        """path: of a local file; DataError when the layout makes no sense."""
        self.path, self.words = path, set[str]()
        self._cells = Cells(path, layout, "manifest", MEANINGS, [["path"]])
        self._names = self._cells.names

    def __iter__(self) -> Iterator[ManifestRow]:
        """Every row, those that can't be used with their reason.

        DataError as Cells's, and when no row can be used.
        """
        reason, usable = "", False
        for number, cells in self._cells:
            for row in self._rows(number, cells):
                reason, usable = reason or row.reason, usable or not row.reason
                yield row
        if not usable:
            raise DataError(
                f"manifest {self.path}: no row can be used; the first one: {reason}"
                if reason
                else f"manifest {self.path} has no rows"
            )

    def _rows(self, number: int, cells: dict[str, Any] | str) -> Iterator[ManifestRow]:
        """The segments of a row; one with a reason when it is no good."""
        nameless = f"row {number} of {name_of(self.path.name)}"
        if isinstance(cells, str):
            yield ManifestRow(nameless, number, reason=cells)
            return
        name = cells.get(self._names["path"])
        name = str(name).removeprefix(MARK) if isinstance(name, str | int) and not isinstance(name, bool) else ""
        if not name.strip():
            yield ManifestRow(nameless, number, reason="it has no path")
            return
        try:
            found = self._segments(name, number, cells)
        except DataError as error:
            found = [ManifestRow(name, number, reason=f"row {number}: {error}")]
        yield from found

    def _segments(self, name: str, number: int, cells: dict[str, Any]) -> list[ManifestRow]:
        def cell(meaning: str) -> Any:
            return cells.get(self._names[meaning])

        caption, spans = cell("caption"), _listed(cell("segments"))
        known = {*NO_SCORES, *self._names.values()} - {""}
        scores = {column: value for column, value in cells.items() if column and column not in known}
        if not isinstance(spans, list) or not spans or not isinstance(spans[0], list):
            span = span_of(cell("start"), cell("end"), cell("seconds")) if spans is None else _pair(spans)
            captions = captions_of(caption)
            return [ManifestRow(name, number, span, captions, self._scores(scores), "", bool(captions))]
        captions = _each("captions", caption, len(spans))
        columns = {column: _listed(value) for column, value in scores.items()}
        found = []
        for position, span in enumerate(spans):
            own = {
                column: value[position] if isinstance(value, list) and len(value) == len(spans) else value
                for column, value in columns.items()
            }
            words = captions_of(captions[position])
            found.append(ManifestRow(name, number, _pair(span), words, self._scores(own), "", bool(words)))
        return found

    def _scores(self, cells: dict[str, Any]) -> dict[str, float]:
        scores = {}
        for column, value in cells.items():
            score = as_score(value)
            if score is None:
                self.words.add(column)
            elif not math.isnan(score):
                scores[column] = score
        return scores


def as_score(value: Any) -> float | None:
    """The number that a manifest's cell holds; NaN for an empty one; None when it is no number."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f"{repr(value)[:80]} is not a segment; give [start, end]")
    return span_of(value[0], value[1], None)


def _listed(value: Any) -> Any:
    """A cell, with the text of a list, also one of numbers, turned into the list; None for an empty cell."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    found = list_in(value)
    if isinstance(found, str) and found.strip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(found)
    return found


def _each(what: str, value: Any, count: int) -> list[Any]:
    """A value for each of `count` segments."""
    values = list_in(value) if isinstance(value, str) else value
    if values in (None, "", []):
        return [None] * count
    if not isinstance(values, list):
        values = [values]
    if len(values) != count:
        raise DataError(f"it has {count} segments and {len(values)} {what}")
    return values
