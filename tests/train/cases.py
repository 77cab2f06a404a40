"""What the ranks of tests/train do. Each case builds its own model and its own part of one global batch."""

import copy
import math
import random
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from data.batch import Batch
from data.clip import Bucket
from data.loader.state import DataState
from model.bridge import BridgeConfig
from model.init import initial_value
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import ShardedEngine
from train.engine.optim import ShardedOptimizer, local
from train.engine.optim_config import OptimConfig
from train.objective.noise import Prepared, draw
from train.objective.objective import Draws, Objective, ObjectiveConfig, StepLosses
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import build_model, fill_weights
from train.step import forward_backward

TEXT, TEXT_DIM = 5, 8
BUCKET = Bucket(frames=3, height=4, width=6, audio_steps=7, fps=24.0, has_video=True, has_audio=True)
OBJECTIVE = ObjectiveConfig(text_dropout=0.3, image_dropout=0.3, bridge_dropout=0.3)
OPTIM = OptimConfig(lr_tower=1e-3, lr_bridge=2e-3, weight_decay=0.01, clip=0.05, warmup=0)


def tiny_config(heads: int = 1, **bridge) -> JointConfig:
    """The smallest model with every part; widths that two and four ranks do not divide evenly. Its video has 18 tokens
    in frames of 6, which four ranks do not divide and whose frames they cut."""
    return JointConfig(
        video=TowerConfig(
            dim=48 * heads, num_heads=heads, num_layers=2, ffn_dim=50, in_dim=36, out_dim=16, text_dim=TEXT_DIM,
            freq_dim=16,
        ),
        audio=TowerConfig(
            dim=48, num_heads=1, num_layers=1, ffn_dim=30, in_dim=128, out_dim=128, text_dim=TEXT_DIM, freq_dim=16,
            patch_size=[1], rope="dac",
        ),
        bridge=BridgeConfig(head_dim=48, **bridge),
        text_length=TEXT,
    )  # fmt: skip


def busy_value(name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Random values everywhere (the real start has zeros that would hide faults)."""
    values = initial_value("busy/" + name.replace("bias", "b").replace("head.head", "hh"), shape, 3, 1)
    return (torch.where(values == 0, 0.1, values) * 3).flatten()[start:stop]


def global_batch(step: int, dtype: torch.dtype, slots: int = 4) -> Prepared:
    """A whole global batch: slot 1 has no sound, slot 2 is a left-over of weight 0."""
    g = torch.Generator().manual_seed(100 + step)
    rand = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    weight = torch.ones(slots)
    weight[2] = 0.0
    audio_weight = torch.ones(slots)
    audio_weight[1] = 0.0
    batch = Batch(
        step=step, bucket=BUCKET, keys=[f"k{i}" for i in range(slots)],
        sample_numbers=np.arange(slots, dtype=np.int64) + slots * step,
        video=rand(slots, 16, 3, 4, 6), audio=rand(slots, 128, 7), condition=rand(slots, 20, 3, 4, 6),
        text=rand(slots, TEXT, TEXT_DIM), empty_text=rand(TEXT, TEXT_DIM), weight=weight,
        video_weight=torch.ones(slots), audio_weight=audio_weight, total_weight=float(slots - 1),
    )  # fmt: skip
    draws = draw(batch, Objective(OBJECTIVE, ("high", "low")), seed=11)
    return Prepared(batch, convert(draws, dtype))


def convert(draws: Draws, dtype: torch.dtype) -> Draws:
    return replace(draws, noise_video=draws.noise_video.to(dtype), noise_audio=draws.noise_audio.to(dtype))


def some(whole: Any, rows: list[int]) -> Any:
    """Some slots of a Batch or of Draws."""

    def pick(value: Any, name: str) -> Any:
        if name in ("empty_text", "total_weight", "step", "bucket"):
            return value
        return [value[i] for i in rows] if isinstance(value, list) else value[rows]

    return type(whole)(**{f.name: pick(getattr(whole, f.name), f.name) for f in fields(whole)})


def part(prepared: Prepared, rows: list[int]) -> Prepared:
    """Some slots of a batch."""
    return Prepared(some(prepared.batch, rows), some(prepared.draws, rows))


def my_micro_batches(prepared: Prepared, layout: Layout, micro: int) -> list[Prepared]:
    slots = list(range(len(prepared.batch.keys)))[layout.dp_rank :: layout.dp_world]
    return [part(prepared, slots[i : i + micro]) for i in range(0, len(slots), micro)]


def reference_model(config: JointConfig, dtype: torch.dtype) -> JointTransformer:
    """The plain model in one piece: no mesh, no FSDP."""
    model = JointTransformer(config).to(dtype)
    fill_weights(model, busy_value)
    return model


def sharded_model(config: JointConfig, parallel: ParallelConfig) -> tuple[JointTransformer, Layout]:
    layout = make_layout(parallel, torch.device("cpu"))
    model = build_model(config, parallel, layout, seed=0)
    fill_weights(model, busy_value)
    return model, layout


def full(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of all tensors, whole, in one exchange of all ranks: one for each was 60 % of a case of test_absent.py."""
    split = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if not split:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    mine = {
        name: compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        for name, tensor in split.items()
    }
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, mine)
    sent = torch.cat([local(tensor).contiguous().flatten().view(torch.uint8) for tensor in split.values()])
    sizes = [
        sum(math.prod(shape) * split[name].element_size() for name, (shape, _) in place.items()) for place in places
    ]
    parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in places]
    dist.all_gather(parts, torch.cat([sent, sent.new_zeros(max(sizes) - len(sent))]))
    found = {}
    for name, tensor in tensors.items():
        unset = float("nan") if tensor.is_floating_point() else -1
        found[name] = torch.full(tensor.shape, unset, dtype=tensor.dtype) if name in split else tensor.detach().clone()
    for place, part in zip(places, parts, strict=True):
        begin = 0
        for name, (shape, offset) in place.items():
            end = begin + math.prod(shape) * split[name].element_size()
            rows = part[begin:end].clone().view(split[name].dtype).view(shape)
            found[name][tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))] = rows
            begin = end
    return found


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative L2 difference over the names, and its name."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm().item() / max(b[n].norm().item(), 1e-12), n) for n in b)


