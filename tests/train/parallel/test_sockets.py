"""Process groups: how many sockets they take a rank, counted on real ones, and that GPUs' mesh groups have no gloo."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.distributed import run_cases
from train.checkpoint.checkpoint import CheckpointConfig
from train.checkpoint.saver import Saver
from train.dataloader import _share
from train.parallel import mesh
from train.parallel.mesh import ParallelConfig, make_layout, sockets

LAYOUTS = {"shards": {}, "replicas": {"dp_replicate": 2}, "shared samples": {"ulysses": 2}}
STORE = 5  # of the four ranks' store, which is a file in these tests


def held() -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


def opened(folder, name) -> int:
    """Sockets that a run with this layout adds to the group of all ranks."""
    before = held()
    layout = make_layout(ParallelConfig(**LAYOUTS[name]), torch.device("cpu"))
    kept.append((layout, Saver(folder, CheckpointConfig(), {}, ""), _share(layout)))
    return held() - before


kept: list = []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sockets")
    return run_cases(4, {"all": (held, ()), **{name: (opened, (folder, name)) for name in LAYOUTS}})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_as_many_sockets_as_the_formula_says(ranks, name):
    predicted = sockets(ParallelConfig(**LAYOUTS[name]), 4, on_gpus=False) - STORE
    counts = [everyone + added for everyone, added in zip(ranks["all"], ranks[name], strict=True)]
    assert max(counts) <= predicted and min(counts) >= 0.8 * predicted, (counts, predicted)


LARGE = [(64, {"ulysses": 8}, 210), (1024, {"dp_replicate": 16, "ulysses": 8}, 3090)]


@pytest.mark.parametrize("world,parallel,most", LARGE)
def test_on_gpus_only_the_groups_of_all_ranks_grow(world, parallel, most):
    assert 3 * world < sockets(ParallelConfig(**parallel), world, on_gpus=True) <= most


def test_mesh_groups_on_gpus_are_of_nccl_alone_bound_to_their_device_and_have_the_runs_timeout(monkeypatch):
    made, real, device, wait = [], dist.new_group, torch.device("cuda", 3), timedelta(minutes=7)
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())

    def new_group(ranks, **how):
        made.append((tuple(ranks), how))
        return real(ranks)

    monkeypatch.setattr(mesh.dist, "new_group", new_group)
    monkeypatch.setattr(mesh.dist, "get_backend", lambda *_: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(mesh.DeviceMesh, "from_group", lambda *args, **_: args)
    monkeypatch.setattr(mesh, "_choose_compute", lambda *_: (torch.bfloat16, ""))
    monkeypatch.setattr(mesh, "_choose_attention", lambda *_: mesh.Choice(mesh.Sdpa()))
    try:
        layout = make_layout(ParallelConfig(dp_replicate=2, ring=2, ulysses=2), device, wait)
        assert all(how == {"backend": "nccl", "device_id": device, "timeout": wait} for _, how in made)
        mine = [ranks for ranks, _ in made if 0 in ranks]
        assert mine == [(0, 8), tuple(range(8)), (0, 1, 2, 3), (0, 1), (0, 2)]
        assert len({ranks for ranks, _ in made}) == len(made) == 8 + 2 + 4 + 8 + 8
        assert layout.dp_rank == 0
        made.clear()
        make_layout(ParallelConfig(), device, wait)
        assert all(len(ranks) == 1 for ranks, _ in made)  # the group of all ranks is there already
    finally:
        dist.destroy_process_group()
