"""A file of JSON lines that only grows, and that a full disk does not break."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any


class Lines:
    """Appends records to a file, one a line. What can't be written waits and is written with the next record."""

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
        """Everything is on the disk when it returns. OSError when it can't be."""
        with self._lock:
            self._write()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """OSError when records are left that can't be written."""
        with self._lock:
            try:
                self._write()
            finally:
                os.close(self._descriptor)

    def _write(self) -> None:
        while self._waiting:  # a disk that becomes full takes a part of a write
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
