"""A unit of work: a share of the source files, done by one process at a time, finished atomically, done once.

A unit writes its shards under numbers of its own into the parts of the dataset, and last its record
`units/00003.json`: from then on it is done. What a killed unit left behind is deleted when it is begun again.
Which unit a file belongs to follows from its size alone, so that copies of one file meet in one unit without anybody
reading all files.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from data.clip import EncodedClip
from data.codec import text
from data.errors import DataError
from data.pipeline import Result
from data.pool import Pool
from data.shards import ShardWriter, write_atomically
from data.source import Source, hash_file, read_caption
from data.table import write_rows

UNITS = "units"  # folder of the records, within the unfinished dataset
SHARDS_A_UNIT = 1000  # numbers that a unit may use
THUMBNAILS = 12  # windows of each kind (kept, not kept) that a unit remembers for the report


@dataclass
class UnitConfig:
    """How samples are stored. parts: (train,) or (train, valid), "." = the folder itself."""

    root: Path
    count: int  # units in all
    settings: str  # hash of all that decides what a unit gives
    samples_per_shard: int
    shard_bytes: int
    text_dim: int
    parts: tuple[str, ...]
    columns: tuple[str, ...]  # of the scores


@dataclass
class UnitRecord:
    """What became of a unit's files."""

    unit: int
    settings: str
    valid: list[str]  # hashes of its files that went to the last part
    hashes: dict[str, str] = field(default_factory=dict)  # by name
    files: int = 0
    kept: int = 0
    kept_hashes: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)  # files, by reason
    windows: int = 0
    windows_rejected: int = 0
    span_seconds: float = 0.0  # of all files that could be opened
    stored_seconds: float = 0.0
    rest_seconds: float = 0.0
    buckets: list[list[Any]] = field(default_factory=list)  # [part, bucket, windows]
    cpu: dict[str, float] = field(default_factory=dict)  # seconds by stage
    wall: float = 0.0
    thumbnails: list[dict[str, Any]] = field(default_factory=list)


def unit_of(source: Source, count: int) -> int:
    """Number of the unit that a file belongs to."""
    return int.from_bytes(hashlib.sha256(str(source.size).encode()).digest()[:8], "big") % count


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


def hash_sources(sources: list[Source], known: dict[str, str] | None = None) -> None:
    """Fill in the SHA-256 of all files; the later copies of a content get a reason. known: hashes by name."""
    for source in sources:
        source.sha256 = (known or {}).get(source.name, "")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hash_file, [source for source in sources if not source.sha256]))
    first: dict[str, str] = {}
    for source in sources:
        if not source.reason and first.setdefault(source.sha256, source.name) != source.name:
            source.reason = f"has the same content as {first[source.sha256]}"


def run_unit(
    config: UnitConfig, unit: int, sources: list[Source], valid: set[str], pool: Pool, advance: Callable[[], None]
) -> UnitRecord:
    """Do one unit: sources are its files, hashed; valid: hashes of files for the last part; advance: after each file.

    DataError when another process is at it.
    """
    began = time.monotonic()
    with _lock(config.root / UNITS / f"{unit:05d}.lock", f"unit {unit}"):
        clear_unit(config, unit)
        mine = sorted(source.sha256 for source in sources if source.sha256 in valid)
        record = UnitRecord(
            unit, config.settings, mine, {source.name: source.sha256 for source in sources}, len(sources)
        )
        unit_writer = _UnitWriter(config, unit, record)
        with contextlib.ExitStack() as stack:
            rejected = stack.enter_context(open(_rejected_path(config.root, unit), "w", encoding="utf-8"))
            for writer in unit_writer.writers.values():
                stack.enter_context(writer)
            usable = [_with_caption(source) for source in sources]
            for source, result in pool.run(usable):
                part = config.parts[-1] if source.sha256 in valid else config.parts[0]
                unit_writer.write(source, result, part, rejected)
                advance()
        write_rows(table_path(config.root, unit), unit_writer.rows, config.columns)
        record.thumbnails = unit_writer.chosen()
        record.wall = time.monotonic() - began
        content = json.dumps(asdict(record), ensure_ascii=False)
        write_atomically(record_path(config.root, unit), lambda path: path.write_text(content, encoding="utf-8"))
        return record


