"""The ranks of one attempt on this machine: `python -m launch.local.ranks run.id=x` imports what training needs and
composes the config once, forks a rank for each GPU or process, and waits for all of them.

To import is most of what a start costs. Forked ranks share it, and the memory of the code; nothing has used a device or
started a thread of its own by then. Each is `mova train` from there on, with the variables of torch for its rank, and
is named after it ("rank 0") in ps and top.

Signals that ask for a stop go on to the ranks; SIGUSR1 kills them. When one fails, the others are asked to end, and
killed later. How all ended is one line of JSON (`Ended`) for the launcher. Ranks notice when this process is gone, and
this process when the launcher is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from core.errors import EXIT_FAILED
from launch.rendezvous import LOOPBACK, hold_store
from launch.snapshot import check_runs_from
from launch.worker import follow_parent
from train.faults.garbage import importing
from train.faults.stop import STOP_SIGNALS

if TYPE_CHECKING:
    from train.__main__ import TrainProgram

KILL = signal.SIGUSR1
POLL = 0.1  # seconds between two checks of the ranks; those that fail within it failed together
GRACE = 30.0  # seconds to end by themselves for ranks that are left when one has failed
NAME = 15  # PR_SET_NAME of prctl(2)
SHARDED = "torch._dynamo"  # what FSDP2 imports while it wraps a model that several ranks share


@dataclass(frozen=True)
class Ended:
    """How the ranks ended. rank, code: of the first that failed (a signal is negative), None if none did; codes: the
    different exit codes of all that failed before the others were asked to end."""

    rank: int | None = None
    code: int | None = None
    codes: tuple[int, ...] = ()

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def of_line(cls, text: str) -> Ended:
        """From that line."""
        values = json.loads(text)
        return cls(values["rank"], values["code"], tuple(values["codes"]))


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch and training read of the environment of a rank."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # they join a store and open none
    }  # fmt: skip


def main() -> None:
    """The program. Its own exit status says nothing about the ranks."""
    launcher, world = int(os.environ.pop("LAUNCHER_PID")), int(os.environ.pop("MOVA_RANKS"))
    report = int(os.environ.pop("MOVA_REPORT"))
    os.set_inheritable(report, False)  # what ranks start, such as uploads, does not hold it
    check_runs_from(os.environ["MOVA_CODE"])
    with importing():
        program: TrainProgram = importlib.import_module("train.__main__").PROGRAM
        for module in ("train.loop", *([SHARDED] if world > 1 else [])):
            importlib.import_module(module)
    program = program.composed(sys.argv[1:])
    listener = socket.create_server((LOOPBACK, 0))
    # Held back while ranks are forked: a rank would inherit the handlers, and no rank may miss a request.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, KILL))
    ranks = {_fork(program, rank, world, listener, report): rank for rank in range(world)}
    family = Family(ranks, launcher)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, KILL))
    store = hold_store(listener, LOOPBACK)  # after the forks, since it has a thread
    ended = family.wait()
    with contextlib.suppress(OSError):  # the launcher is gone
        os.write(report, ended.as_line().encode())
    del store


def _fork(program: TrainProgram, rank: int, world: int, listener: socket.socket, report: int) -> int:
    """Start a rank; returns its process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of a linear algebra library, which
        child = os.fork()  # ends them before a fork
    if child:
        return child
    _run_rank(program, rank, world, listener, report, parent)


def _run_rank(
    program: TrainProgram, rank: int, world: int, listener: socket.socket, report: int, parent: int
) -> NoReturn:
    """Train as this rank, in a process of its own that ends here."""
    status = EXIT_FAILED
    try:
        os.environ |= variables(rank, world, listener.getsockname()[1])
        listener.close()
        os.close(report)
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(NAME, f"rank {rank}".encode(), 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, KILL))
        follow_parent(parent)
        status = program.begin()
    except BaseException:
        traceback.print_exc()
    finally:  # immediately: what follows in the caller is not for a rank
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


class Family:
    """The ranks, by process number, from their start to their end."""

    def __init__(self, ranks: dict[int, int], launcher: int) -> None:
        self._ranks, self._launcher = dict(ranks), launcher
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        signal.signal(KILL, self._kill)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGTERM)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for pid in [*self._ranks]:  # all are children of this process, so none of these numbers is another's
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> Ended:
        """Return when all ranks have ended."""
        failed: dict[int, int] = {}
        orphaned = False
        while self._ranks and not failed:
            if not orphaned and os.getppid() != self._launcher:
                orphaned = True
                self._send(signal.SIGTERM)
            time.sleep(POLL)
            failed = self._collect()
        if not failed:
            return Ended()
        first = min(failed, key=lambda rank: (failed[rank] < 0, rank))
        self._send(signal.SIGTERM)
        end = time.monotonic() + GRACE
        while self._ranks:
            if time.monotonic() > end:
                self._send(signal.SIGKILL)
            time.sleep(POLL)
            self._collect()
        return Ended(first, failed[first], tuple(sorted(set(failed.values()))))

    def _collect(self) -> dict[int, int]:
        """{rank: exit code} of those that failed since the last call. Those that have ended are forgotten."""
        failed: dict[int, int] = {}
        for pid in [*self._ranks]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank, code = self._ranks.pop(pid), os.waitstatus_to_exitcode(status)
                failed |= {rank: code} if code else {}
        return failed


def early(codes: Collection[int]) -> bool:
    """Whether ranks that failed with these codes did so because a stop was requested before they listened."""
    return all(code == -signal.SIGTERM for code in codes)


if __name__ == "__main__":
    main()
