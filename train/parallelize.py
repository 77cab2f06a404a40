"""Parallelism, applied from outside in one visible order: sequence -> recomputation -> compile -> FSDP2.

DeepSpeed ZeRO (train/zero.py) takes FSDP2's place in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.init import initial_value
from model.joint import JointConfig, JointTransformer
from model.tower import Tower
from train.mesh import DTYPES, Layout, ParallelConfig
from train.recompute import choose_kinds, recompute_activations, shape_of, units
from train.sequence import shard_sequence
from train.workload import Workload


def build_model(
    config: JointConfig, parallel: ParallelConfig, layout: Layout, seed: int, workload: Workload | None = None
) -> JointTransformer:
    """The FSDP2 model with its starting weights: built on the meta device, then filled shard by shard.

    `workload`: a rank's largest micro-batch, for recompute=budget.
    """
    with torch.device("meta"):
        model = JointTransformer(config)
    model.to(torch.float64 if parallel.compute == "float64" else torch.float32)  # master weights
    place_model(model, parallel, layout, workload)
    model.to_empty(device=layout.device)
    depth, bridge = config.video.num_layers, config.bridge
    fill_weights(model, lambda name, p: initial_value(name, tuple(p.shape), seed, depth, bridge))
    return model


def place_model(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None = None
) -> None:
    """All parallelism on a plain model, in place; its parameters become shards, whatever device they are on."""
    prepare_model(model, parallel, layout, workload)
    shard_model(model, parallel, layout)


def prepare_model(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None = None
) -> None:
    """What comes before an engine shards the parameters, in place."""
    model.use_attention(parallel.attention)
    if layout.sequence.size > 1:
        shard_sequence(model, layout.sequence, parallel.attention)
    recompute_activations(model, recompute_kinds(model, parallel, layout, workload))
    if parallel.compile != "none":
        for module in units(model):
            module.compile(backend=parallel.compile)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process. One that grows in mid-run means shapes that keep changing."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def recompute_kinds(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None
) -> list[str]:
    """How each of the model's units is checkpointed under this layout."""
    compute, ranks = DTYPES[parallel.compute], layout.sequence.size
    return choose_kinds(model, parallel.recompute, parallel.recompute_gib, workload, ranks, compute)


def recomputed_units(
    model: JointTransformer, parallel: ParallelConfig, layout: Layout, workload: Workload | None
) -> Counter[tuple[str, str]]:
    """How many units of each shape ("video", "to_audio", ...) are checkpointed in which way."""
    names = {module: name for name, module in model.named_modules()}
    kinds = recompute_kinds(model, parallel, layout, workload)
    return Counter((shape_of(names[unit]), kind) for unit, kind in zip(units(model), kinds, strict=True))


def shard_model(model: JointTransformer, parallel: ParallelConfig, layout: Layout) -> None:
    """FSDP2 (HSDP with dp_replicate > 1) units in the order in which a step meets them.

    Stem, time path, each block, each Bridge direction and each head are units: the joint model calls these, not whole
    towers, and an expert that is idle is then neither gathered nor reduced. Inputs are never cast by FSDP: timesteps
    must stay exact and tables float32, so modules cast for themselves. The time path computes in float32.
    """
    compute = DTYPES[parallel.compute]
    reduce = torch.promote_types(compute, torch.float32)
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=reduce, reduce_dtype=reduce, cast_forward_inputs=False)
    mesh = layout.mesh if layout.dp_replicate > 1 else layout.mesh["fsdp"]

    def unit(modules: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy = mixed) -> None:
        fully_shard(modules, mesh=mesh, mp_policy=policy)

    for tower in model.children():
        if isinstance(tower, Tower):
            unit([tower.patch_embedding, tower.text_embedding])
            unit([tower.time_embedding, tower.time_projection], exact)
            for block in tower.blocks:
                unit(block)
            unit(tower.head)
    for conditioners in (
        model.dual_tower_bridge.audio_to_video_conditioners,
        model.dual_tower_bridge.video_to_audio_conditioners,
    ):
        for conditioner in conditioners.values():
            unit(conditioner)
    unit(model)  # the root: what is left is the Bridge's condition scale, where a config has one
    model.register_forward_pre_hook(_prefetch_in_order, with_kwargs=True)


def _prefetch_in_order(model: JointTransformer, _: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Let every unit gather the one that follows it in this forward.

    Video blocks are large, Bridge directions and audio blocks between them small: a gather that begins a unit earlier
    hides behind a video block. The order depends on the expert and on what is given, so it is set anew each time;
    backward goes by the order that FSDP saw in forward.
    """
    tower, bridge = model.expert(inputs.get("expert", "high")), model.dual_tower_bridge
    video, audio = inputs.get("video") is not None, inputs.get("audio") is not None
    order: list[nn.Module] = []
    for present, part in ((video, tower), (audio, model.audio_dit)):
        order += [part.patch_embedding, part.time_embedding] if present else []
    for i in range(model.config.video.num_layers):
        if video and audio and i in bridge.layers:
            order += [bridge.audio_to_video_conditioners[str(i)], bridge.video_to_audio_conditioners[str(i)]]
        order += [tower.blocks[i]] if video else []
        order += [model.audio_dit.blocks[i]] if audio and i < model.config.audio.num_layers else []
    order += ([tower.head] if video else []) + ([model.audio_dit.head] if audio else [])
    for module, following in zip(order, [*order[1:], None], strict=True):
        assert isinstance(module, FSDPModule)
        module.set_modules_to_forward_prefetch([following] if following is not None else [])  # type: ignore[list-item]


@torch.no_grad()
def fill_weights(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Set every parameter to value(name, parameter), a whole tensor equal on all ranks, keeping this rank's shard."""
    for name, parameter in model.named_parameters():
        full = value(name, parameter).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has made the same values, nothing is sent.
            sharded = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(sharded.to_local())
        else:
            parameter.copy_(full)
