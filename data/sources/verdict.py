"""The name of a file and the reason for its verdict, in characters that any record and terminal can hold.

Names of files are bytes, of any kind. Records show what is no text as escapes: bytes that are not UTF-8 as `\\xe9`,
control characters and line breaks as `\\u000a`, and a backslash as two, so that two files never have one name. The true
path stays beside the name, and is what is opened.
"""

import re
from pathlib import Path

from data.errors import DataError

LONGEST = 300  # letters of a reason; messages of libraries can hold whole files
KINDS = 200  # different reasons that are counted apart; all stand in rejected.jsonl
OTHER = "other reasons"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escapes in place of control characters, line breaks and what is not Unicode."""
    return _UNPRINTABLE.sub(_escape, text)


def name_of(path: str) -> str:
    """The name by which records call a file; another one for every path."""
    return printable(path.replace("\\", "\\\\"))


def reason_of(error: BaseException, path: Path, stage: str = "") -> str:
    """Why a file or a window could not be used: a DataError's message, else stage, type and first line of the message.

    The file's own path or name is replaced by "it"; addresses in memory and times of day are left out: the reason is
    the same in every run.
    """
    try:
        message = str(error)
    except Exception:  # of a library's own class
        message = ""
    for form in (repr(str(path)), f"'{path}'", str(path), repr(path.name), f"'{path.name}'"):
        message = message.replace(form, "it")
    message = message.removeprefix("it: ")
    message = re.sub(r"; last error log: .*?(?=\)?$)", "", message, flags=re.DOTALL)  # PyAV's, often of another file
    lines = message.splitlines() or [""]
    if isinstance(error, DataError):
        message = " ".join(line.strip() for line in lines)
    else:
        message = f"{stage or 'a stage'} failed ({type(error).__name__}{': ' if lines[0] else ''}{lines[0]})"
    message = printable(re.sub(r"\[\d\d:\d\d:\d\d\] ?", "", re.sub(r"\b0x[0-9a-f]{4,}\b", "0x...", message)))
    return message if len(message) <= LONGEST else message[: LONGEST - 3] + "..."


def kind_of(reason: str) -> str:
    """The reason without what differs from file to file, for counting: numbers and names of other files."""
    kind = re.sub(r"(has the same content as ).*", r"\1another file", reason)
    return re.sub(r"(?<![\w.])(?<!Errno )(?<!signal )(?<!status )-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", "N", kind)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
