"""The list of sources as a table on disk, in the folder of unfinished work: made once, read by all processes.

A process holds no more of it than the files of one unit. Whoever comes first makes it, under a lock, the others wait:

    rows    every segment that is wanted: file, span, captions, scores, why it can't be used
    files   every file once: size, hash of its content where copies are possible, number of its unit

Copies of a file are found here, before any work: only files of equal size can be copies, of those only the ones that
agree in three parts, and only these are read as a whole. Files are dealt to units so that all have nearly the same
number of files and of bytes. It all depends on the files alone.
"""

import contextlib
import hashlib
import heapq
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.errors import DataError
from data.sources import SourceFile, SourceSegment
from data.sources.content import hash_file, hash_parts, label_of, location_of
from data.sources.survey import SurveyEntry

NAME = "sources.db"
BATCH = 4096
THREADS = 16  # that wait for file systems
CACHE = 2048  # kilobytes of the table that a process keeps in memory
Read = Callable[[Path | str, int], tuple[bytes | None, str]]
REFUSED = 100  # refused files that cost as much as one that is tried
HASHED_FIRST = 10_000  # files up to which holdout knows all contents beforehand
SCHEMA = """
CREATE TABLE rows (name BLOB, number INTEGER, size INTEGER, unread TEXT, start REAL, stop REAL, captions TEXT,
                   scores TEXT, reason TEXT);
CREATE TABLE files (id INTEGER PRIMARY KEY, name BLOB, rank BLOB, size INTEGER, usable INTEGER, reason TEXT,
                    step INTEGER DEFAULT 0, part BLOB, sha256 TEXT, unit INTEGER);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
"""
FILES = """
CREATE INDEX rows_of_file ON rows (name, start, stop);
INSERT INTO files (name, rank, size, usable, reason)
    SELECT name, rank_of(name), max(size), max(unread = '' AND reason = ''), max(unread) FROM rows GROUP BY name;
"""
TWICE = """
SELECT name, min(number), max(number) FROM rows WHERE number > 0 AND reason = ''
    GROUP BY name, start, stop HAVING count(*) > 1
"""
SIZES = """
UPDATE files SET step = 1 WHERE usable AND size IN
    (SELECT size FROM files WHERE usable GROUP BY size HAVING count(*) > 1)
"""
PARTS = """
UPDATE files SET step = 3 WHERE step = 2 AND sha256 IS NULL AND (size, part) IN
    (SELECT size, part FROM files WHERE step = 2 AND part IS NOT NULL GROUP BY size, part HAVING count(*) > 1)
"""


class Listed(Protocol):
    """What a table is made of: Survey. The attributes count once all entries were seen."""

    root: str
    label: str

    @property
    def digest(self) -> str: ...
    @property
    def columns(self) -> list[str]: ...
    @property
    def unread(self) -> list[str]: ...

    def summary(self) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[SurveyEntry]: ...


class SourceTable:
    """The table of one folder of unfinished work, open for reading. A context manager.

    source: what it was made from, in words; digest: changes with any file, size, caption or score; files: how many;
    columns: names of the scores; summary: what the listing found, for the record; unread: names that could not be read;
    units: how many the files are dealt to; hashed: whether the content of every file is known.
    """

    def __init__(self, path: Path):
        """DataError when it can't be read."""
        self.path = path
        try:
            self._base = _connect(path, "mode=ro&immutable=1")
            facts = {name: json.loads(value) for name, value in self._base.execute("SELECT name, value FROM facts")}
        except (sqlite3.Error, ValueError) as error:
            raise DataError(f"the table of sources {path} can't be read ({error}); delete {path.parent}") from error
        self.root: str = facts["root"]
        self.source: str = facts["source"]
        self.digest: str = facts["digest"]
        self.files: int = facts["files"]
        self.columns: list[str] = facts["columns"]
        self.summary: dict[str, Any] = facts["summary"]
        self.unread: list[str] = facts["unread"]
        self.units: int = facts.get("units", 0)
        self.hashed: bool = facts.get("hashed", False)

    def __enter__(self) -> "SourceTable":
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def sizes(self) -> list[tuple[int, int]]:
        """(files, bytes) of every unit."""
        query = "SELECT unit, count(*), sum(CASE WHEN usable THEN size ELSE 0 END) FROM files GROUP BY unit"
        found = {unit: (files, size) for unit, files, size in self._base.execute(query)}
        return [found.get(unit, (0, 0)) for unit in range(self.units)]

    def unit(self, number: int) -> list[SourceFile]:
        """The files of a unit in the order of storing: by the hash of their name, which mixes folders in each shard."""
        rows: dict[bytes, list[SourceSegment]] = {}
        query = (
            "SELECT name, start, stop, captions, scores, rows.reason FROM rows JOIN files USING (name) WHERE unit = ? "
            "ORDER BY name, number, start, stop"
        )
        for name, start, stop, captions, scores, reason in self._base.execute(query, (number,)):
            span = None if start is None else (start, stop)
            known = {column: value for column, value in json.loads(scores).items() if column in self.columns}
            rows.setdefault(name, []).append(SourceSegment(span, json.loads(captions), known, reason))
        query = "SELECT name, size, reason, sha256 FROM files WHERE unit = ? ORDER BY rank"
        return [
            SourceFile(
                location_of(self.root, os.fsdecode(name)),
                label_of(os.fsdecode(name)),
                size,
                rows[name],
                sha256 or "",
                reason,
            )
            for name, size, reason, sha256 in self._base.execute(query, (number,))
        ]

    def hashes(self, unit: int) -> list[str]:
        """Hash of the content of every usable file of a unit, in a table that was made with `hash_all`."""
        return [
            digest for (digest,) in self._base.execute("SELECT sha256 FROM files WHERE usable AND unit = ?", (unit,))
        ]