# What the plain model in one piece is laid out as.
ONE_PROCESS: Any = SimpleNamespace(device=torch.device("cpu"), world=1, sequence=SimpleNamespace(size=1))


def backward(model, micro_batches, step: int, layout=ONE_PROCESS) -> StepLosses:
    expert = Objective(OBJECTIVE, ("high", "low")).expert(step)
    return forward_backward(model, micro_batches, OBJECTIVE, expert, layout)


def adamw_parity(compute: str, seed: int) -> float:
    """Three clipped AdamW steps with LR groups against torch's own optimizer and clipping on one process.

    Returns the relative L2 difference of what all parameters moved by.
    """
    config, dtype = tiny_config(), getattr(torch, compute)
    whole = reference_model(config, dtype)
    start = torch.cat([p.detach().flatten().double() for p in whole.parameters()])
    model, layout = sharded_model(config, ParallelConfig(compute_dtype=compute))
    sharded = ShardedOptimizer(model, OPTIM, layout.shard_group)
    groups = [
        {"params": [p for n, p in whole.named_parameters() if n.startswith("dual_tower") == bridge], "lr": lr}
        for bridge, lr in ((False, OPTIM.lr_tower), (True, OPTIM.lr_bridge))
    ]
    plain = torch.optim.AdamW(groups, betas=tuple(OPTIM.betas), eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    for step in range(2 * seed, 2 * seed + 3):
        prepared = global_batch(step, dtype)
        backward(whole, [prepared], step)
        torch.nn.utils.clip_grad_norm_(whole.parameters(), OPTIM.clip)
        plain.step()
        plain.zero_grad()
        backward(model, my_micro_batches(prepared, layout, 2), step, layout)
        sharded.step(1.0, sharded.global_norm())
    moved, expected = (
        torch.cat([p.flatten().double() for p in full(dict(m.named_parameters())).values()]) - start
        for m in (model, whole)
    )
    return ((moved - expected).norm() / expected.norm()).item()


def train_steps(model, optimizer, layout, steps: range) -> None:
    for step in steps:
        prepared = global_batch(step, torch.float32)
        backward(model, my_micro_batches(prepared, layout, 2), step, layout)
        optimizer.step(1.0, optimizer.global_norm())


def snapshot(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of this rank's shards and moments by name."""
    copies = {n: local(p.detach()).clone() for n, p in model.named_parameters()}
    for name, shard in optimizer.shards.items():
        for key, value in optimizer.inner.state.get(shard, {}).items():
            copies[f"{name}/{key}"] = value.clone()
    return copies


def idle_expert() -> list[dict]:
    """Invariant 6: while one expert trains, the other stays bit-identical (weights, moments) and unused; either one."""
    model, layout = sharded_model(tiny_config(), ParallelConfig())
    optimizer = ShardedOptimizer(model, OPTIM, layout.shard_group)
    train_steps(model, optimizer, layout, range(2))  # both experts have moments now
    results = []
    for step, (active, idle) in ((2, ("video_dit", "video_dit_2")), (3, ("video_dit_2", "video_dit"))):
        before = snapshot(model, optimizer)
        called: list[Any] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, _, called=called: called.append(m))
            for module in getattr(model, idle).modules()
        ]
        train_steps(model, optimizer, layout, range(step, step + 1))
        for hook in hooks:
            hook.remove()
        after = snapshot(model, optimizer)
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        kept = [v for n, v in before.items() if n.startswith(f"{idle}.") and "exp_avg" in n and v.numel()]
        results.append(
            {
                "idle_moved": sorted(n for n in moved if n.startswith(f"{idle}.")),
                "idle_called": len(called),
                "active_moved": sum(n.startswith(f"{active}.") for n in moved),
                "idle_moments": min(v.abs().max().item() for v in kept),
                "decay": OPTIM.weight_decay,
            }
        )
    return results


