"""What the ranks of test_zero.py do: engines of every kind on the model and batches of tests/train/cases.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.loader.state import DataState
from model.joint import JointConfig
from tests.train import cases
from tests.train.cases import CONFIG, OBJECTIVE, OPTIM, global_batch, my_micro_batches, reference_model, tiny_config
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import Engine, build_engine
from train.engine.optim_config import OptimConfig
from train.objective.objective import Objective
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights
from train.step import forward_backward

# With a larger eps rounding in gradients that are as good as zero is not turned into steps of full size.
STEADY = replace(OPTIM, eps=1e-6)


def make_engine(config: JointConfig, optim: OptimConfig = OPTIM, **parallel: Any) -> tuple[Engine, Layout]:
    """An engine with the busy values of the other tests."""
    settings = ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    engine: Any = build_engine(config, settings, optim, layout, seed=0)
    if settings.engine == "fsdp2":
        fill_weights(engine.model, cases.busy_value)
    else:
        engine.fill(cases.busy_value)
    return engine, layout


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    return cases.full(engine.tensors())


def steps(engine: Engine, layout: Layout, which: range, micro: int = 2, nan: bool = False) -> list[float]:
    """Training steps; returns their norms."""
    norms = []
    for step in which:
        micro_batches = my_micro_batches(global_batch(step, torch.float32), layout, micro)
        if nan and dist.get_rank() == 0:
            micro_batches[0].draws.noise_video[0, 0, 0, 0, 0] = float("nan")
        expert = Objective(OBJECTIVE, ("high", "low")).expert(step)
        forward_backward(engine.model, micro_batches, OBJECTIVE, expert, layout, engine.backward)
        norms.append(engine.step(1.0, expert).item())
    return norms


def parity(engine_name: str, micro: int, heads: int, **parallel: Any) -> dict:
    """Three clipped AdamW steps with both experts against torch's optimizer and clipping on one process, float32."""
    config = tiny_config(heads)
    plain = reference_model(config, torch.float32)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n.startswith("dual_tower") == bridge], "lr": lr}
        for bridge, lr in ((False, STEADY.lr_tower), (True, STEADY.lr_bridge))
    ]
    adamw = torch.optim.AdamW(groups, betas=tuple(STEADY.betas), eps=STEADY.eps, weight_decay=STEADY.weight_decay)
    true_norms = []
    for step in range(3):
        cases.backward(plain, [global_batch(step, torch.float32)], step)
        true_norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), OPTIM.clip).item())
        adamw.step()
        adamw.zero_grad()
    engine, layout = make_engine(config, STEADY, engine=engine_name, **parallel)
    norms = steps(engine, layout, range(3), micro)
    tensors = whole(engine)
    moved = {name: tensors[f"model.{name}"] - start[name] for name in start}
    expected = {name: p.detach() - start[name] for name, p in plain.named_parameters()}
    first, first_expected = {}, {}
    for name, parameter in plain.named_parameters():
        first[name], first_expected[name] = tensors[f"optim.{name}.exp_avg"], adamw.state[parameter]["exp_avg"]
    return {
        "update": relative(moved, expected),
        "gradient": relative(first, first_expected),  # linear in it, so rounding is not blown up as in an update
        "norms": [abs(a / b - 1) for a, b in zip(norms, true_norms, strict=True)],
        "clipped": min(true_norms) > OPTIM.clip,
        "counts": {name.split(".")[0]: count for name, count in engine.update_counts().items()},
    }


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 difference of all values together."""
    a, b = (torch.cat([values[name].flatten().double() for name in expected]) for values in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def idle_and_nan(engine_name: str) -> dict:
    """Invariant 6, then a NaN on one rank, then a step that goes on."""
    engine, layout = make_engine(tiny_config(), engine=engine_name)
    steps(engine, layout, range(2))  # both experts have moments now
    before = whole(engine)
    steps(engine, layout, range(2, 3))  # high noise
    after = whole(engine)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    counts = engine.update_counts()
    bad = steps(engine, layout, range(3, 4), micro=1, nan=True)
    still = whole(engine)
    suppressed = after.keys() == still.keys() and all(torch.equal(after[key], still[key]) for key in after)
    still_counts = engine.update_counts()
    steps(engine, layout, range(4, 5))  # the other expert: what is left of the NaN must not come back
    later = whole(engine)
    return {
        "idle_moved": sorted(key for key in moved if ".video_dit_2." in key),
        "idle_moments": any(key.startswith("optim.video_dit_2.") for key in before),
        "active_moved": sum(key.startswith("model.video_dit.") for key in moved),
        "norm": bad[0],
        "suppressed": suppressed and counts == still_counts,
        "goes_on": all(bool(torch.isfinite(value).all()) for value in later.values())
        and any(not torch.equal(later[key], still[key]) for key in later),
    }


def round_trip(folder: Path, engines: list[str]) -> list[dict]:
    """Each engine takes over the last one's checkpoint, and writes its own after two more steps."""
    results = []
    for turn, name in enumerate(engines):
        engine, layout = make_engine(tiny_config(), engine=name)
        state = TrainState(engine, DataState.start("f" * 8, [4], 0, 2))
        loaded = None
        if turn:
            path = checkpoint.newest(folder)
            assert path is not None
            checkpoint.load(state, path, CONFIG, {})
            loaded = whole(engine)
        counts = engine.update_counts()
        norms = steps(engine, layout, range(state.step, state.step + 2 + (turn == 0)))
        state.step = state.data.position = state.step + 2 + (turn == 0)
        saver = Saver(folder, CheckpointConfig(keep=9), CONFIG, layout.describe())
        saver.begin(state)
        saver.finish()
        results.append({"loaded": loaded, "saved": whole(engine), "counts": counts, "norms": norms})
    return results


def unbroken(count: int) -> dict[str, torch.Tensor]:
    """The same steps under FSDP2 alone."""
    engine, layout = make_engine(tiny_config(), engine="fsdp2")
    steps(engine, layout, range(count))
    return whole(engine)


def bfloat16(engine_name: str, residual: str = "compute") -> dict:
    """Invariant 9: masters and moments float32; starting values are not rounded; the loss is near the exact one."""
    prepared = global_batch(0, torch.float32)
    plain = reference_model(tiny_config(), torch.float32)
    exact = cases.backward(plain, [prepared], 0).share.item()
    engine, layout = make_engine(tiny_config(), engine=engine_name, compute_dtype="bfloat16", residual=residual)
    states = set()
    engine.network.video_dit.blocks[1].register_forward_pre_hook(lambda _, given: states.add(given[0].dtype))
    start = whole(engine)
    losses = forward_backward(
        engine.model, my_micro_batches(prepared, layout, 1), OBJECTIVE, "high", layout, engine.backward
    )
    engine.step(1.0, "high")
    dist.all_reduce(losses.share)
    end = whole(engine)
    moved = {n: end[f"model.{n}"] - start[f"model.{n}"] for n, _ in plain.named_parameters()}
    return {
        "relative": abs(losses.share.item() / exact - 1),
        "differs": losses.share.item() != exact,
        "states": states,
        "start_exact": all(torch.equal(start[f"model.{n}"], p) for n, p in plain.named_parameters()),
        "dtypes": {value.dtype for value in end.values()},
        "largest_move": max(value.abs().max().item() for value in moved.values()),
        "moved_off_the_bfloat16_grid": any(
            not torch.equal(end[f"model.{n}"], end[f"model.{n}"].bfloat16().float()) for n in moved
        ),
    }
