"""User errors, shown as one clear line instead of a traceback, and the exit statuses.

     0  finished, or stopped on request; status.json tells which
     1  failed for a reason that a restart does not cure: config, rejected data, a diverged run, out of memory, a bug
    75  (EX_TEMPFAIL) failed for a reason that a restart may cure: a rank died or hangs; network, disk or device failed;
        data, a mount or a permission is missing after a restart, or once the run has trained (at a start by a user,
        anything missing is 1)

These are the statuses of `mova train`. The other programs end with 1 where the same command makes the same mistake (a
wrong key or value, a missing file, refused data), with 75 where it may succeed later (reading failed again and again,
disk full, a lost peer), with 130 after Ctrl-C. `mova launch` ends with 0 or 1, and with 130 after a Ctrl-C before
anything runs.

A worker killed by a signal (status -n in Python, 128+n in a shell) failed for a reason that a restart may cure, except
when a stop was requested before its signal handlers were installed: then it has lost nothing and the run counts as
stopped. Among several workers' statuses, 1 takes precedence over 75: ranks that only lost a peer wait LINGER seconds,
so that the rank that knows why ends first. After a failure status.json holds {"state": "failed", "error": ...,
"exit_status": 1 or 75}.

A launcher passes on in the environment: MOVA_STARTED, when the launch began (seconds since the epoch; an older stop
file is stale and removed, a newer one is obeyed; default: when the process began); MOVA_DEADLINE, when the job will be
killed (seconds since the epoch; the run saves and stops in time, as if asked to); MOVA_ATTEMPT, how many attempts of
the same submission came before (0: a user has just started the run).
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from core.secrets import without_secrets

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130
LINGER = 1.0
NO_ROOM = "no room"  # the cause in status.json when a run's folder can't be written: see NoRoomError
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
ABSENT = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)

_trained = False  # whether this process has trained a step: what is missing from then on was there


class UserError(Exception):
    """What a user can act on. The message names the value, where it is, and the remedy; programs print it as one line
    and end with `exit_status`.

    retry: whether another attempt of the same command may succeed. may_return: whether something is missing that an
    earlier attempt may have had, and that may come back.
    """

    retry = False
    may_return = False


class RunError(UserError):
    """A run cannot start or continue.

    retry: whether another attempt of the same command may succeed.
    """

    def __init__(self, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class NoRoomError(RunError):
    """Nothing can be written into the run's folder: disk full, quota reached, file system read-only or unmounted.

    Another attempt succeeds once there is free space again, not before.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, retry=True)


class RankError(RunError):
    """An error that only this rank sees, so it must report it itself; the others only notice that it is gone."""


def restarted() -> int:
    """The number of earlier attempts of the same submission; 0 when a user started the run."""
    number = os.environ.get("MOVA_ATTEMPT", "")
    return int(number) if number.isdecimal() else 0


def has_trained(yes: bool = True) -> None:
    """Record that this process has trained a step, so everything the run needs was available; or, with False, that
    another run begins."""
    global _trained
    _trained = yes


def gone(error: BaseException) -> bool:
    """Whether something that the run had before, in this attempt or an earlier one, may be missing: data, a mount."""
    return (_trained or restarted() > 0) and (isinstance(error, ABSENT) or getattr(error, "may_return", False))


def describe(error: BaseException) -> str:
    """One error as text, without secrets; for something missing with the node, as it may be missing there only."""
    words = without_secrets(str(error)) or type(error).__name__
    return at_restart(words) if gone(error) else words


def at_restart(words: str) -> str:
    """What is missing, with the node and the restart."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"node {node}, restart {restarted()}: {words} ({'it was there' if _trained else 'an attempt before had it'})"


def missing(words: str) -> RunError:
    """The error for something a run needs and lacks: a restart may find it again."""
    return RunError(at_restart(words), retry=True) if _trained or restarted() else RunError(words)


def exit_status(error: BaseException) -> int:
    """The exit status of a training process that ends with this error."""
    import torch  # here and below: programs that only name these errors start without it

    if gone(error):
        return EXIT_RETRY
    if isinstance(error, UserError):
        return EXIT_RETRY if error.retry else EXIT_FAILED
    if isinstance(error, (torch.OutOfMemoryError, NotImplementedError, RecursionError, *ABSENT)):
        return EXIT_FAILED
    return EXIT_RETRY if isinstance(error, OSError | RuntimeError) else EXIT_FAILED


def status_of(error: BaseException) -> int:
    """The exit status of a program other than training that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_RETRY if isinstance(error, UserError) and error.retry else EXIT_FAILED


def in_one_line(error: BaseException) -> str:
    """The error as shown to a user: one line, no [Errno 2], the file first."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    words = str(error).strip() or type(error).__name__
    return " ".join(line.strip() for line in words.splitlines() if line.strip())


def lacks_room(error: BaseException | None) -> bool:
    """Whether this error, or its cause on any rank, means that a file cannot be written for lack of space."""
    while error is not None:
        if isinstance(error, NoRoomError) or (isinstance(error, OSError) and error.errno in UNWRITABLE):
            return True
        failures = getattr(error, "failures", None)  # of a CheckpointException: {rank: (error, its stack)}
        if isinstance(failures, dict) and any(lacks_room(cause) for cause, *_ in failures.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


def lost_peer(error: BaseException) -> bool:
    """Whether this error only tells that a collective failed: the cause is on another rank or in the network."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe", "timed out waiting", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def end_process(status: int) -> NoReturn:
    """End this process with this status, once its threads have ended and its exit handlers have run.

    The interpreter is not finalized: a thread of a library (gloo, Arrow, a decoder) that needs it at that moment would
    abort the process, which then ends by SIGABRT whatever its status is.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does before it is finalized
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:  # it was closed when the program began
            sys.stdout.flush()
    except (OSError, ValueError) as error:  # a full disk, a pipe that nobody reads; closed meanwhile
        status = status or EXIT_FAILED
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            with suppress(OSError):
                print(f"error: standard output: {error.strerror}", file=sys.stderr)
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    os._exit(status)