def clear_unit(config: UnitConfig, unit: int) -> None:
    """Delete all that an unfinished unit left: shards in its range of numbers, whole or not, and its tables."""
    record_path(config.root, unit).unlink(missing_ok=True)
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


def rejected_lines(root: Path, unit: int) -> str:
    """Lines of rejected.jsonl of a unit."""
    return _rejected_path(root, unit).read_text(encoding="utf-8")


class _UnitWriter:
    """The last stage, write: samples into shards, everything else into the record."""

    name, version = "write", 1

    def __init__(self, config: UnitConfig, unit: int, record: UnitRecord):
        self.config, self.record = config, record
        first, digits = shard_range(config, unit)
        self.writers = {
            part: ShardWriter(
                config.root / part, config.samples_per_shard, shard_bytes=config.shard_bytes, first=first,
                most=SHARDS_A_UNIT, digits=digits,
            )
            for part in config.parts
        }  # fmt: skip
        self.rows: list[dict[str, Any]] = []
        self._buckets: Counter[tuple[str, str]] = Counter()
        self._thumbnails: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def write(self, source: Source, result: Result, part: str, rejected: IO[str]) -> None:
        """Store what one file gave."""
        record = self.record
        for start, reason in result.rejected:
            line = {"source": source.name, "start": start, "reason": reason}
            rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
        record.windows += len(result.rows)
        record.windows_rejected += sum(start is not None for start, _ in result.rejected)
        record.rest_seconds += result.rest_seconds
        record.span_seconds += result.span
        for row in result.rows:
            row["part"] = part
            record.stored_seconds += row["seconds"] if row["stored"] else 0.0
        self.rows += result.rows
        self._remember(source, result)
        if not result.samples:
            reason = result.rejected[0][1] if result.rejected else "no window"
            reason = reason.replace(str(source.path), "it")
            record.rejected[reason] = record.rejected.get(reason, 0) + 1
        else:
            record.kept += 1
            record.kept_hashes.append(source.sha256)
        begin = time.process_time()
        embedding = text.encode(source.caption or "", self.config.text_dim)
        for key, tensors, meta, bucket in result.samples:
            clip = EncodedClip.from_members(key, tensors, meta, bucket)
            self.writers[part].write(clip, bucket, source.caption or "", embedding)
            self._buckets[part, str(bucket)] += 1
        record.buckets = [[*names, count] for names, count in sorted(self._buckets.items())]
        result.cpu["write"] = time.process_time() - begin
        for stage, seconds in result.cpu.items():
            record.cpu[stage] = record.cpu.get(stage, 0.0) + seconds

    def chosen(self) -> list[dict[str, Any]]:
        """Windows for the report: those of the lowest keys, which is as good as drawn."""
        return self._thumbnails[True] + self._thumbnails[False]

    def _remember(self, source: Source, result: Result) -> None:
        rows = {row["key"]: row for row in result.rows}
        for thumbnail in result.thumbnails:
            row = rows[thumbnail.key]
            stored = bool(row["stored"])
            entry = {
                "key": thumbnail.key, "source": source.name, "start": row["start"], "stored": stored,
                "why": row["reason"] or row["failed"], "peaks": thumbnail.peaks,
                "jpeg": base64.b64encode(thumbnail.jpeg).decode(),
                "scores": {name: value for name, value in row["scores"].items() if value == value},
            }  # fmt: skip
            self._thumbnails[stored] = sorted([*self._thumbnails[stored], entry], key=lambda one: one["key"])[
                :THUMBNAILS
            ]


def _with_caption(source: Source) -> Source:
    """The source with the caption beside it, unless the manifest gave one."""
    if not source.reason and source.caption is None:
        try:
            source.caption = read_caption(source.path)
        except DataError as error:
            source.reason = str(error)
    return source


def _remove_if_in(path: Path, first: int) -> None:
    match = re.fullmatch(r"\.?(?:av|text-.+)-(\d+)\.tar(?:\.partial)?", path.name)
    if match and first <= int(match[1]) < first + SHARDS_A_UNIT:
        path.unlink()


def _rejected_path(root: Path, unit: int) -> Path:
    return root / UNITS / f"{unit:05d}.rejected.jsonl"


@contextlib.contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another data.prepare is at {what} ({path}); wait until it has ended") from error
        yield
