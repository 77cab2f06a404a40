"""A unit of work: a share of the source files, done by one process at a time, finished atomically, done once.

A unit writes its shards under numbers of its own into the parts of the dataset, and last its record
`units/00003.json`: from then on it is done. What a killed unit left behind is deleted when it is begun again.
Which unit a file belongs to stands in the table of sources (data.sources.table).
"""

import base64
import contextlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from core.durable import write_atomically
from core.locks import lock_now
from data.clip import EncodedClip
from data.codec import TextCodec
from data.dataset.rows import save_rows
from data.dataset.shards import ShardWriter
from data.errors import DataError
from data.prepare.pool import Listener, Pool
from data.prepare.spool import FileResult, WindowResult
from data.sources import SourceFile
from data.sources.verdict import KINDS, OTHER, kind_of
from data.windows.table import RowWriter

UNITS = "units"  # folder of the records, within the unfinished dataset
SHARDS_A_UNIT = 1000  # numbers that a unit may use
THUMBNAILS = 12  # windows of each kind (kept, not kept) that a unit remembers for the report
FIRST = 3  # files of each reason that a record names
CAPTIONER = "builtin"  # whose captions the files bring along


@dataclass
class UnitConfig:
    """How samples are stored. parts: (train,) or (train, valid), "." = the folder itself; text: encodes captions."""

    root: Path
    count: int  # units in all
    settings: str  # hash of all that decides what a unit gives
    samples_per_shard: int
    shard_bytes: int
    text: TextCodec
    parts: tuple[str, ...]
    columns: tuple[str, ...]  # of the scores
    kept_hashes: bool = False  # whether records name the files that gave samples
    libraries: dict[str, str] = field(default_factory=dict)  # versions of what encodes


@dataclass
class UnitRecord:
    """The outcome of a unit's files."""

    unit: int
    settings: str
    valid: list[str]  # hashes of its files that went to the last part, when all are known beforehand
    files: int = 0
    kept: int = 0
    kept_hashes: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)  # files, by kind of reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first files of each
    windows: int = 0
    windows_rejected: int = 0
    span_seconds: float = 0.0  # of all files that could be opened
    stored_seconds: float = 0.0
    rest_seconds: float = 0.0
    buckets: list[list[Any]] = field(default_factory=list)  # [part, bucket, windows]
    cpu: dict[str, float] = field(default_factory=dict)  # seconds by stage
    wall: float = 0.0
    libraries: dict[str, str] = field(default_factory=dict)


def record_path(root: Path, unit: int) -> Path:
    """Where the record of a unit lies once it is done."""
    return root / UNITS / f"{unit:05d}.json"


