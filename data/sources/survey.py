"""One pass over all sources: each segment with its file's size and its captions, and anything unusual."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from data.dataset.record import PLAIN_NAME
from data.errors import DataError
from data.sources.captions import captions_beside
from data.sources.cells import SUFFIXES as MANIFESTS
from data.sources.cells import TableLayout
from data.sources.content import fetch, is_address, label_of, location_of, size_of
from data.sources.listing import EXAMPLES, SUFFIXES, Beside, chosen, find_files
from data.sources.manifest import Manifest, ManifestRow
from data.storage.remote import list_remote
from data.storage.web import hide

BATCH = 4096
THREADS = 16  # that wait for file systems
FILES_REMEMBERED = 1 << 10  # sizes: the rows of one file mostly stand together


@dataclass
class SurveyEntry:
    """A segment as it was found. name: of its file, as the file system has it; unread: why it can't be read, or ""."""

    name: bytes
    row: ManifestRow
    size: int = 0
    unread: str = ""


@dataclass
class Noticed:
    """How many there were of something, and the first few names in order."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < EXAMPLES or name < self.first[-1]:
            self.first = sorted({*self.first, name})[:EXAMPLES]


class Survey:
    """The segments of a source, one pass over them; what is known after it stands in the attributes.

    label: the source in messages; root: folder or address that names are relative to; rows: segments so far; digest:
    changes when a file comes, goes, or changes its size, and with captions and scores; columns: names of scores;
    unread: names that could not be read.
    """

    def __init__(self, source: str, layout: TableLayout):
        """DataError when there is no such source."""
        self.source, self.label, self.rows, self.beside = source, label_of(source), 0, Beside()
        self.no_caption, self.several, self.unread = Noticed(), Noticed(), list[str]()
        self._layout, self._sum, self._scores = layout, 0, set[str]()
        self._copy: tempfile.TemporaryDirectory[str] | None = None  # of a manifest that lies elsewhere
        self._manifest = self._open_manifest() if is_manifest(source) else None
        self._names = self._find()
        first = next(self._names, None)
        if first is None:
            unread = self.beside.unread()
            why = f", and {', '.join(unread)} could not be read" if unread else ""
            raise DataError(f"source {self.label} holds no video files ({', '.join(SUFFIXES)}){why}")
        self.root, self._first = first

    def _open_manifest(self) -> Manifest:
        if not is_address(self.source):
            return Manifest(Path(self.source), self._layout)
        self._copy = tempfile.TemporaryDirectory()
        path = Path(self._copy.name) / hide(self.source).rpartition("/")[2]
        fetch(self.source, size_of(self.source), path)
        return Manifest(path, self._layout)

    def _find(self) -> Iterator[tuple[str, ManifestRow]]:
        """(folder or address that names are relative to, segment) of everything in the source."""
        if self._manifest:
            here = self.source.partition("?")[0].rpartition("/")[0]  # a manifest's token is not its files'
            root = here if is_address(self.source) else str(Path(self.source).parent.absolute())
            yield from ((root, row) for row in self._manifest)
        elif is_address(self.source) and self.source.endswith("/"):
            sizes = dict(list_remote(self.source))
            for name in chosen(sizes, self.beside):
                yield self.source, ManifestRow(name, 0, size=sizes[name])
        elif is_address(self.source):
            yield self.source.partition("?")[0].rpartition("/")[0], ManifestRow(self.source, 0)
        else:
            yield from (
                (str(root.absolute()), ManifestRow(name, 0)) for root, name in find_files(self.source, self.beside)
            )

    def count(self) -> int:
        """How many segments there are; looks at no file. Instead of iterating."""
        return 1 + sum(1 for _ in self._names)

    def __iter__(self) -> Iterator[SurveyEntry]:
        """Every segment, in no particular order. DataError as Manifest's."""
        size = lru_cache(FILES_REMEMBERED)(_size_or_reason)
        with ThreadPoolExecutor(THREADS) as pool:
            rows = self._rows()
            while batch := list(islice(rows, BATCH)):
                for entry in pool.map(lambda row: _measured(self.root, row, size), batch):
                    self._notice(entry)
                    yield entry
        self.unread += self.beside.unread()
        self._report_words()

    @property
    def digest(self) -> str:
        """Of all segments, whatever their order."""
        return hashlib.sha256(f"{self._sum} {self.beside.unread()}".encode()).hexdigest()

    @property
    def columns(self) -> list[str]:
        """Names of the scores, in order."""
        words = self._manifest.words if self._manifest else set()
        return sorted(name for name in self._scores - words if PLAIN_NAME.fullmatch(name))

    def summary(self) -> dict[str, Any]:
        """What was noticed, for the record of the dataset."""
        return {
            "segments": self.rows,
            "without_caption": vars(self.no_caption),
            "several_captions": vars(self.several),
            "beside": {kind: {"count": n, "first": names} for kind, (n, names) in sorted(self.beside.kinds.items())},
        }

    def _rows(self) -> Iterator[ManifestRow]:
        yield self._first
        yield from (row for _, row in self._names)

    def _notice(self, entry: SurveyEntry) -> None:
        row = entry.row
        self.rows += 1
        known = (entry.name, entry.size, entry.unread, row.span, row.captions, sorted(row.scores.items()), row.reason)
        self._sum = (self._sum + int.from_bytes(hashlib.sha256(repr(known).encode()).digest(), "big")) % 2**256
        self._scores.update(row.scores)
        name = label_of(os.fsdecode(entry.name))
        if entry.unread:
            self.unread = sorted({*self.unread, name})[:EXAMPLES]
        elif not row.reason and not row.captions:
            self.no_caption.add(name)
        elif len(row.captions) > 1:
            self.several.add(name)

    def _report_words(self) -> None:
        words = self._manifest.words if self._manifest else set()
        if words:
            print(
                f"manifest {self.label}: columns {', '.join(sorted(words))} hold no numbers and are not used as scores"
            )
        if odd := sorted(name for name in self._scores - words if not PLAIN_NAME.fullmatch(name)):
            print(
                f"manifest {self.label}: columns {', '.join(odd)} are not used as scores: a score's name has letters, "
                "digits and . _ + = - only"
            )


def is_manifest(source: str) -> bool:
    """Whether a source is a manifest by its ending."""
    if is_address(source):
        return Path(source.partition("?")[0]).suffix.lower() in MANIFESTS
    return Path(source).suffix.lower() in MANIFESTS and not Path(source).is_dir()


def _measured(root: str, row: ManifestRow, size: Any) -> SurveyEntry:
    """The segment with its file's size and, unless it brings some, the captions beside its file."""
    try:
        name = os.fsencode(row.name if is_address(row.name) else os.path.normpath(row.name))
    except UnicodeEncodeError:
        row.reason = row.reason or "its path is no name that a file can have"
        name = row.name.encode("utf-8", "surrogatepass")
    if row.reason:
        return SurveyEntry(name, row)
    path = location_of(root, os.fsdecode(name))
    found, unread = (row.size, "") if row.size is not None else size(path)
    if isinstance(path, Path) and not unread and not row.has_caption:
        try:
            row.captions = captions_beside(path)
        except DataError as error:
            row.reason = str(error)
    return SurveyEntry(name, row, found, unread)


def _size_or_reason(path: Path | str) -> tuple[int, str]:
    try:
        return size_of(path), ""
    except DataError as error:
        return 0, str(error)
