"""Tables of windows in Parquet: every window with all its scores, and scores from elsewhere that are joined by key."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.shards import write_atomically
from data.source import NO_SCORES

SCORES = "scores.parquet"
# what a row says beside its scores; `reason` is "" for a window that could be used, `failed` names the filters it fails
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
        places, there = self._find(keys)
        return {
            name: np.where(there, self._values[number][places], np.float32(np.nan))
            for number, name in enumerate(self.columns)
        }

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """bool [n]: which keys the table has."""
        return self._find(keys)[1]

    def _find(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.array([str(key).encode() for key in keys], dtype=bytes)
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
        return places, self._keys[places] == wanted

    def lookup(self, key: str) -> dict[str, float]:
        """The scores of one key, NaN where there are none."""
        return {name: float(values[0]) for name, values in self.rows([key]).items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> None:
    """Write rows (FIXED and a dict `scores`) to a Parquet file, atomically; a score that is missing becomes NaN."""
    rows = list(rows)
    write_atomically(path, lambda unfinished: _write(unfinished, [rows], columns))


def merge(paths: Sequence[Path], path: Path) -> None:
    """Join tables of equal columns into one, in order, a table at a time."""
    import pyarrow.parquet as parquet

    def copy(unfinished: Path) -> None:
        with parquet.ParquetWriter(unfinished, parquet.read_schema(paths[0]), compression="zstd") as writer:
            for part in paths:
                writer.write_table(parquet.read_table(part))

    write_atomically(path, copy)


def read_columns(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns of a table as numpy arrays: numbers as they are, text as objects. DataError when it can't be read."""
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=None if names is None else list(names))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); it is written by `python -m data.prepare`") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def score_columns(path: Path) -> list[str]:
    """Names of the scores in a table of windows."""
    import pyarrow.parquet as parquet

    return [name for name in parquet.read_schema(path).names if name not in FIXED]


def _write(path: Path, batches: Iterable[list[dict[str, Any]]], columns: Sequence[str]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    fields = [(name, getattr(pyarrow, kind if kind != "double" else "float64")()) for name, kind in FIXED.items()]
    schema = pyarrow.schema([*fields, *((name, pyarrow.float32()) for name in columns)])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in batches:
            writer.write_table(pyarrow.Table.from_pylist(list(_flat(rows, columns)), schema=schema))


def _flat(rows: list[dict[str, Any]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {name: row[name] for name in FIXED} | {name: row["scores"].get(name, float("nan")) for name in columns}
