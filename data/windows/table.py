"""Tables of windows in Parquet: every window with all its scores, and scores from elsewhere that are joined by key."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from core.durable import temporary, write_atomically
from data.errors import DataError
from data.sources.manifest import NO_SCORES

SCORES = "scores.parquet"
BATCH = 1 << 16  # rows that are looked at in one go
ROWS = 10_000  # that are held before they are written
# what a row says beside its scores; `reason` is "" for a window that could be used, `failed` names the filters that it
# fails, `unmeasured` the scores that are NaN, and why
FIXED = {
    "key": "string",
    "source": "string",
    "source_sha256": "string",
    "start": "double",
    "seconds": "double",
    "frames": "int32",
    "height": "int32",
    "width": "int32",
    "kind": "string",
    "has_video": "bool_",
    "has_audio": "bool_",
    "part": "string",
    "stored": "bool_",
    "failed": "string",
    "reason": "string",
    "unmeasured": "string",
}


class External:
    """Scores from elsewhere: a Parquet file with a column `key` (of windows) or `source` (of files), the rest numbers.

    columns: names of the scores. Rows are found by binary search; 4 bytes a score and the key's length a row are kept.
    """

    def __init__(self, path: Path | str):
        """DataError when it can't be read, has no column to join by, names a key twice or holds no numbers."""
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types as types

        self.path = Path(path)
        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"the table of scores {path} can't be read ({error}); give a Parquet file") from error
        self.by = next((name for name in ("key", "source") if name in table.column_names), "")
        if not self.by:
            raise DataError(
                f"the table of scores {path} has columns {', '.join(table.column_names)}; it needs `key` (of windows, "
                f"as in {SCORES}) or `source` (names of files) to be joined by"
            )
        numeric = [
            field.name
            for field in table.schema
            if field.name not in FIXED and field.name not in NO_SCORES
            and (types.is_floating(field.type) or types.is_integer(field.type) or types.is_boolean(field.type))
        ]  # fmt: skip
        if not numeric:
            raise DataError(f"the table of scores {path} has no column of numbers beside {self.by}")
        if table.num_rows == 0:
            raise DataError(f"the table of scores {path} has no rows")
        keys = np.array([str(key).encode() for key in table[self.by].to_pylist()], dtype=bytes)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        if len(keys) > 1 and bool((twice := self._keys[1:] == self._keys[:-1]).any()):
            again = self._keys[1:][twice][0].decode()
            raise DataError(f"the table of scores {path} has {self.by} {again} more than once; keep one row")
        self.columns = tuple(numeric)
        self._values = np.stack(
            [table[name].cast(pyarrow.float32(), safe=False).to_numpy().astype(np.float32)[order] for name in numeric]
        )

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """float32 [n] a column, NaN for keys that the table does not have."""
        positions, there = self._find(keys)
        return {
            name: np.where(there, self._values[number][positions], np.float32(np.nan))
            for number, name in enumerate(self.columns)
        }

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """bool [n]: which keys the table has."""
        return self._find(keys)[1]

    def _find(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.array([str(key).encode() for key in keys], dtype=bytes)
        positions = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
        return positions, self._keys[positions] == wanted

    def lookup(self, key: str) -> dict[str, float]:
        """The scores of one key, NaN where there are none."""
        return {name: float(values[0]) for name, values in self.rows([key]).items()}


class RowWriter:
    """Takes rows (FIXED and a dict `scores`) one by one into a Parquet file; a score that is missing becomes NaN.

    A context manager: `path` is there, whole, when it was left without an exception.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        import pyarrow
        import pyarrow.parquet as parquet

        self.path, self.columns = path, columns
        fields = [(name, getattr(pyarrow, kind if kind != "double" else "float64")()) for name, kind in FIXED.items()]
        self._schema = pyarrow.schema([*fields, *((name, pyarrow.float32()) for name in columns)])
        self._rows: list[dict[str, Any]] = []
        self._file = open(temporary(path), "wb")  # noqa: SIM115
        self._writer = parquet.ParquetWriter(self._file, self._schema, compression="zstd")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with self._file:
                self._flush()
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
            os.rename(temporary(self.path), self.path)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Remove what was written; the error that is on its way stays the one that is heard."""
        for undo in (self._writer.close, self._file.close, temporary(self.path).unlink):
            with contextlib.suppress(Exception):
                undo()

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        scores = row["scores"]
        self._rows.append(
            {name: row[name] for name in FIXED} | {name: scores.get(name, math.nan) for name in self.columns}
        )
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


def merge(paths: Sequence[Path], path: Path) -> None:
    """Join tables of equal columns into one, in order, a table at a time."""
    import pyarrow.parquet as parquet

    def copy(unfinished: Path) -> None:
        with parquet.ParquetWriter(unfinished, parquet.read_schema(paths[0]), compression="zstd") as writer:
            for part in paths:
                writer.write_table(parquet.read_table(part))

    write_atomically(path, copy)


def read_columns(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Whole columns of a table as numpy arrays: numbers as they are, text as objects. DataError when unreadable."""
    import pyarrow.parquet as parquet

    with _readable(path):
        table = parquet.read_table(path, columns=None if names is None else list(names))
    return {name: table[name].to_numpy() for name in table.column_names}


def batches(path: Path, names: Sequence[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a table some at a time: columns as numpy arrays, numbers as they are, text as objects.

    DataError when it can't be read.
    """
    import pyarrow.parquet as parquet

    with _readable(path), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=None if names is None else list(names)):
            yield {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); it is written by `mova prepare`") from error


def score_columns(path: Path) -> list[str]:
    """Names of the scores in a table of windows."""
    import pyarrow.parquet as parquet

    return [name for name in parquet.read_schema(path).names if name not in FIXED]
