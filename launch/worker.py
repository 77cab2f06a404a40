"""Ties the life of a rank to that of the process that started it.

A launcher that is killed outright cannot inform its workers. They notice within a second and send themselves SIGTERM,
so they save a checkpoint and end, instead of training on unnoticed and writing into a run directory that a user has
since resumed.
"""

from __future__ import annotations

import os
import signal
import threading
import time

POLL = 1.0  # seconds between two checks of the parent


def follow_parent(parent: int) -> None:
    """Get SIGTERM when process `parent`, this process's own, has ended.

    By polling, not by the kernel's parent-death signal: that one exists on Linux only, and follows the parent's thread.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="parent", daemon=True).start()
