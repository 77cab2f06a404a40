"""What a batch script asks before and after it runs the workers; starts without torch.

    python -m launch.job begin runs/try1 --job 12 --restart 0 --max-restarts 100 --fruitless 3
    python -m launch.job end runs/try1 --job 12 --restart 0 --status 0 --state RUNNING

`begin` exits with 0 when the attempt should be made, NOTHING_TO_DO when the run has ended already, 1 when it is given
up.
`end` exits with 0 when all is done, 75 when another attempt is due, 1 when the run has failed for good.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

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
from train.errors import EXIT_FAILED, EXIT_OK, EXIT_RETRY
from train.run_dir import RunDir

NOTHING_TO_DO = 3
LOCK_WAIT = 120.0  # seconds: processes of an attempt on a node that was lost may live on for a while


def begin(
    run: RunDir, job: str, restart: int, nodes: str, limits: Limits, follows: RunDir | None = None,
    lock_wait: float = LOCK_WAIT,
) -> int:  # fmt: skip
    """Whether this attempt should be made; writes it down if so. Returns the exit status of the program.

    follows: the run that must be finished before. lock_wait: seconds to wait for processes that still hold the run.
    """
    attempts = Attempts(run)
    if follows is not None and not is_finished(follows):
        return _say(run, f"cannot begin: {follows.root}, from whose weights it starts, is not finished", EXIT_FAILED)
    if is_finished(run):
        return _say(run, "is finished already: nothing to do", NOTHING_TO_DO)
    stop = stop_reason(run, job, restart)
    if stop:
        return _say(run, stop, NOTHING_TO_DO)
    ends = [line["ended"] for line in attempts.current() if line["event"] == "end"]
    if ends and ends[-1] == REFUSED:
        return _say(run, "failed for a reason that a restart does not cure, see its status.json", EXIT_FAILED)
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
    return EXIT_OK


def stop_reason(run: RunDir, job: str, restart: int) -> str | None:
    """Words when somebody asked the run to stop, by the stop file. Removes the one of an earlier attempt's signal; that
    of this attempt stays, for the workers."""
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
    """Write down how the attempt ended. Returns the exit status of the program.

    state: of the job, as SLURM says it. Only a job that is RUNNING to it may ask for another attempt: one that is
    being cancelled, or was requeued by SLURM itself, must not.
    """
    attempts = Attempts(run)
    ended = how_it_ended(run, status)
    if ended in (STOPPED, CRASHED) and state != "RUNNING":
        ended = CANCELLED
    attempts.end(job, restart, ended, status)
    if ended == CANCELLED:
        return EXIT_OK if status == EXIT_OK else EXIT_FAILED
    if ended == STOPPED and stop_reason(run, job, restart):
        _say(run, "was asked to stop and did", EXIT_OK)
        return EXIT_OK
    return {FINISHED: EXIT_OK, REFUSED: EXIT_FAILED}.get(ended, EXIT_RETRY)


def replaced(run: RunDir, job: str, restart: int, by: str, nodes: list[str]) -> int:
    """Write down that another job, without these nodes, has taken this one's place."""
    attempts = Attempts(run)
    attempts.end(job, restart, STOPPED, EXIT_OK)
    attempts.replaced(job, by, nodes)
    return _say(run, f"goes on as job {by}, without {' '.join(nodes)}", EXIT_OK)


def _say(run: RunDir, words: str, status: int) -> int:
    print(f"run {run.root} {words}", file=sys.stderr)
    return status


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m launch.job", description="Called by submit.sh.")
    parser.add_argument("what", choices=("begin", "end", "replaced"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--fruitless", type=int, default=1)
    parser.add_argument("--follows", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--state", default="")
    parser.add_argument("--by", default="")
    given = parser.parse_args(arguments)
    run = RunDir(given.run)
    limits = Limits(given.max_restarts, given.fruitless)
    if given.what == "begin":
        return begin(run, given.job, given.restart, given.nodes, limits, given.follows and RunDir(given.follows))
    if given.what == "replaced":
        return replaced(run, given.job, given.restart, given.by, given.nodes.split(","))
    return end(run, given.job, given.restart, given.status, given.state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
