"""Nothing in a step makes the host wait for the device.

The meta device stands for a GPU here: what would be copied between it and the host, or asked of its values, is refused.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data.clip import Bucket
from model.joint import JointTransformer
from tests.shards import make_dataset
from tests.train import cases
from train import dataloader
from train.data_config import DataConfig
from train.engine.optim import ShardedOptimizer, update_squares
from train.engine.optim_config import OptimConfig
from train.monitor.bridge_probe import BridgeProbe
from train.objective.objective import Objective
from train.parallel.parts import GROUPS, tower_of
from train.parallel.step_sums import Flags, StepSignals
from train.step import forward_backward

META = torch.device("meta")
ASKING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class _Tensors(TorchFunctionMode):
    """Refuses tensors on the device that are made of Python's numbers: torch copies them there, and waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == META:
            assert isinstance(args[0], torch.Tensor), f"{func.__name__} of numbers on the device"
        return func(*args, **kwargs)


class _Copies(TorchDispatchMode):
    """Refuses copies between host and device that are not asynchronous, and questions about values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in ASKING, f"{name} asks the device for a value"
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            devices = {value.device.type for value in (*args, out) if isinstance(value, torch.Tensor)}
            asynchronous = kwargs.get("non_blocking") or (name == "aten::copy_" and True in args[2:])
            assert len(devices) < 2 or asynchronous, f"{name} between {devices}"
        return out


class _Count(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))


def test_a_step_launches_without_waiting(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, norms by group, clipping and update, what metrics add, and the sums over the ranks."""
    model = JointTransformer(cases.tiny_config()).to(META)
    optimizer = ShardedOptimizer(model, OptimConfig(warmup=0), None)
    monkeypatch.setattr(optimizer.inner, "step", lambda: None)  # torch's own kernel, which has no meta form
    for shard in optimizer.shards.values():
        moments = {key: torch.zeros_like(shard) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.inner.state[shard] = {"step": torch.ones((), device=META), **moments}
    probe = BridgeProbe(model.dual_tower_bridge, META)
    layout: Any = SimpleNamespace(device=META, world=1, sequence=SimpleNamespace(size=1))
    prepared = cases.global_batch(0, torch.float32)
    micro_batches = [cases.part(prepared, [0, 1]), cases.part(prepared, [2, 3])]

    def step() -> None:
        probe.active = True
        losses = forward_backward(model, micro_batches, cases.OBJECTIVE, "high", layout)
        norm = optimizer.global_norm()
        optimizer.step(1.0, norm)
        assert optimizer.squares is not None
        moved = update_squares(optimizer.held(), optimizer.inner, META)
        extra = {"noise": losses.noise.flatten(), "bridge": probe.take(), "update": moved, "grad": optimizer.squares}
        StepSignals().post(0, losses.share, losses.video, losses.audio, norm, Flags(save=True), extra)

    step()  # position tables are made once, and copied
    with _Tensors(), _Copies():
        step()


def test_the_last_update_is_measured_by_tower_in_few_operators() -> None:
    """Against AdamW's formula; the number of operators follows from the towers, not from their parameters."""
    optimizer = ShardedOptimizer(JointTransformer(cases.tiny_config()), OptimConfig(), None)
    generator, expected = torch.Generator().manual_seed(0), dict.fromkeys(GROUPS, 0.0)
    steps = {tower: 3.0 + number for number, tower in enumerate(GROUPS)}
    for name, shard in optimizer.shards.items():
        first, second = (torch.rand(shard.shape, generator=generator) for _ in range(2))
        count = steps[tower := tower_of(name)]
        optimizer.inner.state[shard] = {"step": torch.tensor(count), "exp_avg": first, "exp_avg_sq": second}
        rate = 2e-5 if tower == "dual_tower_bridge" else 1e-5
        moved = rate * first.double() / (1 - 0.9**count) / ((second.double() / (1 - 0.95**count)).sqrt() + 1e-8)
        expected[tower] += moved.square().sum().item()
    shards = list(optimizer.held())
    with _Count() as operators:
        found = update_squares(shards, optimizer.inner, torch.device("cpu"))
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-5)
    assert len(shards) > 200 and operators.number <= 30 * len(GROUPS)


def test_micro_batches_lie_where_a_gpu_copies_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every tensor of every micro-batch of the stream, locked for the rank's own GPU (stand-ins lock and choose it)."""
    chosen: list[torch.device] = []
    locked: set[int] = set()

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        locked.add(id(copy := tensor.clone()))
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    bucket = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
    make_dataset(tmp_path / "data", [(bucket, 4)], dim=cases.TEXT_DIM)
    config = DataConfig(path=str(tmp_path / "data"), batch_size=2, micro_batch=2, reader_threads=0)
    objective = Objective(cases.OBJECTIVE, ("high", "low"))
    found = {}
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        layout: Any = SimpleNamespace(device=device, dp_rank=0, dp_world=1, sequence=SimpleNamespace(size=1))
        parts = dataloader.open_data(config, cases.TEXT_DIM)
        stream = dataloader.open_stream(
            parts, dataloader.start_state(parts, config, 0), config, layout, objective, 0, 6
        )
        (found[device.type],) = next(iter(stream))
        stream.close()
        dataloader.close_data(parts)
    assert chosen and set(chosen) == {torch.device("cuda", 1)}
    for which in ("batch", "draws"):
        mine, plain = (vars(getattr(found[kind], which)) for kind in ("cuda", "cpu"))
        tensors = [name for name, value in plain.items() if isinstance(value, torch.Tensor)]
        assert tensors and all(id(mine[name]) in locked and id(plain[name]) not in locked for name in tensors)
        assert all(torch.equal(mine[name], plain[name]) for name in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_reading_a_steps_sums_does_not_wait_for_what_was_launched_since(tmp_path: Path) -> None:
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        signals, one = StepSignals(), torch.ones(2, device="cuda")
        for step in range(2):  # the first one makes the communicator
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            signals.post(step, one[0], one, one, one[1], Flags(save=True), {"more": 3 * one})
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda._sleep(2_000_000_000)  # cycles, about a second
            sums = signals.collect()
            busy = not torch.cuda.current_stream().query()
            torch.cuda.synchronize()
        assert busy and sums is not None and sums.flags == Flags(save=True)
        assert (sums.loss, sums.grad_norm, sums.extra) == (1.0, 1.0, {"more": [3.0, 3.0]})
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
