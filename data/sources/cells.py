"""Reads tables written by other software, CSV, TSV, JSONL or Parquet, row by row: cells by the name of their column.

Columns that mean something may have names of the file's own, {path: video, start: begin}, or positions in a CSV file
without header, {path: 0, start: 1}. Rows are read one after another and never held together.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data.errors import DataError
from data.sources.captions import MARK, decode

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = (",", "\t", ";", "|")
SAMPLE = 1 << 16  # bytes that are looked at to find the delimiter
MOST_CELL = 1 << 24  # characters of a cell
BATCH = 1024  # rows of a Parquet file
NOTHING = {"nan", "NaN", "null", "NULL", "None"}  # how programs write an empty cell of a CSV file


@dataclass
class TableLayout:
    """How a table is read. columns: meaning -> its name in the file, or its position in a file without header."""

    columns: Mapping[str, str | int | None] = field(default_factory=dict)
    delimiter: str = ""  # of CSV; "" = found out

    def __post_init__(self) -> None:
        self.columns = {meaning: column for meaning, column in self.columns.items() if column is not None}

    def check(self, meanings: Sequence[str], needed: Sequence[Sequence[str]]) -> None:
        """DataError for columns that mean nothing. needed: as in Cells."""
        if unknown := sorted(set(self.columns) - set(meanings)):
            raise DataError(f"columns.{unknown[0]} is not a known column; there are {', '.join(meanings)}")
        kinds = {isinstance(column, int) for column in self.columns.values()}
        if len(kinds) > 1:
            raise DataError(f"columns={dict(self.columns)} mixes names and positions; give one kind")
        for group in needed if True in kinds else ():
            if not set(group) & set(self.columns):
                raise DataError(f"columns by position need the one of the {group[0]}, as in columns={{{group[0]}: 0}}")
        if len(self.delimiter) > 1:
            raise DataError(f"delimiter={self.delimiter!r} must be one character")

    @property
    def headless(self) -> bool:
        """Whether the file has no header."""
        return any(isinstance(column, int) for column in self.columns.values())


class Cells:
    """The rows of one table. names: meaning -> name of its column (of one without a name: its position)."""

    def __init__(
        self,
        path: Path,
        layout: TableLayout,
        what: str,
        meanings: Sequence[str],
        needed: Sequence[Sequence[str]],
        others: bool = True,
    ):
        """path: of a local file; what: it is called in messages; needed: of each group one column must be there;
        others: whether columns that mean nothing are wanted too.

        DataError when the layout makes no sense, or the ending is none of SUFFIXES.
        """
        layout.check(meanings, needed)
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{what} {path} is none of {', '.join(SUFFIXES)}")
        self.path, self.layout, self.needed, self.others = path, layout, needed, others
        self.label = f"{what} {path}"
        self.names = {meaning: str(layout.columns.get(meaning, meaning)) for meaning in meanings}

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Number, from 1 and without the header, and cells by column of every row, or why it can't be read.

        DataError when the file is no table of its kind, or lacks a column that is needed or that the layout names.
        """
        read = {".jsonl": self._json_lines, ".parquet": self._parquet}.get(self.path.suffix.lower(), self._csv)
        if self.layout.headless and read != self._csv:
            raise DataError(f"{self.label} has names for its columns: give those instead of positions")
        number = 0
        try:
            for number, cells in enumerate(read(), 1):
                yield number, cells
        except (OSError, ValueError, csv.Error) as error:  # pyarrow's ArrowInvalid is a ValueError
            after = f" after row {number}" if number else ""
            raise DataError(f"{self.label} can't be read{after} ({error})") from error

    def _json_lines(self) -> Iterator[dict[str, Any] | str]:
        columns: dict[str, None] = {}  # of any row: each has its own
        with open(self.path, "rb") as file:
            for line in self._text(file):
                if not line.strip():
                    continue
                try:
                    cells = json.loads(line)
                except RecursionError:
                    yield "it nests too deep"
                except ValueError as error:
                    yield f"it is no json ({error})"
                else:
                    if isinstance(cells, dict):
                        columns |= dict.fromkeys(cells)
                    yield cells if isinstance(cells, dict) else "it is no json object"
        if columns:
            self._require(list(columns))

    def _parquet(self) -> Iterator[dict[str, Any] | str]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            header = [name.removeprefix(MARK) for name in file.schema_arrow.names]
            self._require(header)
            wanted = set(self.names.values())
            if not self.others:
                header = [name for name in header if name in wanted]
            stored = [name for name in file.schema_arrow.names if name.removeprefix(MARK) in header]
            for batch in file.iter_batches(BATCH, columns=stored):
                for cells in batch.rename_columns(header).to_pylist():
                    try:  # columns of text may be stored as bytes
                        text = {name: decode(cells[name]) for name in wanted if isinstance(cells.get(name), bytes)}
                        yield cells | text
                    except DataError as error:
                        yield str(error)

    def _csv(self) -> Iterator[dict[str, Any] | str]:
        csv.field_size_limit(MOST_CELL)
        with open(self.path, "rb") as file:
            sample = _whole_lines(file.read(SAMPLE)).decode("utf-8-sig", errors="replace")
            file.seek(0)
            table = csv.reader(self._text(file), delimiter=self._delimiter(sample), skipinitialspace=True)
            first = next((row for row in table if row), None)
            if first is None:
                return
            header = (
                [str(position) for position in range(len(first))]
                if self.layout.headless
                else [c.strip() for c in first]
            )
            self._require(header)
            for row in itertools.chain([first] if self.layout.headless else [], table):
                if len(row) > len(header):
                    yield f"it has {len(row)} cells, the first row {len(header)}; quote those that hold a delimiter"
                elif row:
                    cells = ("" if (cell := value.strip()) in NOTHING else cell for value in row)
                    yield dict(itertools.zip_longest(header, cells, fillvalue=""))

    def _require(self, header: Sequence[str]) -> None:
        """DataError when a column is missing, or stands there twice."""
        if twice := sorted({column for column in header if column and header.count(column) > 1}):
            raise DataError(f"{self.label} has two columns {twice[0]}; rename one of them")
        has = f"{self.label} has columns {', '.join(header)[:300]}"
        for meaning, column in self.layout.columns.items():
            if str(column) not in header:
                raise DataError(f"{has}; it needs a column {column}, since columns.{meaning}={column}")
        for group in self.needed:
            if not any(self.names[meaning] in header for meaning in group):
                raise DataError(
                    f"{has}; it needs a column {' or '.join(group)} (or say which one it is: columns={{{group[0]}: "
                    f"NAME}}; a file without header: columns={{{group[0]}: 0}}; other delimiters: delimiter=...)"
                )

    def _delimiter(self, sample: str) -> str:
        """The one that is given, or the one that makes a column of what is needed, and most columns, of the first
        rows."""
        if self.layout.delimiter:
            return self.layout.delimiter
        if self.path.suffix.lower() == ".tsv":
            return "\t"

        def columns(delimiter: str) -> tuple[bool, int]:
            rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, skipinitialspace=True)
            first = [row for row in itertools.islice(rows, 20) if row]
            header = [column.strip() for column in first[0]] if first else []
            if self.layout.headless:
                return True, min(map(len, first), default=0)
            return all(any(self.names[each] in header for each in group) for group in self.needed), len(header)

        return max(DELIMITERS, key=columns)  # of several that are as good the first

    def _text(self, file: IO[bytes]) -> Iterator[str]:
        """Lines with their ends. DataError, with the line's number, for what is not UTF-8."""
        for number, line in enumerate(file, 1):
            try:
                text = decode(line)
                if "\0" in text:
                    raise DataError("it holds NUL characters: it is UTF-16, UTF-8 was tried; save it as UTF-8")
                yield text
            except DataError as error:
                raise DataError(f"{self.label}, line {number}: {error}") from error


def _whole_lines(data: bytes) -> bytes:
    """All but the last, unfinished line of a sample (a line alone stays, less a letter that was cut)."""
    if len(data) < SAMPLE:
        return data
    return data[: data.rfind(b"\n") + 1] or data[: data.rfind(b",") + 1]
