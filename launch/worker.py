"""One worker of a launch: `python -m train`, tied to the life of its launcher.

A launcher that is killed outright cannot tell its workers. They see it within a second and ask themselves to stop
(SIGTERM), so they save a checkpoint and end, instead of training on unseen and writing into a run directory that
somebody has resumed.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

from launch.snapshot import check_runs_from

POLL = 1.0  # seconds between two looks at the parent


def follow_parent(parent: int) -> None:
    """Get SIGTERM when process `parent`, this process's own, has ended.

    By looking, not by the kernel's parent-death signal: that one is Linux's only, and goes by the parent's thread.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="parent", daemon=True).start()


if __name__ == "__main__":
    follow_parent(int(os.environ.pop("LAUNCHER_PID")))
    check_runs_from(os.environ["MOVA_CODE"])
    runpy.run_module("train", run_name="__main__", alter_sys=True)
