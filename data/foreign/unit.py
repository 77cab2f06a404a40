"""Units of data.import_latents: some files, done in one go; shards, verdicts, and last the record."""

import contextlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from core.durable import write_atomically
from data.dataset.rows import AV, save_rows
from data.dataset.shards import ShardWriter
from data.errors import DataError
from data.foreign.files import Foreign
from data.foreign.latents import Latents, Maker, WrongSettings
from data.prepare.spool import REMEDY, OutputError
from data.prepare.unit import UNITS
from data.sources.verdict import kind_of, reason_of

GEOMETRIES = 256  # different ones in a unit: each keeps a shard open
FIRST = 3  # names that are given for each reason


@dataclass
class ImportRecord:
    """What became of some files. listing: hash of their names, sizes and times; stop: the next unit's first shard."""

    listing: str
    stop: int = 0
    inputs: int = 0
    stored: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by kind of reason
    examples: dict[str, list[str]] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    converted: dict[str, int] = field(default_factory=dict)  # samples with tensors of other types than bfloat16
    without_caption: int = 0
    seconds: float = 0.0

    def add(self, other: "ImportRecord") -> None:
        """Take in another unit's counts."""
        self.inputs, self.stored = self.inputs + other.inputs, self.stored + other.stored
        self.without_caption += other.without_caption
        self.seconds += other.seconds
        self.stop = other.stop
        for name in ("rejected", "buckets", "converted"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))
        for reason, names in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *names][:FIRST]


class ImportUnit:
    """One unit. number: from 0; seen: see open_seen."""

    def __init__(self, partial: Path, number: int, maker: Maker, seen: sqlite3.Connection):
        self.partial, self.number, self.maker, self.seen = partial, number, maker, seen

    def run(
        self, samples: Iterable[Foreign], writer: ShardWriter, listing: str, first: int, advance: Callable[[], None]
    ) -> ImportRecord:
        """Do it. first: number of the writer's first shard; advance: called after each sample."""
        record = ImportRecord(listing)
        with open(rejected_path(self.partial, self.number), "w", encoding="utf-8") as rejected, writer:
            for sample in samples:
                record.inputs += 1
                self._one(sample, record, writer, rejected)
                advance()
        with _disk():
            self.seen.commit()
        rows = writer.rows()
        for column in rows:
            save_rows(rows_path(self.partial, self.number, column), rows[column])
        record.stop = first + (len(rows[AV].files) if rows else 0)
        content = json.dumps(asdict(record), ensure_ascii=False)
        write_atomically(record_path(self.partial, self.number), content)
        return record

    def _one(self, sample: Foreign, record: ImportRecord, writer: ShardWriter, rejected: IO[str]) -> None:
        try:
            latents = self._judge(sample, record)
        except (WrongSettings, OutputError):
            raise
        except Exception as error:  # whatever a file holds is its own verdict
            reason = reason_of(error, Path(sample.name), "reading")
            rejected.write(json.dumps({"source": sample.name, "reason": reason}, ensure_ascii=False) + "\n")
            kind = kind_of(reason)
            record.rejected[kind] = record.rejected.get(kind, 0) + 1
            record.examples[kind] = [*record.examples.get(kind, []), sample.name][:FIRST]
            return
        writer.write(latents.clip, latents.bucket, latents.caption, latents.text)
        record.stored += 1
        record.seconds += latents.clip.meta["seconds"]
        record.buckets[str(latents.bucket)] = record.buckets.get(str(latents.bucket), 0) + 1
        for kind in latents.converted:
            record.converted[kind] = record.converted.get(kind, 0) + 1
        record.without_caption += not latents.caption

    def _judge(self, sample: Foreign, record: ImportRecord) -> Latents:
        content = sample.read()
        key = content.digest[:24]
        with _disk():
            first = self.seen.execute("SELECT name FROM seen WHERE key = ?", (key,)).fetchone()
        if first:
            raise DataError(f"has the same content as {first[0]}")
        latents = self.maker(key, sample.name, content.tensors, content.meta, content.caption)
        if str(latents.bucket) not in record.buckets and len(record.buckets) == GEOMETRIES:
            raise DataError(f"is of geometry {GEOMETRIES + 1} and more of its unit; bring latents to fewer sizes")
        with _disk():
            self.seen.execute("INSERT INTO seen VALUES (?, ?, ?)", (key, self.number, sample.name))
        return latents


def open_seen(path: Path) -> sqlite3.Connection:
    """Keys of what is stored: a copy is refused. On disk, since 17 million would take 2 GB of memory."""
    with _disk():
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA synchronous = OFF")  # a unit that isn't recorded is done again
        connection.execute(
            "CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, unit INTEGER, name TEXT) WITHOUT ROWID"
        )
    return connection


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """The disk's faults are no file's: they end the work."""
    try:
        yield
    except sqlite3.Error as error:
        raise OutputError(f"the list of what is stored can't be written ({error}); {REMEDY}") from error


def read_record(partial: Path, number: int, listing: str) -> ImportRecord | None:
    """The record of a unit that is done with these files, else None."""
    try:
        record = ImportRecord(**json.loads(record_path(partial, number).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if record.listing == listing else None


def clear_from(partial: Path, number: int, shard: int, seen: sqlite3.Connection) -> None:
    """Delete all that units from `number` on have left: records, verdicts, keys, and shards from `shard` on."""
    for path in (partial / UNITS).iterdir():
        if int(path.name.lstrip(".").partition(".")[0]) >= number:
            path.unlink()
    for path in partial.iterdir():
        match = re.fullmatch(r"\.?(?:av|text-.+)-(\d+)\.tar(?:\.partial)?", path.name)
        if match and int(match[1]) >= shard:
            path.unlink()
    with _disk():
        seen.execute("DELETE FROM seen WHERE unit >= ?", (number,))
        seen.commit()


def record_path(partial: Path, number: int) -> Path:
    """Where the record of a unit lies once it is done."""
    return partial / UNITS / f"{number:06d}.json"


def rejected_path(partial: Path, number: int) -> Path:
    """Where a unit's verdicts lie."""
    return partial / UNITS / f"{number:06d}.rejected.jsonl"


def rows_path(partial: Path, number: int, column: str) -> Path:
    """Where the rows of a unit's shards lie: column "av" or "text-<captioner>"."""
    return partial / UNITS / f"{number:06d}.{column}.npz"
