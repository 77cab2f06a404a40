"""What there is to prepare: files of a folder or pattern, or the rows of a manifest, each with caption and scores.

A manifest is a CSV, JSONL or Parquet file with a column `path` (relative to its folder, or absolute),
perhaps `caption`, and any numeric columns: scores that were computed elsewhere. They are filtered like our own.
"""

import csv
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
MANIFESTS = (".csv", ".jsonl", ".parquet")
NO_SCORES = (
    "path",
    "caption",
    "key",
    "source",
    "start",
    "seconds",
    "frames",
    "height",
    "width",
)  # columns with a meaning


@dataclass
class Source:
    """One source file. name: its path below the source folder; reason: why it is refused before it is opened, or "".

    size: bytes; caption: None = read the file beside it; scores: columns of the manifest.
    """

    path: Path
    name: str
    size: int = 0
    caption: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    sha256: str = ""
    reason: str = ""


def list_sources(source: str) -> list[Source]:
    """All files of a folder (with its subfolders), a pattern, one video file, or a manifest, in the order of storing.

    The order is by the hash of the name, which mixes folders in each shard. A file that a manifest names and that isn't
    there has a reason. DataError when there is nothing, or when the manifest can't be read.
    """
    if Path(source).suffix.lower() in MANIFESTS and Path(source).is_file():
        sources = _read_manifest(Path(source))
    else:
        root, paths = find_files(source)
        sources = [Source(path, path.relative_to(root).as_posix()) for path in paths]
    for entry in sources:
        try:
            entry.size = entry.path.stat().st_size
        except OSError as error:
            entry.reason = f"can't be read ({error.strerror or error})"
    return sorted(sources, key=lambda entry: hashlib.sha256(entry.name.encode()).digest())


def find_files(source: str) -> tuple[Path, list[Path]]:
    """(folder, media files below it, sorted) of a folder, a glob pattern or one file. DataError when there are none."""
    path = Path(source)
    if path.is_dir():
        root, candidates = path, [found for found in path.rglob("*") if found.is_file()]
    elif path.is_file():
        root, candidates = path.parent, [path]
    elif glob.has_magic(source):
        candidates = [Path(found) for found in glob.glob(source, recursive=True) if Path(found).is_file()]
        root = Path(os.path.commonpath([found.parent for found in candidates])) if candidates else Path()
    else:
        raise DataError(
            f"source {source} does not exist; give a folder of video files, a pattern such as 'raw/*.mp4', or a "
            f"manifest ({', '.join(MANIFESTS)})"
        )
    files = sorted(found for found in candidates if found.suffix.lower() in SUFFIXES and found.name[0] != ".")
    if not files:
        raise DataError(f"source {source} holds no video files ({', '.join(SUFFIXES)})")
    return root, files


def read_caption(path: Path) -> str:
    """Caption beside a media file, "" when there is none. DataError when the file beside it can't be read."""
    plain, record = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if plain.is_file():
            return plain.read_text(encoding="utf-8").strip()
        if record.is_file():
            values = json.loads(record.read_text(encoding="utf-8"))
            return str(values.get("caption") or "").strip() if isinstance(values, dict) else ""
    except (OSError, ValueError) as error:
        raise DataError(f"the caption beside it can't be read ({error}); repair or delete that file") from error
    return ""


def listing_hash(sources: list[Source]) -> str:
    """Changes when a file comes, goes, or changes its size, its caption or its scores."""
    digest = hashlib.sha256()
    for source in sources:
        beside = [source.path.with_suffix(suffix) for suffix in (".txt", ".json")] if source.caption is None else []
        captions = [file.read_bytes() if file.is_file() else None for file in beside] or source.caption
        digest.update(repr([source.name, source.size, captions, sorted(source.scores.items())]).encode())
    return digest.hexdigest()


def hash_file(source: Source) -> None:
    """Fill in the SHA-256 of the content, or the reason why it can't be read."""
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        source.reason = source.reason or f"can't be read ({error})"
    source.sha256 = digest.hexdigest()


def as_score(value: Any) -> float | None:
    """The number that a manifest's cell holds; NaN for an empty one; None when it is no number."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _read_manifest(path: Path) -> list[Source]:
    sources: list[Source] = []
    seen: set[str] = set()
    words: set[str] = set()  # columns that are not scores: they hold something else than numbers
    for number, row in enumerate(_rows(path), 1):
        if not isinstance(row, dict) or not row.get("path"):
            raise DataError(f"manifest {path} row {number} has no path; it needs a column path")
        name = str(row["path"])
        if name in seen:
            raise DataError(f"manifest {path} names {name} twice (row {number}); keep one of the rows")
        seen.add(name)
        caption = None if row.get("caption") in (None, "") else str(row["caption"]).strip()
        scores = {}
        for column, value in row.items():
            if column is None or column in NO_SCORES:
                continue
            number_or_none = as_score(value)
            if number_or_none is None:
                words.add(column)
            elif not math.isnan(number_or_none):
                scores[column] = number_or_none
        sources.append(Source(path.parent / name, name, caption=caption, scores=scores))
    if not sources:
        raise DataError(f"manifest {path} has no rows")
    for source in sources:
        source.scores = {column: value for column, value in source.scores.items() if column not in words}
    if words:
        print(f"manifest {path}: columns {', '.join(sorted(words))} hold no numbers and are not used as scores")
    return sources


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                yield from csv.DictReader(file)
        elif path.suffix.lower() == ".jsonl":
            with open(path, encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
        else:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"manifest {path} can't be read ({error})") from error
