"""A rank may open as many files as the system allows, and says beforehand where that is too few."""

import resource
import subprocess
import sys

import psutil
import pytest
import torch
import torch.distributed as dist

from launch.slurm import preflight
from launch.slurm.preflight import PreflightConfig, examine
from tests.distributed import run_cases
from train.parallel.descriptors import GLOO_GROUPS


def test_a_rank_raises_its_limit_to_the_hard_one() -> None:
    code = (
        "import resource; from train.parallel.descriptors import raise_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512)); raise_limit()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["512", "512"]


def test_a_node_whose_limit_is_too_low_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    config = PreflightConfig(free_gib=0)
    assert examine(config, 0, 16, tmp_path) == []
    (problem,) = examine(config, 0, 1024, tmp_path)
    assert problem == "a process may open 4096 files (ulimit -Hn), a rank of a run of 1024 needs up to 6139"
    assert preflight.descriptors_needed(1024) == 1024 + 5 * 1023


def grown_by_groups() -> list[int]:
    dist.all_reduce(torch.ones(1))
    counts = [psutil.Process().num_fds()]
    for _ in range(GLOO_GROUPS):
        dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo"))
        counts.append(psutil.Process().num_fds())
    return [after - before for before, after in zip(counts, counts[1:], strict=False)]


def test_a_gloo_group_takes_no_more_than_is_counted() -> None:
    """One socket a pair, and a few for the group itself."""
    world = 4
    for grown in run_cases(world, {"groups": (grown_by_groups, ())})["groups"]:
        assert world - 1 <= min(grown) and max(grown) <= world - 1 + 4, grown
