"""The decisions of a batch script before and after it runs the workers; does not import torch.

    python -m launch.slurm.job begin runs/try1 --job 12 --restart 0 --max-restarts 100 --max-failed-restarts 3
    python -m launch.slurm.job end runs/try1 --job 12 --restart 0 --status 0 --state RUNNING

`begin` exits with 0 if the attempt should be made, NOTHING_TO_DO if the run has already ended, NO_ROOM_YET if its
folder cannot be written (launch/room.py), 1 if it is given up.
`end` exits with 0 if all is done, 75 if another attempt is due, NO_ROOM_YET if it is due after a pause (it prints
"anew" if the attempt gained a step), 1 if the run has failed permanently.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from core.errors import EXIT_FAILED, EXIT_OK, EXIT_RETRY, NO_ROOM
from core.run_dir import RunDir
from core.terminal import print_without_fail
from launch.attempts import (
    CANCELLED,
    CRASHED,
    FINISHED,
    MARK,
    REFUSED,
    STOPPED,
    Attempts,
    Limits,
    how_it_ended,
    is_finished,
)
from launch.room import obstacle_to_saving

NOTHING_TO_DO = 3
NO_ROOM_YET = 73  # EX_CANTCREAT
LOCK_WAIT = 120.0  # seconds: processes of an attempt on a node that was lost may live on for a while


def begin(
    run: RunDir, job: str, restart: int, nodes: str, limits: Limits, follows: RunDir | None = None,
    lock_wait: float = LOCK_WAIT, waited: bool = False,
) -> int:  # fmt: skip
    """Decide whether this attempt should be made; record it if so. Returns the exit status of the program.

    follows: the run that must be finished before. lock_wait: seconds to wait for processes that still hold the run.
    waited: the previous attempt ended because nothing could be written, not even that.
    """
    attempts = Attempts(run)
    if follows is not None and not is_finished(follows):
        return _say(run, f"cannot begin: {follows.root}, from whose weights it starts, is not finished", EXIT_FAILED)
    if is_finished(run):
        return _say(run, "has already finished: nothing to do", NOTHING_TO_DO)
    stop = stop_reason(run, job, restart)
    if stop:
        return _say(run, stop, NOTHING_TO_DO)
    ends = [line["ended"] for line in attempts.current() if line["event"] == "end"]
    if ends and ends[-1] == REFUSED:
        return _say(run, "failed for a reason that a restart does not cure, see its status.json", EXIT_FAILED)
    if words := obstacle_to_saving(run):
        run.write_status("waiting", error=words, step=attempts.committed_step())
        return _say(run, f"waits for a writable folder: {words}", NO_ROOM_YET)
    last = attempts.current()[-1:]
    if waited and last and last[0]["event"] == "begin":
        attempts.end(last[0]["job"], last[0]["restart"], NO_ROOM, EXIT_RETRY)
    objection = attempts.objection(limits)
    if objection is None:
        deadline = time.monotonic() + lock_wait
        while run.holder() is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        if holder := run.holder():
            objection = f"it is being trained by {holder}"
    if objection is not None:
        if run.holder() is None:
            said = run.read_status().get("error")
            run.write_status(
                "failed", error=f"given up: {objection}" + (f"; last error: {said}" if said else ""),
                exit_status=EXIT_FAILED, step=run.committed_step(),
            )  # fmt: skip
        return _say(run, f"is given up: {objection}", EXIT_FAILED)
    attempts.begin(job, restart, nodes)
    print(attempts.restarts())  # the script hands it on as MOVA_ATTEMPT
    return EXIT_OK


def stop_reason(run: RunDir, job: str, restart: int) -> str | None:
    """A message if a stop file asks the run to stop. Removes one from an earlier attempt's signal; that of this attempt
    is kept, for the workers."""
    try:
        said = run.stop_file.read_text().split()
    except FileNotFoundError:
        return None
    if said[:1] != [MARK]:
        return f"was asked to stop ({run.stop_file}): delete that file, or launch it again"
    if said[1:3] != [job, str(restart)]:
        run.stop_file.unlink(missing_ok=True)
    return None


def end(run: RunDir, job: str, restart: int, status: int, state: str) -> int:
    """Record how the attempt ended. Returns the exit status of the program.

    state: the job's state according to SLURM, "" if it did not answer. A job that is being cancelled, or was requeued
        by
    SLURM itself, must not ask for another attempt; an unknown state is neither.
    """
    attempts = Attempts(run)
    ended = how_it_ended(run, status)
    if ended in (STOPPED, CRASHED, NO_ROOM) and state not in ("RUNNING", ""):
        ended = CANCELLED
    attempts.end(job, restart, ended, status)
    if ended == CANCELLED:
        return EXIT_OK if status == EXIT_OK else EXIT_FAILED
    if ended == NO_ROOM:
        begins = [line["step"] for line in attempts.current() if line["event"] == "begin"]
        if begins and attempts.committed_step() > begins[-1]:
            print("anew")
        return EXIT_FAILED if stop_reason(run, job, restart) else NO_ROOM_YET
    if ended == STOPPED and stop_reason(run, job, restart):
        _say(run, "was asked to stop and did", EXIT_OK)
        return EXIT_OK
    return {FINISHED: EXIT_OK, REFUSED: EXIT_FAILED}.get(ended, EXIT_RETRY)


def replaced(run: RunDir, job: str, restart: int, by: str, nodes: list[str]) -> int:
    """Record that another job, without these nodes, has replaced this one."""
    attempts = Attempts(run)
    attempts.end(job, restart, STOPPED, EXIT_OK)
    attempts.replaced(job, by, nodes)
    return _say(run, f"continues as job {by}, without {' '.join(nodes)}", EXIT_OK)


def waits(run: RunDir, job: str, by: str) -> int:
    """Record that another job, which begins later, has replaced this one."""
    Attempts(run).replaced(job, by, [])
    return _say(run, f"waits for a writable folder and continues as job {by}", EXIT_OK)


def _say(run: RunDir, words: str, status: int) -> int:
    print(f"run {run.root} {words}", file=sys.stderr)
    return status


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job", description="Called by submit.sh.")
    parser.add_argument("what", choices=("begin", "end", "replaced", "waits"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--max-failed-restarts", type=int, default=1)
    parser.add_argument("--follows", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--state", default="")
    parser.add_argument("--by", default="")
    parser.add_argument("--waited", action="store_true")
    given = parser.parse_args(arguments)
    run = RunDir(given.run)
    limits = Limits(given.max_restarts, given.max_failed_restarts)
    if given.what == "begin":
        follows = RunDir(given.follows) if given.follows else None
        return begin(run, given.job, given.restart, given.nodes, limits, follows, waited=given.waited)
    if given.what == "waits":
        return waits(run, given.job, given.by)
    if given.what == "replaced":
        return replaced(run, given.job, given.restart, given.by, given.nodes.split(","))
    return end(run, given.job, given.restart, given.status, given.state)


if __name__ == "__main__":
    print_without_fail("stderr")
    sys.exit(main(sys.argv[1:]))
