"""Inside the ranks: every process group of a run, and a rank that never comes to a collective of a sub-group."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.train import runs
from train import loop
from train.parallel.mesh import ParallelConfig, group_timeout, make_layout


def groups_of_a_run(root, data, *overrides):
    """[(size, time-out in seconds)] of all groups that this rank is in when the run ends."""
    found = []
    inner = loop.Training.run

    def spied(self):
        ending = inner(self)
        found.extend(
            (group.size(), group_timeout(group).total_seconds()) for group in dist.distributed_c10d._world.pg_map
        )
        return ending

    loop.Training.run = spied
    result = runs.train(root, data, "groups", "steps=2", "parallel.ring=2", "parallel.ulysses=2", *overrides)
    loop.Training.run = inner
    return result.get("ending"), found


def hang_in_a_sub_group(seconds):
    """Seconds that rank 0 waited for its neighbour, which stays away from a collective of theirs."""
    layout = make_layout(ParallelConfig(ulysses=2), torch.device("cpu"), timedelta(seconds=seconds))
    waited = 0.0
    if dist.get_rank() == 0:
        begin = time.monotonic()
        try:
            dist.all_reduce(torch.ones(2), group=layout.sequence.ulysses_group)
        except RuntimeError:
            waited = time.monotonic() - begin
    else:
        time.sleep(seconds + 4)
    return waited
