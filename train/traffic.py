"""Bytes that a rank sends in a step, by formula, and the table of a layout that a run shows at its start.

The formulas are checked against what the collectives of a real step are counted to send (train/counters.py).
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from model.joint import JointConfig, JointTransformer
from train.flops import forward_flops
from train.mesh import DTYPES, Layout, ParallelConfig, counted
from train.parallelize import recompute_kinds
from train.recompute import units
from train.sequence import shares
from train.workload import Workload

EXACT = (".time_embedding.", ".time_projection.")  # computed in the dtype of reduction, see parallelize.shard_model


def step_bytes(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload, kinds: list[str]
) -> dict[str, float]:
    """Bytes that leave this rank in one step, by mesh axis (FSDP2).

    `model`: whole or sharded, on any device; `kinds`: of recomputation, for each of `units(model)`. Left out: sums of
    single numbers (the norm, losses, flags).
    """
    found: dict[str, float] = {}
    fsdp, replicate = layout.world // layout.dp_replicate, layout.dp_replicate
    compute = DTYPES[parallel.compute].itemsize
    wide = torch.promote_types(DTYPES[parallel.compute], torch.float32).itemsize
    gathered, reduced = 0, 0
    for name, parameter in model.named_parameters():
        if name.startswith("video_dit_2."):  # one expert of equal size is active
            continue
        rows, rest = parameter.shape[0], math.prod(parameter.shape[1:])
        padded = -(-rows // fsdp) * fsdp * rest  # FSDP2 splits rows, as many for every rank
        # Gathered in forward and again in backward; the root, which holds the condition scale, stays in between.
        times = 1 if name.endswith("condition_scale") else 2
        gathered += times * padded * (wide if any(part in name for part in EXACT) else compute)
        reduced += padded * wide
    reductions = workload.micro_batches if parallel.accumulate == "sharded" else 1
    found["fsdp"] = (workload.micro_batches * gathered + reductions * reduced) * (fsdp - 1) / fsdp
    found["dp_replicate"] = 2 * reduced / fsdp * (replicate - 1) / replicate
    if layout.sequence.size > 1:
        for axis, size in micro_batch_bytes(model, layout, workload, kinds, compute, wide).items():
            found[axis] = workload.micro_batches * size
    return {axis: size for axis, size in found.items() if size}


def micro_batch_bytes(
    model: JointTransformer, layout: Layout, workload: Workload, kinds: list[str], compute: int, wide: int
) -> dict[str, float]:
    """Bytes that sequence parallelism sends for one micro-batch; compute, wide: bytes of an element.

    A unit that is computed again sends again what its forward sent.
    """
    config, group = model.config, layout.sequence
    recomputed = {module for module, kind in zip(units(model), kinds, strict=True) if kind != "none"}
    blocks = model.video_dit.blocks
    questions = model.dual_tower_bridge.video_to_audio_conditioners.values()
    forwards = len(blocks) + sum(block in recomputed for block in blocks)
    merges = len(questions) + sum(conditioner in recomputed for conditioner in questions)
    forward, backward = attention_bytes(config, layout, workload, compute)
    merged = bridge_bytes(config, group.size, workload, wide)
    found = {axis: forwards * forward[axis] + len(blocks) * backward[axis] for axis in forward}
    return found | {"sequence": merges * merged[0] + len(questions) * merged[1]}


def attention_bytes(
    config: JointConfig, layout: Layout, workload: Workload, compute: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What video self-attention of one block sends: (forward, backward), each {"ulysses": ..., "ring": ...}."""
    group, video = layout.sequence, config.video
    ulysses, ring = group.ulysses, group.ring
    width = video.dim // video.num_heads
    lengths = shares(workload.video_tokens(config), group.size)
    row, column = group.place // ulysses, group.place % ulysses
    heads = shares(video.num_heads, ulysses)
    mine = lengths[group.place]
    in_row = sum(lengths[row * ulysses : (row + 1) * ulysses])
    element = workload.clips * width * compute
    # q, k, v of my tokens for the heads of others, answers of my heads for the tokens of others; backward the reverse.
    away, home = mine * (video.num_heads - heads[column]), (in_row - mine) * heads[column]
    there, back = {"ulysses": float((3 * away + home) * element)}, {"ulysses": float((away + 3 * home) * element)}
    # Keys and values of every row but one pass by; in backward all of them, with their gradients, once round.
    rows = [sum(lengths[i * ulysses : (i + 1) * ulysses]) for i in range(ring)]
    passing = [rows[(row - turn) % ring] for turn in range(ring)]
    there["ring"] = float(2 * sum(passing[:-1]) * heads[column] * element)
    back["ring"] = float(4 * sum(passing) * heads[column] * element) if ring > 1 else 0.0
    return there, back


def bridge_bytes(config: JointConfig, ranks: int, workload: Workload, wide: int) -> tuple[float, float]:
    """What one Bridge layer sends: (forward, backward). Merges of the audio's questions, and of pooled frames."""
    around = 2 * (ranks - 1) / ranks * workload.clips * wide
    heads, head = config.audio.dim // config.bridge.head_dim, config.bridge.head_dim
    questions = workload.audio_tokens(config) * heads
    forward, backward = questions * (head + 2), questions * head  # largest, then values with their weight
    if config.bridge.pooled_adaln:
        frames, width = workload.frames(config) * heads, config.video.dim // heads
        forward, backward = forward + frames * (width + 2), backward + frames * width
    return around * forward, around * backward


def layout_rows(
    config: JointConfig, parallel: ParallelConfig, layout: Layout, workload: Workload
) -> list[tuple[str, str]]:
    """The table at a run's start: who shares what, what one rank has before it in a step, what it sends."""
    with torch.device("meta"):
        model = JointTransformer(config)
    kinds = recompute_kinds(model, parallel, layout, workload)
    group = layout.sequence
    fsdp = layout.world // layout.dp_replicate
    tokens, heads = shares(workload.video_tokens(config), group.size), shares(config.video.num_heads, group.ulysses)
    grid = " x ".join(str(n) for n in workload.grid)
    flops = (
        3 * workload.clips * workload.micro_batches * forward_flops(config, workload.grid, workload.audio_steps).total
    )
    units = Counter(kinds)
    rows = [
        ("ranks", f"{layout.world} on {layout.device.type}, {parallel.engine}, compute in {parallel.compute}"),
        ("samples", f"{counted(layout.dp_world, 'group')} of {counted(group.size, 'rank')}, each gets its own"),
        ("weights, optimizer", f"split over {counted(fsdp, 'rank')}, {counted(layout.dp_replicate, 'copy', 'copies')}"),
        ("a step of a group", f"{workload.micro_batches} x {workload.clips} clips of {grid} latents, "
                              f"{workload.audio_steps} of sound (largest bucket)"),
        ("video tokens", f"{sum(tokens):,} a clip, {_range(tokens)} a rank"),
        ("audio tokens", f"{workload.audio_tokens(config):,} a clip, on every rank"),
        ("video heads", f"{config.video.num_heads}, {_range(heads)} a rank; ring of {group.ring}"),
        ("recomputed", ", ".join(f"{kind} in {count} units" for kind, count in sorted(units.items()))),
        ("FLOPs", f"{flops / group.size / 1e12:,.3g} TFLOP a rank and step, without what is computed again"),
    ]  # fmt: skip
    if parallel.engine == "fsdp2":
        for axis, size in step_bytes(model, parallel, layout, workload, kinds).items():
            rows.append((f"sent over {axis}", f"{size / 1e6:,.3g} MB a rank and step"))
    return rows


def _range(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} or {max(values):,}"
