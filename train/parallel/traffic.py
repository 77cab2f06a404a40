"""Bytes that a rank sends in a step, by formula, and the layout table that a run prints at its start.

The formulas are checked against what the collectives of a real step are counted to send (train/monitor/counters.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import torch
from torch import nn

from model.joint import JointConfig, JointTransformer
from train.parallel.float8 import large_linears
from train.parallel.flops import step_flops
from train.parallel.host_memory import host_bytes_of, host_memory
from train.parallel.mesh import Layout, ParallelConfig, counted, sockets
from train.parallel.parallelize import recompute_kinds
from train.parallel.parts import ALL, GROUPS, forward_order, freeze, in_backward, tower_of
from train.parallel.recompute import units
from train.parallel.sequence.cores import shares
from train.parallel.workload import Workload

EXACT = (".time_embedding.", ".time_projection.")  # computed in the dtype of reduction, see parallelize.shard_model


def step_bytes(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload, kinds: list[str]
) -> dict[str, float]:
    """Bytes that leave this rank in one step, by mesh axis (FSDP2).

    `model`: whole or sharded, on any device, what is frozen without requires_grad; `kinds`: of recomputation, for each
    of `units(model)`. Left out: sums of single numbers (the norm, losses, flags).
    """
    found: dict[str, float] = {}
    fsdp, replicate = layout.world // layout.dp_replicate, layout.dp_replicate
    compute, wide = layout.compute.itemsize, torch.promote_types(layout.compute, torch.float32).itemsize
    gathered, reduced = 0, 0
    expert = _trained_expert(model)
    again = _in_backward(model, expert)
    names = {module: f"{name}." for name, module in model.named_modules()}
    passed = tuple(names[module] for module in again)
    active = names[model.expert(expert)]
    for name, parameter in model.named_parameters():
        if name.startswith("video_dit") and not name.startswith(active):
            continue  # one expert is active
        rows, rest = parameter.shape[0], math.prod(parameter.shape[1:])
        padded = -(-rows // fsdp) * fsdp * rest  # FSDP2 splits rows, as many for every rank
        # Gathered in forward, and where a gradient passes again in backward; the root, which holds the condition scale,
        # stays in between.
        times = 1 + name.startswith(passed)
        gathered += times * padded * (wide if any(part in name for part in EXACT) else compute)
        reduced += padded * wide * parameter.requires_grad
    reductions = workload.micro_batches if parallel.accumulate == "sharded" else 1
    found["fsdp"] = (workload.micro_batches * gathered + reductions * reduced) * (fsdp - 1) / fsdp
    found["dp_replicate"] = 2 * reduced / fsdp * (replicate - 1) / replicate
    if layout.sequence.size > 1:
        for axis, size in micro_batch_bytes(model, layout, workload, kinds, compute, wide).items():
            found[axis] = workload.micro_batches * size
    return {axis: size for axis, size in found.items() if size}


def _trained_expert(model: JointTransformer) -> str:
    """The expert whose steps send the most: one that trains, where there is one."""
    trains = [name for name in model.config.experts if next(model.expert(name).parameters()).requires_grad]
    return [*trains, "high"][0]


def _in_backward(model: JointTransformer, expert: str) -> set[nn.Module]:
    """The modules that a gradient passes through in a step of this expert."""
    order = [*forward_order(model, expert, video=True, audio=True)]
    return {module for unit, passed in zip(order, in_backward(order), strict=True) if passed for module in unit.modules}


def micro_batch_bytes(
    model: JointTransformer, layout: Layout, workload: Workload, kinds: list[str], compute: int, wide: int
) -> dict[str, float]:
    """Bytes that sequence parallelism sends for one micro-batch; compute, wide: bytes of an element.

    A recomputed unit sends again what its forward sent and checkpointing did not keep: "attention" and "outputs" keep
    rings and merges, "selective" Ulysses' exchanges too.
    """
    config, group, expert = model.config, layout.sequence, _trained_expert(model)
    passed = _in_backward(model, expert)
    kind_of = {module: kind for module, kind in zip(units(model), kinds, strict=True) if module in passed}
    blocks = model.expert(expert).blocks
    questions = model.dual_tower_bridge.video_to_audio_conditioners.values()
    forward, backward = attention_bytes(config, layout, workload, compute, wide)
    merged = bridge_bytes(config, group.size, workload, wide)
    again = {"ulysses": ("full", "attention", "outputs"), "ring": ("full",)}  # the kinds that send it again
    backwards = sum(block in passed for block in blocks)
    found = {}
    for axis, kinds_again in again.items():
        forwards = len(blocks) + sum(kind_of.get(block) in kinds_again for block in blocks)
        found[axis] = forwards * forward[axis] + backwards * backward[axis]
    merges = len(questions) + sum(kind_of.get(conditioner) == "full" for conditioner in questions)
    returns = sum(conditioner in passed for conditioner in questions)
    return found | {"sequence": merges * merged[0] + returns * merged[1]}


def attention_bytes(
    config: JointConfig, layout: Layout, workload: Workload, compute: int, wide: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that the video self-attention of one block sends: (forward, backward), each {"ulysses": ..., "ring":
    ...}."""
    group, video = layout.sequence, config.video
    ulysses, ring = group.ulysses, group.ring
    width = video.dim // video.num_heads
    lengths = shares(workload.video_tokens(config), group.size)
    row, column = group.position // ulysses, group.position % ulysses
    heads = shares(video.num_heads, ulysses)
    mine = lengths[group.position]
    in_row = sum(lengths[row * ulysses : (row + 1) * ulysses])
    elements = workload.clips * width
    element = elements * compute
    # q, k, v of my tokens for the heads of others, answers of my heads for the tokens of others; backward the reverse.
    away, home = mine * (video.num_heads - heads[column]), (in_row - mine) * heads[column]
    there, back = {"ulysses": float((3 * away + home) * element)}, {"ulysses": float((away + 3 * home) * element)}
    # Keys and values of every row but one pass by; in backward as well, and their gradients, in `wide`, once round.
    rows = [sum(lengths[i * ulysses : (i + 1) * ulysses]) for i in range(ring)]
    passing = [rows[(row - turn) % ring] for turn in range(ring)]
    there["ring"] = float(2 * sum(passing[:-1]) * heads[column] * element)
    gradients = 2 * sum(passing) * heads[column] * elements * wide
    back["ring"] = there["ring"] + gradients if ring > 1 else 0.0
    return there, back


