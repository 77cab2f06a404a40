"""A ring of sequence-parallel ranks in one process: a thread a rank, with the sends of train/parallel/sequence/ring.py
in between."""

import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from train.parallel.sequence import ring


def run_ring(ranks: int, function: Callable[[int], Any]) -> list[Any]:
    """What function(rank) returns on every rank; within it `dist.get_rank` and the rotations are those of the ring."""
    here = threading.local()
    mail = [queue.SimpleQueue() for _ in range(ranks)]
    results: list[Any] = [None] * ranks

    def start(held: Any, length: int, group: Any) -> Any:
        mail[(here.rank + 1) % ranks].put([x.clone() for x in held])
        return length

    def finish(length: int) -> Any:
        received = mail[here.rank].get(timeout=60)
        assert all(x.shape[1] == length for x in received)
        return received

    def work(rank: int) -> None:
        here.rank = rank
        results[rank] = function(rank)

    with (
        patch.object(ring, "group_of", lambda _: None),
        patch.object(ring, "dist", SimpleNamespace(get_rank=lambda _: here.rank)),
        patch.object(ring, "_start_rotation", start),
        patch.object(ring, "_finish_rotation", finish),
    ):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(result is not None for result in results), "a rank failed, see its traceback"
    return results
