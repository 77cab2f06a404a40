"""Compares what ZeRO 1 and 2 hold on every rank with the device's memory, and refuses a model that cannot fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from core.errors import RunError
from model.joint import JointConfig
from train.optimizer.adamw import AdamW
from train.optimizer.protocol import Optimizer
from train.parallel.parts import ALL, tower_of

GB = 1e9


def zero_bytes(
    stage: int,
    parameters: int,
    active: int,
    world: int,
    element: int,
    average: bool,
    kind: type[Optimizer] = AdamW,
    trained: int | None = None,
) -> dict[str, float]:
    """A lower bound on the bytes of one rank before any activation; ZeRO 1 or 2.

    parameters: of the whole model; active: those that one step moves; trained: those that are not frozen (None: all);
    element: bytes of a weight that computes.
    """
    trained = parameters if trained is None else trained
    return {
        "weights": parameters * element,
        "gradients": active * element if stage == 1 else active * 4 / world,
        "float32 masters": 4 * trained / world,
        "moments": 4 * len(kind.KEYS) * trained / world,
        **({"averages": 4 * trained / world} if average else {}),
    }


def refuse_what_cannot_fit(
    stage: int,
    config: JointConfig,
    parameters: Mapping[str, Tensor],
    world: int,
    compute: torch.dtype,
    average: bool,
    memory: int | None,
    kind: type[Optimizer] = AdamW,
    trained: Collection[str] = ALL,
) -> None:
    """RunError, with the sum, if ZeRO 1 or 2 needs more than the `memory` of a device (None: unknown)."""
    if stage == 3 or memory is None:
        return
    sizes: dict[str, int] = {}
    for name, parameter in parameters.items():
        sizes[tower_of(name)] = sizes.get(tower_of(name), 0) + parameter.numel()
    whole, learned = sum(sizes.values()), sum(size for tower, size in sizes.items() if tower in trained)
    idle = sizes["video_dit"] if config.two_experts and {"video_dit", "video_dit_2"} <= set(trained) else 0
    parts = zero_bytes(stage, whole, learned - idle, world, compute.itemsize, average, kind, learned)
    if sum(parts.values()) <= memory:
        return
    words = " + ".join(f"{what} {size / GB:.1f}" for what, size in parts.items())
    raise RunError(
        f"parallel.engine=zero{stage} holds all {whole / 1e9:.2f} billion weights on each of {world} ranks: {words} = "
        f"{sum(parts.values()) / GB:.1f} GB without activations, the device has {memory / GB:.1f} GB; set "
        "parallel.engine=fsdp2 or zero3, which split them"
    )


def device_memory(device: torch.device) -> int | None:
    """Memory of a GPU in bytes; None for a device without its own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
