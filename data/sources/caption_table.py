"""A table of captions, laid out on disk so that a shard's captions are found without holding the table in memory.

Rows name a window by its `key`, or a file by its `source`, perhaps with `start` and `end` in seconds. They are copied
once, in order, into an Arrow file; beside it lie the hashes of their names, sorted, and the times. Both are mapped.
Copying takes 40 bytes of memory a row (24 for keys), a lookup none that grows with the table.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.errors import DataError
from data.sources.captions import captions_of
from data.sources.cells import Cells, TableLayout
from data.sources.content import known_as
from data.sources.times import span_of

COLUMNS = ("key", "source", "start", "end", "seconds", "caption")
NEEDED = (("caption",), ("key", "source"))
BATCH = 1 << 14  # rows of one batch of the Arrow file
EXAMPLES = 3  # of each kind of row that is not used
ROWS, COUNTS = "rows.arrow", "table.json"

Row = tuple[str, float, float, str]  # key or source, start, end, caption


@dataclass
class Counted:
    """How many there are of a kind, and the first few."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


def copy_table(path: Path, columns: Mapping[str, str | int], delimiter: str, folder: Path) -> None:
    """Lay out the rows of a table in `folder`, which is empty. DataError as Cells's, and when no row is usable."""
    import pyarrow as pa

    layout = TableLayout(columns, delimiter)
    table = Cells(path, layout, "the table of captions", COLUMNS, NEEDED, others=False)
    schema = pa.schema([("row", pa.int64()), ("name", pa.string()), ("caption", pa.string())])
    hashes, starts, ends = array("Q"), array("d"), array("d")
    empty, unusable = Counted(), Counted()
    number, by, batch = 0, "", []
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for number, cells in table:
            values = cells if isinstance(cells, str) else {name: cells.get(table.names[name]) for name in COLUMNS}
            if not by and not isinstance(cells, str):
                by = "key" if table.names["key"] in cells else "source"
            row = _usable(path, number, by, values)
            if isinstance(row, str):
                (unusable if row else empty).add(f"row {number} ({row or values[by]})")  # type: ignore[index]
                continue
            hashes.append(_hash(row[0]))
            if by == "source":
                starts.append(row[1])
                ends.append(row[2])
            batch.append({"row": number, "name": row[0], "caption": row[3]})
            if len(batch) == BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    if not len(hashes):
        raise DataError(
            f"the table of captions {path} has {number} rows, {empty.count} without a caption and none that is usable"
            + (f": {'; '.join(unusable.examples)}" if unusable.count else "")
        )
    order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")  # rows of one name stay in order
    np.save(folder / "order.npy", order)
    for name, numbers, dtype in (("hash", hashes, np.uint64), ("start", starts, np.float64), ("end", ends, np.float64)):
        if len(numbers):
            np.save(folder / f"{name}.npy", np.frombuffer(numbers, dtype)[order])
    counts = {"by": by, "rows": number, "usable": len(hashes), "empty": vars(empty), "unusable": vars(unusable)}
    (folder / COUNTS).write_text(json.dumps(counts))


def _usable(path: Path, number: int, by: str, values: dict[str, Any] | str) -> Row | str:
    """The row, or why it is not used ("": it has no caption). values: its cells by our names, or why it has none.

    DataError for several captions in one row.
    """
    if isinstance(values, str):
        return values
    name = values[by]
    try:
        captions = captions_of(values["caption"])
        if not captions:
            return ""
        if not isinstance(name, str) or not name.strip():
            return f"its {by} is {name!r}, no text"
        start, end = span_of(values["start"], values["end"], values["seconds"]) or (-math.inf, math.inf)
        name = known_as(name) if by == "source" else name
        name.encode()
    except UnicodeEncodeError:
        return f"its {by} {name!r} holds half a character"
    except DataError as error:
        return str(error)
    if len(captions) > 1:
        raise DataError(
            f"the table of captions {path} has a list of captions in row {number}: a captioner has one a window; give "
            "each its own column or table, and write it under its own name (captioner=..., columns.caption=...)"
        )
    return name, start, end, captions[0]


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


@dataclass
class CaptionMatches:
    """What the table has for some windows. rows: [n] its rows whose caption is taken, -1 for none; further: rows that
    also apply to one of them, and come later in the table."""

    captions: list[str | None]
    rows: np.ndarray
    further: np.ndarray


class CaptionTable:
    """What copy_table laid out. by: "key" or "source"; counts: rows in the table, usable, empty and unusable ones."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self.counts = json.loads((folder / COUNTS).read_text())
        self.by: str = self.counts["by"]
        self._hash, self._order = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hash", "order"))
        times = [folder / f"{name}.npy" for name in ("start", "end")] if self.by == "source" else []
        self._times = [np.load(path, mmap_mode="r") for path in times]
        self._file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))

    def __len__(self) -> int:
        return len(self._hash)

    def row(self, row: int) -> dict[str, Any]:
        """A usable row: its number in the table (`row`), `name` and `caption`."""
        batch = self._file.get_batch(row // BATCH)
        return {name: batch.column(name)[row % BATCH].as_py() for name in ("row", "name", "caption")}

    def find(self, names: Sequence[str], middles: Sequence[float]) -> CaptionMatches:
        """Captions of windows: names are their keys or sources, middles their times in seconds (for sources)."""
        wanted = np.array([_hash(name) for name in names], np.uint64)
        first, last = np.searchsorted(self._hash, wanted, "left"), np.searchsorted(self._hash, wanted, "right")
        found = CaptionMatches([None] * len(names), np.full(len(names), -1, np.int64), np.zeros(0, np.int64))
        further = []
        for window, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            rows = self._order[begin:end]
            if self._times and begin < end:
                start, stop = (times[begin:end] for times in self._times)
                rows = rows[(start <= middles[window]) & (middles[window] < stop)]
            for row in rows.tolist():
                content = self.row(row)
                if content["name"] != names[window]:  # another name of the same hash
                    continue
                if found.rows[window] < 0:
                    found.rows[window], found.captions[window] = row, content["caption"]
                else:
                    further.append(row)
        found.further = np.unique(np.array(further, np.int64))
        return found