def bridge_bytes(config: JointConfig, ranks: int, workload: Workload, wide: int) -> tuple[float, float]:
    """Bytes that one Bridge layer sends: (forward, backward). Merges of the audio's queries, and of pooled frames."""
    around = 2 * (ranks - 1) / ranks * workload.clips * wide
    heads, head = config.audio.dim // config.bridge.head_dim, config.bridge.head_dim
    questions = workload.audio_tokens(config) * heads
    forward, backward = questions * (head + 2), questions * head  # largest, then values with their weight
    if config.bridge.pooled_adaln:
        frames, width = workload.frames(config) * heads, config.video.dim // heads
        forward, backward = forward + frames * (width + 2), backward + frames * width
    return around * forward, around * backward


def layout_rows(
    config: JointConfig,
    parallel: ParallelConfig,
    layout: Layout,
    workload: Workload,
    average: bool = False,
    trained: Collection[str] = ALL,
) -> list[tuple[str, str]]:
    """The table at a run's start: how ranks share the model, the work and traffic of one rank in a step, and the host
    memory that it needs. `average`: whether averages of the weights are kept; `trained`: the towers that are not
    frozen."""
    with torch.device("meta"):
        model = JointTransformer(config)
    freeze(model, trained)
    kinds = recompute_kinds(model, parallel, layout, workload)
    group = layout.sequence
    fsdp = layout.world // layout.dp_replicate
    tokens, heads = shares(workload.video_tokens(config), group.size), shares(config.video.num_heads, group.ulysses)
    grid = " x ".join(str(n) for n in workload.grid)
    flops = step_flops(config, workload.grid, workload.audio_steps, trained) * workload.clips * workload.micro_batches
    units = Counter(kinds)
    compute = str(layout.compute).removeprefix("torch.")
    compute += f" ({layout.compute_reason})" if layout.compute_reason else ""
    compute += "" if parallel.residual == "compute" else f", hidden states in at least {parallel.residual}"
    rows = [
        ("ranks", f"{layout.world} on {layout.device.type}, {parallel.engine}, compute in {compute}"),
        ("attention", layout.attention.describe()),
        ("trained", _trained_parts(model)),
        ("samples", f"{counted(layout.dp_world, 'group')} of {counted(group.size, 'rank')}, each with its own samples"),
        ("weights, optimizer", f"split over {counted(fsdp, 'rank')}, {counted(layout.dp_replicate, 'copy', 'copies')}"),
        ("a step of a group", f"{workload.micro_batches} x {workload.clips} clips of {grid} latents, "
                              f"{workload.audio_steps} of sound (largest bucket)"),
        ("video tokens", f"{sum(tokens):,} per clip, {_range(tokens)} per rank"),
        ("audio tokens", f"{workload.audio_tokens(config):,} per clip, on every rank"),
        ("video heads", f"{config.video.num_heads}, {_range(heads)} per rank; ring of {group.ring}"),
        ("recomputed", ", ".join(f"{kind} in {count} units" for kind, count in sorted(units.items()))),
        ("FLOPs", f"{flops / group.size / 1e12:,.3g} TFLOP per rank and step, without recomputation"),
    ]  # fmt: skip
    if parallel.linear != "compute":
        how = ", emulated" if parallel.linear == "float8_emulated" else ""
        rows.append(("float8", f"{sum(1 for _ in large_linears(model))} linears of the video side{how}"))
    if parallel.compile != "none":
        rows.append(("compiled", f"{len(kinds)} units by {parallel.compile}"))
    if parallel.engine == "fsdp2":
        for axis, size in step_bytes(model, parallel, layout, workload, kinds).items():
            rows.append((f"sent over {axis}", f"{size / 1e6:,.3g} MB per rank and step"))
    on_gpus = layout.device.type == "cuda"
    rows.append(("sockets", f"at most {sockets(parallel, layout.world, on_gpus):,} of the first rank's process groups"))
    rows.append(("host memory", host_memory(host_bytes_of(model, parallel, layout.world, average, trained=trained))))
    return rows


def _trained_parts(model: JointTransformer) -> str:
    """The parts that train, and how many of the weights these are."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[GROUPS[tower_of(name)]] = sizes.get(GROUPS[tower_of(name)], 0) + parameter.numel()
    trained = {GROUPS[tower_of(name)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = "all" if trained == sizes.keys() else ", ".join(part for part in sizes if part in trained)
    return f"{named}: {sum(sizes[part] for part in trained):,} of {sum(sizes.values()):,} weights"


def _range(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} or {max(values):,}"