def read_record(config: UnitConfig, unit: int) -> UnitRecord | None:
    """The record of a unit that is done with these settings, else None."""
    try:
        record = UnitRecord(**json.loads(record_path(config.root, unit).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of another version
        return None
    return record if record.settings == config.settings else None


def run_unit(
    config: UnitConfig,
    unit: int,
    sources: list[SourceFile],
    is_valid: Callable[[str], bool],
    pool: Pool,
    listener: Listener,
) -> UnitRecord:
    """Do one unit: sources are its files; is_valid: whether a content with this hash goes to the last part.

    DataError when another process is at it.
    """
    began = time.monotonic()
    with _lock(config.root / UNITS / f"{unit:05d}.lock", f"unit {unit}"):
        clear_unit(config, unit)
        record = UnitRecord(unit, config.settings, [], len(sources), libraries=config.libraries)
        waiting = _waiting_path(config.root, unit)
        waiting.mkdir()
        with contextlib.ExitStack() as stack:
            unit_writer = stack.enter_context(_UnitWriter(config, unit, record))
            for source, result, windows in pool.run(sources, waiting, listener):
                source.sha256 = source.sha256 or result.sha256
                valid = bool(source.sha256) and is_valid(source.sha256)
                if valid and config.kept_hashes:
                    record.valid.append(source.sha256)
                unit_writer.write(source, result, windows, config.parts[-1] if valid else config.parts[0])
        shutil.rmtree(waiting)
        record.wall = time.monotonic() - began
        content = json.dumps(asdict(record), ensure_ascii=False)
        write_atomically(record_path(config.root, unit), content)
        return record


def clear_unit(config: UnitConfig, unit: int) -> None:
    """Delete all that an unfinished unit left: shards in its range of numbers, whole or not, and its tables."""
    record_path(config.root, unit).unlink(missing_ok=True)
    shutil.rmtree(_waiting_path(config.root, unit), ignore_errors=True)
    for path in (config.root / UNITS).glob(f"{unit:05d}.*.npz"):
        path.unlink()
    first, _ = shard_range(config, unit)
    for part in config.parts:
        for path in (config.root / part).glob("*.tar*") if (config.root / part).is_dir() else ():
            _remove_if_in(path, first)
        for path in (config.root / part).glob(".*.tar.partial"):
            _remove_if_in(path, first)


def shard_range(config: UnitConfig, unit: int) -> tuple[int, int]:
    """(first shard number of a unit, digits of all shard numbers)."""
    return unit * SHARDS_A_UNIT, max(6, len(str(config.count * SHARDS_A_UNIT - 1)))


def table_path(root: Path, unit: int) -> Path:
    """Table of a unit's windows."""
    return root / UNITS / f"{unit:05d}.parquet"


def rejected_path(root: Path, unit: int) -> Path:
    """Lines of rejected.jsonl of a unit."""
    return root / UNITS / f"{unit:05d}.rejected.jsonl"


def rows_path(root: Path, unit: int, part: str, column: str) -> Path:
    """Rows of the index (data.dataset.rows) of the shards that a unit wrote into a part; none where it wrote no
    shard."""
    return root / UNITS / f"{unit:05d}.{part.strip('.') or 'all'}.{column}.npz"


def thumbnails_path(root: Path, unit: int) -> Path:
    """The windows that a unit remembers for the report: of the lowest keys, which is as good as drawn."""
    return root / UNITS / f"{unit:05d}.thumbnails"


class _UnitWriter:
    """The last stage, write: samples into shards, rows into the table, everything else into the record.

    A context manager; its files are complete after it was left without an exception.
    """

    name, version = "write", 1

    def __init__(self, config: UnitConfig, unit: int, record: UnitRecord):
        self.config, self.unit, self.record = config, unit, record
        first, digits = shard_range(config, unit)
        self._stack = contextlib.ExitStack()
        self._writers = {
            part: self._stack.enter_context(
                ShardWriter(
                    config.root / part, config.samples_per_shard, CAPTIONER, shard_bytes=config.shard_bytes,
                    first=first, most=SHARDS_A_UNIT, digits=digits,
                )
            )
            for part in config.parts
        }  # fmt: skip
        self._rows = self._stack.enter_context(RowWriter(table_path(config.root, unit), config.columns))
        rejected = open(rejected_path(config.root, unit), "w", encoding="utf-8")  # noqa: SIM115
        self._rejected = self._stack.enter_context(rejected)
        self._buckets: Counter[tuple[str, str]] = Counter()
        self._thumbnails: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def __enter__(self) -> "_UnitWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                self._rejected.flush()
                os.fsync(self._rejected.fileno())
        if kind is None:
            self._write_rows()
        self.record.buckets = [[*names, count] for names, count in sorted(self._buckets.items())]

    def write(self, source: SourceFile, result: FileResult, windows: Iterator[WindowResult], part: str) -> None:
        """Store what one file gave; a file of which nothing is stored has one line that says why."""
        record = self.record
        begin = time.process_time()
        first, stored, words = "", 0, 0.0
        for start, reason in result.refused:
            if start is not None:
                self._line(source, start, reason)
            first = first or reason
        embeddings: dict[int, Tensor] = {}  # of the segment at hand
        for window in windows:
            if window.segment not in embeddings:
                started = time.process_time()
                embeddings = {window.segment: self.config.text.encode([_caption(source, window.segment)])[0]}
                words += time.process_time() - started
            self._write_window(source, window, part, embeddings[window.segment])
            stored += window.sample is not None
            first = first or window.rejected
        record.windows += result.windows
        record.rest_seconds += result.rest_seconds
        record.span_seconds += result.span
        if stored:
            record.kept += 1
            if self.config.kept_hashes:
                record.kept_hashes.append(source.sha256)
        else:
            many = result.windows + len(result.refused) > 1
            self._refuse(source, result.rejected or (f"nothing of it was kept: {first}" if many else first))
        result.cpu |= {"text": words, "write": time.process_time() - begin - words}
        for stage, seconds in result.cpu.items():
            record.cpu[stage] = record.cpu.get(stage, 0.0) + seconds

    def _write_rows(self) -> None:
        """What putting the units together needs, so that no shard is read for it."""
        root, unit = self.config.root, self.unit
        for part, writer in self._writers.items():
            for column, rows in writer.rows().items():
                save_rows(rows_path(root, unit, part, column), rows)
        content = json.dumps(self._thumbnails[True] + self._thumbnails[False])
        write_atomically(thumbnails_path(root, unit), content)

    def _write_window(self, source: SourceFile, window: WindowResult, part: str, embedding: Tensor) -> None:
        row = window.row
        row["part"] = part
        self._rows.add(row)
        self._remember(source, window)
        if window.rejected:
            self.record.windows_rejected += 1
            self._line(source, row["start"], window.rejected)
        if (sample := window.sample) is not None:
            clip = EncodedClip.from_members(row["key"], sample.tensors, sample.meta, sample.bucket)
            self._writers[part].write(clip, sample.bucket, _caption(source, window.segment), embedding)
            self._buckets[part, str(sample.bucket)] += 1
            self.record.stored_seconds += row["seconds"]

    def _refuse(self, source: SourceFile, reason: str) -> None:
        self._line(source, None, reason)
        counts, examples = self.record.rejected, self.record.examples
        kind = kind_of(reason)
        kind = kind if kind in counts or len(counts) < KINDS else OTHER
        counts[kind] = counts.get(kind, 0) + 1
        if len(first := examples.setdefault(kind, [])) < FIRST:
            first.append(source.name)

    def _line(self, source: SourceFile, start: float | None, reason: str) -> None:
        line = {"source": source.name, "start": start, "reason": reason}
        self._rejected.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _remember(self, source: SourceFile, window: WindowResult) -> None:
        if (thumbnail := window.thumbnail) is None:
            return
        row, stored = window.row, bool(window.row["stored"])
        entry = {
            "key": row["key"], "source": source.name, "start": row["start"], "stored": stored,
            "why": row["reason"] or row["failed"], "peaks": thumbnail.peaks,
            "jpeg": base64.b64encode(thumbnail.jpeg).decode(),
            "scores": {name: value for name, value in row["scores"].items() if value == value},
        }  # fmt: skip
        self._thumbnails[stored] = sorted([*self._thumbnails[stored], entry], key=lambda one: one["key"])[:THUMBNAILS]


def _caption(source: SourceFile, segment: int) -> str:
    captions = source.segments[segment].captions
    return captions[0] if captions else ""


def _remove_if_in(path: Path, first: int) -> None:
    match = re.fullmatch(r"\.?(?:av|text-.+)-(\d+)\.tar(?:\.partial)?", path.name)
    if match and first <= int(match[1]) < first + SHARDS_A_UNIT:
        path.unlink()


def _waiting_path(root: Path, unit: int) -> Path:
    """Folder for results of files whose turn to be stored has not come."""
    return root / UNITS / f"{unit:05d}.waiting"


@contextlib.contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    with open(path, "a") as file:
        if not lock_now(file):
            raise DataError(f"another data.prepare is at {what} ({path}); wait until it has ended")
        yield
