"""Lists the media files of a folder, a pattern or one name, and counts and names what else is there.

A folder is read with its subfolders; symlinked ones are followed, but no folder is read twice and none above the source
at all. Files whose ending stands in SUFFIXES are tried. Sound that has a video of its name beside it is taken for a
part of that video. A file that is named, and files of a pattern that states its ending (`raw/*.dat`), are tried
whatever their ending.
"""

import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from data.errors import DataError
from data.sources.verdict import name_of

VIDEO = (
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv", ".wmv",
    ".asf", ".ogv", ".3gp", ".3g2", ".mxf", ".gif",
)  # fmt: skip
SOUND = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".mka", ".wma")
SUFFIXES = VIDEO + SOUND
CAPTIONS = (".txt", ".json")
EXAMPLES = 3  # names of each kind that are kept
UNREAD = "unreadable"  # begins the kinds that may hold files which nobody has seen


@dataclass
class Beside:
    """What was found beside the files that are tried: kind -> [how many, the first few names in order]."""

    kinds: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one more of a kind."""
        count, names = self.kinds.get(kind, (0, []))
        self.kinds[kind] = count + 1, sorted([*names, name_of(name)])[:EXAMPLES]

    def unread(self) -> list[str]:
        """Names of folders and links that could not be read."""
        return [name for kind, (_, names) in self.kinds.items() if kind.startswith(UNREAD) for name in names]


def find_files(source: str, beside: Beside) -> Iterator[tuple[Path, str]]:
    """(folder of the source, file's name below it) of every file to try; the rest goes to `beside`.

    DataError when the source does not exist or can't be read; none is found when it holds no media files.
    """
    path = Path(source)
    try:
        mode = os.stat(source).st_mode
    except OSError as error:
        if has_magic(source):
            yield from _matching(source, beside)
            return
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"source {name_of(source)} can't be read ({error.strerror})") from error
        raise DataError(
            f"source {name_of(source)} does not exist; give a folder of video files, a pattern such as 'raw/*.mp4', or "
            "a manifest (.csv, .tsv, .jsonl, .parquet)"
        ) from error
    if not stat.S_ISDIR(mode):
        yield path.parent, path.name
        return
    for folder, names in _Walk(path, beside):
        for name in _chosen(folder, names, beside):
            yield path, name


def chosen(names: Iterable[str], beside: Beside) -> Iterator[str]:
    """Those of many names, with slashes between folders, that are tried; captions beside them are not read."""
    folders: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, slash, file = name.rpartition("/")
        if file:
            folders.setdefault(folder + slash, []).append(file)
    for folder, files in folders.items():
        texts = {file for file in files if os.path.splitext(file)[1].lower() in CAPTIONS}
        for file in sorted(texts):
            beside.add("text at an address (captions come from a manifest there)", folder + file)
        yield from _chosen(folder, [file for file in files if file not in texts], beside)


def _matching(pattern: str, beside: Beside) -> Iterator[tuple[Path, str]]:
    """The files that a pattern matches, `**` for any folders; `*` matches no name that begins with a dot."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    root, parts = Path(*parts[:first]), parts[first:] + (("*",) if parts[-1] == "**" else ())
    if not root.is_dir():
        raise DataError(f"source {name_of(pattern)}: the folder {name_of(str(root))} does not exist")
    matches = re.compile("".join(_expression(part) for part in parts)[:-1] + r"\Z", re.DOTALL).match
    depth = None if "**" in parts else len(parts) - 1
    named = not has_magic(os.path.splitext(parts[-1])[1] or "*")
    for folder, names in _Walk(root, beside, depth):
        found = [name for name in names if matches(folder + name)]
        for name in [folder + name for name in found] if named else _chosen(folder, found, beside):
            yield root, name


def _expression(part: str) -> str:
    """A part of a pattern as a regular expression that takes its slash too."""
    if part == "**":
        return "(?:[^/]+/)*"
    dots = "" if part.startswith(".") else r"(?!\.)"
    return dots + fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*") + "/"


def _chosen(folder: str, names: list[str], beside: Beside) -> Iterator[str]:
    """The names below the source, of one folder's files, that are tried."""
    stems: dict[str, set[str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        stems.setdefault(stem, set()).add(suffix.lower())
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in SOUND and not stems[stem].isdisjoint(VIDEO):
            beside.add("sound of a video of the same name", folder + name)
        elif suffix in SUFFIXES:
            yield folder + name
        elif suffix not in CAPTIONS or stems[stem].isdisjoint(SUFFIXES):
            beside.add(f"file with the ending {suffix}" if suffix else "file without an ending", folder + name)


class _Walk:
    """(folder below the root with its slash, "" for itself; names of its plain files) of every folder, each once."""

    def __init__(self, root: Path, beside: Beside, depth: int | None = None):
        self.root, self.beside, self.depth = root, beside, depth
        self._seen: set[tuple[int, int]] = set()
        self._links: list[str] = []  # folders behind links: after all others, so that names without links come first

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        real = self.root.resolve()
        above = {_identity(parent) for parent in real.parents}
        todo = [""]
        while todo or self._links:
            folder = todo.pop() if todo else self._links.pop(0)
            try:
                identity = _identity(self.root / folder)
                with os.scandir(self.root / folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise DataError(f"source {name_of(str(self.root))} can't be read ({error.strerror})") from error
                self.beside.add(f"{UNREAD} folder ({error.strerror})", folder.rstrip("/"))
                continue
            if identity in above:
                self.beside.add("link to a folder above the source", folder.rstrip("/"))
            elif identity in self._seen:
                self.beside.add("link to a folder that is read already", folder.rstrip("/"))
            else:
                self._seen.add(identity)
                todo += reversed([name for entry in found if (name := self._folder(folder, entry))])
                yield folder, [entry.name for entry in found if self._is_file(folder, entry)]

    def _folder(self, folder: str, entry: "os.DirEntry[str]") -> str | None:
        """The name of a folder that is to be read now; links wait."""
        try:
            if not entry.is_dir() or (self.depth is not None and folder.count("/") >= self.depth):
                return None
        except OSError:
            return None  # _is_file counts it
        if entry.name.startswith("."):
            self.beside.add("hidden folder", folder + entry.name)
        elif entry.is_symlink():
            self._links.append(folder + entry.name + "/")
        else:
            return folder + entry.name + "/"
        return None

    def _is_file(self, folder: str, entry: "os.DirEntry[str]") -> bool:
        name = folder + entry.name
        try:
            if entry.is_dir():
                return False
            plain = entry.is_file()
            dangling = entry.is_symlink() and not os.path.exists(entry.path)
        except OSError as error:
            self.beside.add(f"{UNREAD} link ({error.strerror})", name)
            return False
        if entry.name.startswith("."):
            self.beside.add("hidden file", name)
        elif dangling:
            self.beside.add("link that leads nowhere", name)
        elif not plain:
            self.beside.add("special file (pipe, socket or device)", name)
        else:
            return True
        return False


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
