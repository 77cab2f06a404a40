"""Activation checkpointing of blocks and Bridge directions: what backward keeps, and what it computes again.

- `none`: everything is kept.
- `full`: only a block's inputs are kept; its forward runs twice.
- `selective`: attention outputs are kept too. At 43,000 tokens attention is more than half of a block's FLOPs, its
  output one tensor of many: most of the memory goes, most of the recomputation does not come.
- `budget`: one of the three for each block, such that a rank keeps at most so many GiB and recomputes the fewest FLOPs.

No random number is drawn in a forward, so no generator state is saved or restored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.block import Block
from model.bridge import Conditioner
from model.joint import JointConfig, JointTransformer
from model.rope import Rotary
from model.tower import Tower
from train.errors import RunError
from train.flops import block_flops, bridge_flops
from train.memory import LiveMemory
from train.workload import Workload

KINDS = ("none", "full", "selective")
GIB = 2**30


def recompute_activations(model: JointTransformer, kinds: list[str]) -> None:
    """Checkpoint each of `units(model)` in its way. Call before compile and FSDP."""
    for module, kind in zip(units(model), kinds, strict=True):
        if kind != "none":
            # The forward is wrapped, not the module: parameters keep their names, and FSDP's hooks stay around it.
            module.forward = _checkpointed(module.forward, kind)


def units(model: JointTransformer) -> list[nn.Module]:
    """Blocks and Bridge directions: what is checkpointed and compiled one by one."""
    blocks = [block for tower in model.children() if isinstance(tower, Tower) for block in tower.blocks]
    bridge = model.dual_tower_bridge
    return [*blocks, *bridge.audio_to_video_conditioners.values(), *bridge.video_to_audio_conditioners.values()]


def choose_kinds(
    model: JointTransformer,
    kind: str,
    gib: float | None,
    workload: Workload | None,
    sequence: int,
    compute: torch.dtype,
) -> list[str]:
    """A kind for each of `units(model)`.

    "budget" begins with full checkpointing everywhere and relaxes, where a byte saves the most FLOPs first, as many
    units as fit into `gib`. `workload`: the largest micro-batch, whose video tokens `sequence` ranks share. Only the
    active expert counts, and both experts are treated alike. RunError when full checkpointing does not fit either.
    """
    modules = units(model)
    if kind != "budget":
        return [kind] * len(modules)
    assert gib is not None and workload is not None
    names = {module: name for name, module in model.named_modules()}
    shapes = [shape_of(names[module]) for module in modules]
    experts = {shape: len(model.config.experts) if shape == "video" else 1 for shape in set(shapes)}
    counts = {shape: shapes.count(shape) // experts[shape] for shape in experts}  # that run in a step
    costs = {
        (shape, k): unit_cost(model.config, shape, k, workload, sequence, compute) for shape in counts for k in KINDS
    }
    left = gib * GIB - sum(count * costs[shape, "full"].kept for shape, count in counts.items())
    if left < 0:
        raise RunError(
            f"parallel.recompute_gib={gib}: even with full checkpointing {gib - left / GIB:.1f} GiB stay for backward; "
            "give more, or share the tokens of a sample among more ranks (parallel.ulysses, parallel.ring)"
        )
    chosen = {shape: ["full"] * count for shape, count in counts.items()}
    while True:
        moves = []
        for shape, kinds_now in chosen.items():
            for now in set(kinds_now):
                for better in KINDS:
                    added = costs[shape, better].kept - costs[shape, now].kept
                    saved = costs[shape, now].again - costs[shape, better].again
                    if saved > 0 and added <= left:
                        moves.append((saved / max(added, 1), shape, now, better, added))
        if not moves:
            break
        _, shape, now, better, added = max(moves)
        chosen[shape][chosen[shape].index(now)] = better
        left -= added
    turn = dict.fromkeys(counts, 0)
    kinds = []
    for shape in shapes:
        kinds.append(chosen[shape][turn[shape] % counts[shape]])
        turn[shape] += 1
    return kinds


@dataclass(frozen=True)
class UnitCost:
    """Of one unit in one step: bytes kept from forward to backward, FLOPs that backward computes again."""

    kept: int
    again: int


def unit_cost(
    config: JointConfig, shape: str, kind: str, workload: Workload, sequence: int, compute: torch.dtype
) -> UnitCost:
    """What a unit ("video", "audio", "to_video", "to_audio") costs when checkpointed in this way.

    The bytes are measured, by running the unit on fake tensors over the tokens of one rank. Under sequence parallelism
    the exchanged tensors that attention keeps are as large as those they were made of.
    """
    clips, all_tokens, steps = workload.clips, workload.video_tokens(config), workload.audio_tokens(config)
    tokens = -(-all_tokens // sequence)
    inputs: tuple[Any, ...]
    with FakeTensorMode(), torch.device("cpu"):
        video = torch.zeros(clips, tokens, config.video.dim, dtype=compute, requires_grad=True)
        audio = torch.zeros(clips, steps, config.audio.dim, dtype=compute, requires_grad=True)
        if shape in ("video", "audio"):
            tower, x = (config.video, video) if shape == "video" else (config.audio, audio)
            unit: nn.Module = Block(tower.dim, tower.num_heads, tower.ffn_dim, tower.eps)
            table = torch.zeros(x.shape[1], tower.dim // tower.num_heads // 2)
            text = torch.zeros(clips, config.text_length, tower.dim, dtype=compute)
            inputs = x, text, torch.zeros(clips, 6, tower.dim), Rotary(table, table, interleaved=True)
            every = all_tokens if shape == "video" else steps
            products, attended = block_flops(tower, x.shape[1], every, config.text_length)
        else:
            x, y = (video, audio) if shape == "to_video" else (audio, video)
            pooled = config.bridge.pooled_adaln and shape == "to_audio"
            unit = Conditioner(x.shape[2], y.shape[2], x.shape[2] // config.bridge.head_dim, pooled)
            tables = [torch.zeros(z.shape[1], config.bridge.head_dim // 2) for z in (x, y)]
            rotaries = [Rotary(table, table, interleaved=False) for table in tables]
            inputs = x, y, *rotaries, 1
            products, attended = bridge_flops(x.shape[1], x.shape[2], y.shape[1], y.shape[2])
        for module in unit.modules():  # Module.to cannot replace fake parameters
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=compute)))
        recompute = {"none": 0, "full": products + attended, "selective": products}[kind]
        forward = unit.forward if kind == "none" else _checkpointed(unit.forward, kind)
        with LiveMemory() as memory:
            out = forward(*inputs)
        # A unit keeps its input, which was made before; its output is counted where it is an input.
        kept = memory.live - out.untyped_storage().nbytes() + x.untyped_storage().nbytes()
    return UnitCost(kept, clips * recompute)


def shape_of(name: str) -> str:
    """The shape of a unit, by its name in the model."""
    if name.startswith("dual_tower_bridge"):
        return "to_video" if "audio_to_video" in name else "to_audio"
    return "audio" if name.startswith("audio_dit") else "video"


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    return lambda *arguments: checkpoint(forward, *arguments, **options)


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if "scaled_dot_product" in str(operator) or "flash_attn" in str(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
