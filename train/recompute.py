"""Activation checkpointing of blocks and Bridge directions: what backward keeps, and what it computes again.

- `none`: everything is kept.
- `full`: only a block's inputs are kept; its forward runs twice.
- `selective`: attention outputs are kept too. At 43,000 tokens attention is more than half of a block's FLOPs, its
  output one tensor of many: most of the memory goes, most of the recomputation does not come.

No random number is drawn in a forward, so no generator state is saved or restored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.joint import JointTransformer
from model.tower import Tower

KINDS = ("none", "full", "selective")


def recompute_activations(model: JointTransformer, kind: str) -> None:
    """Checkpoint every block and every Bridge direction in this way. Call before compile and FSDP."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    for module in units(model):
        # The forward is wrapped, not the module: parameters keep their names, and FSDP's hooks stay around it.
        module.forward = _checkpointed(module.forward, options)


def units(model: JointTransformer) -> list[nn.Module]:
    """Blocks and Bridge directions: what is checkpointed and compiled one by one."""
    blocks = [block for tower in model.children() if isinstance(tower, Tower) for block in tower.blocks]
    bridge = model.dual_tower_bridge
    return [*blocks, *bridge.audio_to_video_conditioners.values(), *bridge.video_to_audio_conditioners.values()]


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return lambda *arguments: checkpoint(forward, *arguments, **options)


def _keep_attention(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if "scaled_dot_product" in str(operator) or "flash_attn" in str(operator):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
