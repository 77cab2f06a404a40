"""Agreement between ranks on the host: an action of the first rank for all, and lists gathered from all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from core.errors import EXIT_RETRY, NoRoomError, RunError, at_restart, exit_status, gone, lacks_room

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and return its result on all ranks; its RunError is raised on all of them."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except RunError as error:
            outcome[1] = error
        except OSError as error:
            message = f"{error.filename or 'a file of the run'}: {error.strerror or error}"
            message = at_restart(message) if gone(error) else message
            retry = exit_status(error) == EXIT_RETRY
            outcome[1] = NoRoomError(message) if lacks_room(error) else RunError(message, retry)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gather(mine: list[T]) -> list[T]:
    """The concatenated lists of all ranks, on every rank."""
    found: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return [item for items in found for item in items]
