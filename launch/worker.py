"""One worker of a launch: `mova train`, tied to the life of its launcher.

A launcher that is killed outright cannot inform its workers. They notice within a second and send themselves SIGTERM,
so they save a checkpoint and end, instead of training on unnoticed and writing into a run directory that a user has
since resumed.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import threading
import time

from launch.snapshot import check_runs_from
from train.faults.garbage import importing

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


if __name__ == "__main__":
    follow_parent(int(os.environ.pop("LAUNCHER_PID")))
    check_runs_from(os.environ["MOVA_CODE"])
    with importing():
        importlib.import_module("train.loop")
    runpy.run_module("train", run_name="__main__", alter_sys=True)
