"""Retries failed reads: most errors of disks and networks are temporary."""

import time
from collections.abc import Callable
from typing import TypeVar

from data.errors import ReadError

LOCAL_WAITS = (0.2, 1.0, 3.0)  # seconds before each new attempt
REMOTE_WAITS = (0.5, 1.0, 3.0, 8.0, 20.0)

T = TypeVar("T")


def retried(read: Callable[[], T], what: str, remote: bool) -> T:
    """What `read` returns. An OSError is tried again; the last one is a ReadError that names `what`."""
    waits = REMOTE_WAITS if remote else LOCAL_WAITS
    for wait in (*waits, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                remedy = "check the connection and the store" if remote else "check the file system"
                message = f"{what} can't be read after {len(waits) + 1} attempts ({error}); {remedy}, then try again"
                raise ReadError(message) from error
            time.sleep(wait)
    raise AssertionError("unreachable")
