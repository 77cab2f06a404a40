"""Reads captions from text files, json and the cells of manifests, in UTF-8 only."""

import ast
import codecs
import errno
import json
import math
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sources.verdict import name_of

MARK = "\ufeff"  # a byte order mark, as a letter
MOST_BYTES = 1 << 20  # of a caption's file
MARKS = {  # byte order marks of other encodings; UTF-32's begin with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def decode(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte order mark. DataError that names the encoding for any others."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        mark = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
        why = f"it begins as {mark} does" if mark else f"byte {error.start} is 0x{data[error.start]:02x}"
        raise DataError(f"it is not UTF-8, the encoding that was tried ({why}); save it as UTF-8") from error


def captions_of(value: Any) -> list[str]:
    """All captions that a value of a json or manifest holds: words, a list of words, or the text of such a list.

    Null and empty words are no caption. DataError for anything else: numbers, objects, lists in lists.
    """
    if isinstance(value, str):
        value = list_in(value)
    found = []
    for words in value if isinstance(value, list) else [value]:
        if words is None or (isinstance(words, float) and math.isnan(words)):  # an empty cell of a Parquet file
            continue
        if not isinstance(words, str):
            raise DataError(f"its caption is not words: {repr(words)[:80]}; give a string, or a list of strings")
        if words := _sound(words):
            found.append(words)
    return found


def list_in(text: str) -> Any:
    """The list of strings or lists whose json or repr a text is, as tables without lists hold it; else the text."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")) or len(stripped) > MOST_BYTES:
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # not a list, or one that nests too deep
            continue
        if isinstance(value, list) and all(isinstance(entry, str | list | None) for entry in value):
            return value
    return text


def captions_beside(path: Path) -> list[str]:
    """Captions in `clip.txt`, else under "caption" in `clip.json`, of a file `clip.mp4`; [] without any.

    DataError, with the file's name, when there is one that can't be read or that holds something else than words.
    """
    for suffix in (".txt", ".json"):
        beside = path.with_name(path.stem + suffix)
        if beside == path or (data := _read(beside)) is None:
            continue
        try:
            text = decode(data)
            if suffix == ".txt":
                return [words] if (words := _sound(text)) else []
            values = json.loads(text)
            return captions_of(values.get("caption")) if isinstance(values, dict) else []
        except RecursionError:
            why = "it nests too deep"
        except (DataError, ValueError) as error:
            why = str(error)
        raise DataError(f"the caption in {name_of(beside.name)} can't be used: {why}")
    return []


def _read(path: Path) -> bytes | None:
    """The bytes of a caption's file, None when there is none."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ENAMETOOLONG:
            return None
        raise DataError(f"the caption in {name_of(path.name)} can't be read ({error.strerror})") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"the caption in {name_of(path.name)} has more than {MOST_BYTES} bytes; it is no caption")
    return data


def _sound(words: str) -> str:
    """The words, without space and byte order marks around them.

    DataError for what no UTF-8 text holds: NUL (UTF-16 without a mark), half of a pair of surrogates.
    """
    words = words.strip().strip(MARK).strip()
    if "\0" in words:
        raise DataError("its caption holds NUL characters: it was saved as UTF-16, UTF-8 was tried; save it as UTF-8")
    try:
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"its caption holds half of a pair of surrogates (U+{ord(words[error.start]):04X})") from error
    return words
