"""File descriptors of a rank: how many it may need, and the limit raised to what the system allows.

gloo connects all pairs of a group's ranks, with a socket each; this counts an upper bound of the groups that a run
makes, whatever the layout. Does not import torch.
"""

from __future__ import annotations

import resource
import sys

GLOO_GROUPS = 5  # of all ranks: the default group, its checkpoints', and those of meshes where there are no GPUs
FILES = 1024  # shards that are held open, libraries, logs, NCCL's sockets


def descriptors_needed(world: int) -> int:
    """An upper bound on the descriptors that a rank of a world of this size has open."""
    return FILES + GLOO_GROUPS * (world - 1)


def most_descriptors() -> int:
    """The number of descriptors that this process may raise its limit to (the hard limit)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def raise_limit() -> None:
    """Raise this process's soft limit of open files to the hard one, which needs no privilege. It does not change if
    the system refuses (macOS rejects an infinite limit)."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return
