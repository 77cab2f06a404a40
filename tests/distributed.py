"""Many cases in one launch of several gloo processes: a launch costs seconds, a case does not.

    results = run_cases(2, {"name": (function, arguments)})     # functions live in an importable module
    results["name"][rank]                                       # what the function returned there

A case that raises ends its launch, and the error is raised here with the rank's traceback.
"""

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = tuple[Callable[..., Any], tuple]
TIMEOUT = datetime.timedelta(seconds=60)


def run_cases(world: int, cases: dict[str, Case]) -> dict[str, list[Any]]:
    """Run every case on `world` ranks, in order, in one launch."""
    with tempfile.TemporaryDirectory() as folder:
        ended: mp.ProcessExitedException | None = None
        try:
            mp.spawn(_worker, args=(world, cases, folder), nprocs=world, join=True)
        except mp.ProcessExitedException as error:
            ended = error  # perhaps of a rank that met the closed connection of one that failed: that one's news first
        files = [f"{folder}/rank{rank}" for rank in range(world)]
        outcomes = [torch.load(file, weights_only=False) if os.path.exists(file) else {} for file in files]
    for rank, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise AssertionError(f"case {outcome['case']!r} failed on rank {rank}:\n{outcome['error']}")
    if ended is not None:
        raise ended
    return {name: [outcome[name] for outcome in outcomes] for name in cases}


def _worker(rank: int, world: int, cases: dict[str, Case], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    results: dict[str, Any] = {}
    for name, (function, arguments) in cases.items():
        try:
            results[name] = function(*arguments)
        except BaseException:
            torch.save({"case": name, "error": traceback.format_exc()}, f"{folder}/rank{rank}")
            return  # the other ranks meet a closed connection and end as well
    torch.save(results, f"{folder}/rank{rank}")
    dist.destroy_process_group()