def bfloat16_compute() -> dict:
    """Invariant 9, and timesteps and tables that bfloat16 must not round."""
    config = tiny_config()
    exact, layout = sharded_model(config, ParallelConfig())
    rounded, _ = sharded_model(config, ParallelConfig(compute_dtype="bfloat16"))
    seen = {}

    def watch(_module, args):
        x, _text, time, rotary = args
        seen.update(x=x.dtype, time=time.dtype, rotary=rotary.cos.dtype)

    rounded.video_dit.blocks[0].register_forward_pre_hook(watch)
    rounded.video_dit.time_embedding.register_forward_pre_hook(lambda _m, args: seen.update(sinusoid=args[0].dtype))
    rounded.video_dit.time_embedding[0].register_forward_pre_hook(lambda m, _: seen.update(weight=m.weight.dtype))
    prepared = part(global_batch(0, torch.float32), [layout.dp_rank])
    losses = [backward(m, [prepared], 0).share.item() for m in (exact, rounded)]
    optimizer = ShardedOptimizer(rounded, OPTIM, layout.shard_group)
    optimizer.step(1.0, optimizer.global_norm())
    state = next(iter(optimizer.inner.state.values()))
    return {
        "relative": abs(losses[1] / losses[0] - 1),
        "differs": losses[0] != losses[1],
        "master": {local(p).dtype for p in rounded.parameters()},
        "moments": {state["exp_avg"].dtype, state["exp_avg_sq"].dtype},
        "seen": seen,
    }


def non_finite_gradient() -> dict:
    """A NaN on one rank suppresses the update on all of them."""
    model, layout = sharded_model(tiny_config(), ParallelConfig())
    optimizer = ShardedOptimizer(model, OPTIM, layout.shard_group)
    train_steps(model, optimizer, layout, range(2))
    before = snapshot(model, optimizer)
    prepared = global_batch(2, torch.float32)
    mine = my_micro_batches(prepared, layout, 2)
    if dist.get_rank() == 0:
        mine[0].draws.noise_video[0, 0, 0, 0, 0] = float("nan")
    backward(model, mine, 2, layout)
    norm = optimizer.global_norm()
    optimizer.step(1.0, norm)
    after = snapshot(model, optimizer)
    still = all(torch.equal(before[n], after[n]) for n in before)
    train_steps(model, optimizer, layout, range(3, 4))
    later = snapshot(model, optimizer)
    goes_on = all(bool(torch.isfinite(v).all()) for v in later.values()) and any(
        not torch.equal(after[n], later[n]) for n in after
    )
    return {"norm": norm.item(), "still": still, "goes_on": goes_on}


def global_generators() -> bool:
    """Invariant 13: a step neither reads nor advances a global generator."""
    model, layout = sharded_model(tiny_config(), ParallelConfig())
    optimizer = ShardedOptimizer(model, OPTIM, layout.shard_group)
    before = torch.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate()
    train_steps(model, optimizer, layout, range(1))
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    return (
        torch.equal(before[0], after[0])
        and all(np.array_equal(a, b) for a, b in zip(before[1], after[1]))
        and before[2] == after[2]
    )


def new_state(parallel: ParallelConfig) -> tuple[TrainState, Layout]:
    model, layout = sharded_model(tiny_config(), parallel)
    return TrainState(ShardedEngine(model, OPTIM, layout), DataState.start("f" * 8, [4], 0, 2)), layout


def whole_state(state: TrainState) -> dict[str, torch.Tensor]:
    return full(state.engine.tensors())


CONFIG = {"model": {"dim": 48}, "objective": {"boundary": 900.0}, "optim": {"clip": 0.05}, "steps": 10}


def save_checkpoint(folder: Path, replicate: int) -> dict[str, torch.Tensor]:
    """Three steps, then a checkpoint; returns everything in it, whole, and after two more steps the losses."""
    state, layout = new_state(ParallelConfig(dp_replicate=replicate))
    train_steps(state.engine.model, state.engine.optimizer, layout, range(3))
    state.step = state.data.position = 3
    if dist.get_rank() == 1:  # only this rank met the damaged sample
        state.data.quarantine.append({"key": "bad", "shard": "av-000000.tar", "reason": "checksum", "step": 2})
    saver = Saver(folder, CheckpointConfig(keep=2), CONFIG, layout.describe())
    saver.begin(state)
    saver.finish()
    return whole_state(state)


def load_checkpoint(folder: Path, replicate: int) -> dict:
    """A model with other weights takes over the newest checkpoint."""
    state, layout = new_state(ParallelConfig(dp_replicate=replicate))
    fill_weights(state.engine.model, lambda name, shape, start, stop: torch.full((stop - start,), 7.0))
    path = checkpoint.newest(folder)
    checkpoint.load(state, path, CONFIG, {})
    counts = state.engine.update_counts()
    result = {"tensors": whole_state(state), "step": state.step, "data": state.data.to_json(), "counts": counts}
    train_steps(state.engine.model, state.engine.optimizer, layout, range(3, 5))
    return result | {"after": whole_state(state)}
