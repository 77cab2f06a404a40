"""Atomic, durable writes: files and folders get their name only when complete, and keep it through a power failure."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
HERE = -100  # AT_FDCWD
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.partial")
STALE = 86400.0  # seconds after which nobody still writes a file of such a name

_swept: set[Path] = set()


def temporary(path: Path) -> Path:
    """The temporary name under which `path` is written until it is complete; for one writer at a time."""
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, then sync and rename it: never half a file at `path`.

    content: text (as UTF-8), bytes, or a function that creates the file at the path it is given.

    Several writers may write at once: each uses its own temporary name, and the last one wins. A failure raises its
    own error and leaves nothing behind; what a killed writer left is removed when a process first writes into that
    folder a day later.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        if isinstance(content, str):
            unfinished.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            unfinished.write_bytes(content)
        else:
            content(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    _sweep(path.parent)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder long ago; once per process."""
    if folder in _swept:
        return
    _swept.add(folder)
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if LEFTOVER.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - STALE:
                os.unlink(entry)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a file system that cannot do so is ignored."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, final: Path) -> None:
    """Give the folder `new` the name `final`, replacing an older one; a process that has that open keeps it.

    In one step if the system supports it; otherwise a kill in between leaves the older one as `<final>.old`, which
    `recover_folder` brings back.
    """
    sync_folder(new)
    old = final.with_name(f"{final.name}.old")
    if not final.exists():
        os.rename(new, final)
    elif _exchange(new, final):
        shutil.rmtree(new)
    else:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(new, final)
        shutil.rmtree(old)
    sync_folder(final.parent)


def recover_folder(final: Path) -> None:
    """Undo a replace_folder that was killed halfway."""
    old = final.with_name(f"{final.name}.old")
    if old.exists() and not final.exists():
        os.rename(old, final)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    answer: bool = renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0
    return answer
