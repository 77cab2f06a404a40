"""How a run ends badly: errors with one clear line instead of a traceback, and the exit statuses of `python -m train`.

     0  finished, or stopped as asked; status.json says which
     1  failed for a reason that a restart does not cure: config, data refused, a diverged run, out of memory, a bug
    75  (EX_TEMPFAIL) failed for a reason that a restart may cure: a rank died or hangs, network, disk or device failed

A worker killed by a signal (status -n in Python, 128+n in a shell) died of something that a restart may cure, except
when a stop was asked for before its handlers stood: then it has lost nothing and the run counts as stopped. Of several
workers' statuses 1 counts before 75: the ranks that only lost a peer wait LINGER seconds, so that the one that knows
why ends first. After a failure status.json holds {"state": "failed", "error": ..., "exit_status": 1 or 75}.

What a launcher passes on in the environment: MOVA_STARTED, when the launch began (seconds since the epoch; a stop file
that is older is stale and removed, a younger one is obeyed, default: when the process began), and MOVA_DEADLINE, when
it will be ended from outside (seconds since the epoch; the run saves and stops early enough, as if asked to).
"""

from __future__ import annotations

from data.errors import DataError, ReadError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_RETRY = 75
LINGER = 1.0


class RunError(Exception):
    """A run cannot start or go on; the message names the value, the place and the remedy.

    retry: whether another attempt of the same command may succeed.
    """

    def __init__(self, message: str, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class RankError(RunError):
    """Seen by this rank alone, which must say it itself; the other ranks only notice that it is gone."""


def exit_status(error: BaseException) -> int:
    """The exit status of a process that ends with this error."""
    import torch  # here and below: programs that only name these errors start without it

    if isinstance(error, RunError):
        return EXIT_RETRY if error.retry else EXIT_FAILED
    if isinstance(error, DataError):
        return EXIT_RETRY if isinstance(error, ReadError) else EXIT_FAILED
    if isinstance(error, torch.OutOfMemoryError | PermissionError | NotImplementedError | RecursionError):
        return EXIT_FAILED
    return EXIT_RETRY if isinstance(error, OSError | RuntimeError) else EXIT_FAILED


def lost_peer(error: BaseException) -> bool:
    """Whether this error only says that a collective failed: the cause lies with another rank, or on the way to it."""
    if isinstance(error, RunError | DataError) or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe", "timed out waiting", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
