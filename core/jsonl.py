"""An append-only file of JSON lines, which a full disk does not corrupt."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends records to a file, one per line. Records that cannot be written are kept for the next write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        cut_off = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"  # by death
        self._waiting = b"\n" if cut_off else b""
        self._lock = threading.Lock()  # the checkpoint writer syncs while training appends

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. A float that is not finite becomes null: JSON has no NaN."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._lock:
            self._waiting += (json.dumps(clean) + "\n").encode()
            try:
                self._write()
            except OSError:
                return  # `sync` says so, to whom it matters

    def sync(self) -> None:
        """Write all records through to the disk. OSError if that fails."""
        with self._lock:
            self._write()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close. Records that still cannot be written are lost, with a warning; call `sync` first to be sure."""
        with self._lock:
            try:
                self._write()
            except OSError as error:
                count = self._waiting.count(b"\n")
                logger.warning("%s: %d records cannot be written: %s", self.path, count, error.strerror)
            os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:  # a disk that becomes full takes a part of a write
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, [] if it does not exist; truncated lines are skipped."""
    try:
        return records_in(path.read_bytes())
    except FileNotFoundError:
        return []


def records_in(lines: bytes) -> list[dict[str, Any]]:
    """The records of these JSON lines; incomplete ones are skipped."""
    records = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