def make_table(path: Path, survey: Listed, source: str) -> None:
    """Write what a survey of `source` finds to `path`, atomically. DataError for a row that stands twice."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.unlink(missing_ok=True)
    base = _connect(unfinished, "nolock=1")
    try:
        base.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;" + SCHEMA)
        base.create_function("rank_of", 1, lambda name: hashlib.sha256(name).digest()[:16], deterministic=True)
        with _progress("files listed") as advance:
            for batch in _batches(survey):
                base.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_row, batch))
                advance(len(batch))
        base.executescript(FILES)
        if twice := base.execute(TWICE).fetchone():
            raise DataError(
                f"manifest {survey.label} names {label_of(os.fsdecode(twice[0]))} twice with the same segment (rows "
                f"{twice[1]} and {twice[2]}); keep one of the rows"
            )
        facts = {
            "source": source, "root": survey.root, "digest": survey.digest, "columns": survey.columns,
            "unread": survey.unread, "summary": survey.summary(),
            "files": base.execute("SELECT count(*) FROM files").fetchone()[0],
        }  # fmt: skip
        _state(base, **facts)
        base.commit()
    except sqlite3.Error as error:
        raise DataError(f"the table of sources {path} can't be written ({error})") from error
    except BaseException:
        unfinished.unlink()
        raise
    finally:
        base.close()
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def repair_table(path: Path) -> None:
    """Take back what a process that was killed left half written."""
    with contextlib.closing(_connect(path, "nolock=1")) as base:
        base.execute("SELECT count(*) FROM facts").fetchone()


def prepare_table(path: Path, units: int, hash_all: bool) -> None:
    """Find copies and deal the files to units. What was hashed before a kill isn't hashed again.

    hash_all: read every file, so that `hashes` knows all.
    """
    base = _connect(path, "nolock=1")
    try:
        facts = {name: json.loads(value) for name, value in base.execute("SELECT name, value FROM facts")}
        if facts.get("units") == units and (facts.get("hashed") or not hash_all):
            return
        root = facts["root"]
        if "copies" not in facts:
            base.execute(SIZES)
            _state(base, copies=False)
            base.commit()
        if facts.get("copies") is not True:
            _hash(base, root, 1, "parts of files of equal size read", hash_parts)
            base.execute(PARTS)
            _hash(base, root, 3, "files that may be copies read", hash_file)
            _refuse_copies(base)
            _state(base, copies=True)
            base.commit()
        if hash_all and not facts.get("hashed"):
            base.execute("UPDATE files SET step = 3 WHERE usable AND sha256 IS NULL")
            _hash(base, root, 3, "files read for holdout", hash_file)
            _state(base, hashed=True)
        if facts.get("units") != units:
            _deal(base, units)
            _state(base, units=units)
        base.commit()
    except sqlite3.Error as error:
        raise DataError(f"the table of sources {path} can't be written ({error})") from error
    finally:
        base.close()


def _hash(
    base: sqlite3.Connection,
    root: str,
    step: int,
    what: str,
    read: Callable[[Path | str, int], tuple[bytes | None, str]],
) -> None:
    """Fill in what `read` gives, (hash of parts, hash of all or ""), of all files at a step, and take the next step."""
    (count,) = base.execute("SELECT count(*) FROM files WHERE step = ?", (step,)).fetchone()
    last = 0

    def one(file: tuple[int, bytes, int]) -> tuple[bytes | None, str | None, str, int]:
        try:
            part, sha256 = read(location_of(root, os.fsdecode(file[1])), file[2])
        except DataError as error:
            return None, None, str(error), file[0]
        return part, sha256 or None, "", file[0]

    with ThreadPoolExecutor(THREADS) as pool, _progress(what, count) as advance:
        query = "SELECT id, name, size FROM files WHERE step = ? AND id > ? ORDER BY id LIMIT ?"
        while batch := base.execute(query, (step, last, BATCH)).fetchall():
            last = batch[-1][0]
            base.executemany(
                "UPDATE files SET part = coalesce(?1, part), sha256 = ?2, reason = ?3, usable = ?3 = '', "
                f"step = {step + 1} WHERE id = ?4",
                pool.map(one, batch),
            )
            base.commit()
            advance(len(batch))


def _refuse_copies(base: sqlite3.Connection) -> None:
    """All but the first of files with the same content, in the order of storing, get a reason."""
    base.execute("CREATE TEMP TABLE copies (id INTEGER PRIMARY KEY, reason TEXT)")
    query = "SELECT id, name, sha256 FROM files WHERE usable AND sha256 IS NOT NULL ORDER BY sha256, rank"
    first: tuple[str, str] = ("", "")
    writer = base.cursor()
    for number, name, sha256 in base.execute(query):
        if sha256 != first[0]:
            first = sha256, label_of(os.fsdecode(name))
        else:
            writer.execute("INSERT INTO copies VALUES (?, ?)", (number, f"has the same content as {first[1]}"))
    base.execute("UPDATE files SET usable = 0, reason = copies.reason FROM copies WHERE copies.id = files.id")


def _deal(base: sqlite3.Connection, units: int) -> None:
    """Give each file its unit: from the largest file on, each to the unit with the least to do so far.

    What there is to do is bytes and files, both in parts of their mean: a file costs its size over the mean one, and 1.
    So units have the same number of equal files, to one, and of others nearly the same bytes and number; the unit of a
    file that is larger than all else of a unit has few others. Files that are refused cost next to nothing.
    """
    files, total = base.execute("SELECT count(*), sum(size) FROM files WHERE usable").fetchone()
    query = "SELECT id, usable, size FROM files ORDER BY usable DESC, CASE WHEN usable THEN size END DESC, rank"
    loads = [(0, unit) for unit in range(units)]  # a heap
    whole = max(1, total or 0)  # 1 of a file's cost, in the integers that are counted with

    def dealt() -> Iterator[tuple[int, int]]:
        for number, usable, size in base.execute(query):
            load, unit = loads[0]
            heapq.heapreplace(loads, (load + (size * files + whole if usable else whole // REFUSED), unit))
            yield number, unit

    base.execute("CREATE TEMP TABLE dealt (id INTEGER PRIMARY KEY, unit INTEGER)")
    base.executemany("INSERT INTO dealt VALUES (?, ?)", dealt())
    base.execute("UPDATE files SET unit = dealt.unit FROM dealt WHERE dealt.id = files.id")
    base.execute("DROP TABLE dealt")
    base.execute("CREATE INDEX IF NOT EXISTS files_of_unit ON files (unit, rank)")


def _row(entry: SurveyEntry) -> tuple[Any, ...]:
    row = entry.row
    start, stop = row.span or (None, None)
    captions, scores = json.dumps(row.captions), json.dumps(row.scores)
    return (entry.name, row.number, entry.size, entry.unread, start, stop, captions, scores, row.reason)


def _batches(entries: Iterable[SurveyEntry]) -> Iterator[list[SurveyEntry]]:
    remaining = iter(entries)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _state(base: sqlite3.Connection, **facts: Any) -> None:
    base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", [(n, json.dumps(v)) for n, v in facts.items()])


def _connect(path: Path, options: str) -> sqlite3.Connection:
    """Without sqlite's own locks, which network file systems often lack: a lock of ours stands over it."""
    base = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)
    base.execute(f"PRAGMA cache_size = -{CACHE}")
    return base


@contextlib.contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal for what may take long; a function that moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=total == 0) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
