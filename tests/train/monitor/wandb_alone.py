"""python -m tests.train.monitor.wandb_alone NAME FOLDER: cases after which wandb's library is of no use in a
process."""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from core.run_dir import RunDir
from train.monitor.wandb_log import POLL, WandbLog


def until(condition: Callable[[], bool], seconds: float = 60) -> float:
    """Seconds until it holds, or so many."""
    begin = time.monotonic()
    while not condition() and time.monotonic() - begin < seconds:
        time.sleep(0.02)
    return time.monotonic() - begin


def begun(run: RunDir) -> WandbLog:
    log = WandbLog(run, "offline", "mova", {}, None)
    log.begin()
    until(lambda: log._sent == 0)
    return log


def death(run: RunDir) -> dict:
    """Its process is killed while it has nothing to do."""
    run.metrics.write_text('{"step": 0, "train/loss": 1.0}\n')
    log = begun(run)
    for process in log._processes:
        process.kill()
    seconds = until(lambda: log.trouble is not None)
    begin = time.monotonic()
    log.close()
    return {"trouble": log.trouble, "seconds": seconds, "closing": time.monotonic() - begin}


def after_deaths(run: RunDir) -> dict:
    """Starts in one process: the first loses its process, a dead one of somebody else's lies there too; the second is
    served to its end; a third loses its own."""
    first = death(run)["trouble"]
    command = shutil.copy(shutil.which("true") or "", run.root / "wandb-core")
    dead = psutil.Popen([command])
    until(lambda: dead.status() == psutil.STATUS_ZOMBIE)
    log = begun(run)
    served = [process.pid for process in log._processes]
    time.sleep(2 * POLL)  # looks at it
    with run.metrics.open("a") as file:
        file.write('{"step": 1, "train/loss": 0.5}\n')
    log.close()
    return {
        "first": first, "foreign": dead.pid, "served": served, "second": log.trouble, "sent": log._sent,
        "third": death(run)["trouble"],
    }  # fmt: skip


def backlog(run: RunDir, rows: int = 100_000, seconds: float = 6.0) -> dict:
    """A start that finds so many steps: what the thread spends on sending them, of the time that passes. By its pauses,
    which are as much longer than its work on a loaded machine as on an idle one."""
    row = {f"metric/{number}": 1.0 for number in range(40)}
    lines = (json.dumps({"step": step, "train/loss": 1.0, **row}) + "\n" for step in range(rows))
    run.metrics.write_text("".join(lines))
    paused, log = 0.0, None
    wait = threading.Event.wait

    def timed(event: threading.Event, timeout: float | None = None) -> bool:
        nonlocal paused
        begin = time.monotonic()
        try:
            return wait(event, timeout)
        finally:
            if log is not None and event is log._ended:
                paused += time.monotonic() - begin

    threading.Event.wait = timed
    log = WandbLog(run, "offline", "mova", {}, None)
    log.begin()
    until(lambda: paused > 0, 10.0)
    first, before, begin = log._sent, paused, time.monotonic()
    until(lambda: paused - before > seconds, 3 * seconds)
    passed = time.monotonic() - begin
    for process in log._processes:
        process.kill()
    return {"share": 1 - (paused - before) / passed, "sent": log._sent - first}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    place = RunDir(Path(sys.argv[2]) / "small")
    place.root.mkdir()
    print(
        json.dumps({"death": death, "after_deaths": after_deaths, "backlog": backlog}[sys.argv[1]](place)), flush=True
    )
    os._exit(0)
