"""One worker of a launch: `python -m train`, tied to the life of its launcher.

A launcher that is killed outright cannot tell its workers. The kernel then asks them to stop (SIGTERM), so they save a
checkpoint and end, instead of training on unseen and writing into a run directory that somebody has resumed.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

from launch.snapshot import check_runs_from

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def follow_parent(parent: int) -> None:
    """Get SIGTERM when process `parent` ends. Linux only: elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    follow_parent(int(os.environ.pop("LAUNCHER_PID")))
    check_runs_from(os.environ["MOVA_CODE"])
    runpy.run_module("train", run_name="__main__", alter_sys=True)
