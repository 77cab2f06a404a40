"""One training step: forward and backward of every micro-batch, the true global norm, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.joint import JointTransformer
from train.feed import Prepared
from train.mesh import Layout
from train.objective import ObjectiveConfig, loss_share
from train.probes import NOISE_BINS, noise_bins


@dataclass
class StepLosses:
    """This rank's sums over its micro-batches, on the device; summed over ranks they describe the global batch."""

    share: Tensor  # scalar, the share of the loss
    video: Tensor  # [2]: weighted sum of per-sample MSE, sum of weights
    audio: Tensor  # [2]
    noise: Tensor  # [2, NOISE_BINS, 2]: the same by noise level, of video and of audio
    inputs: list[tuple[list[str], Tensor]]  # keys of each micro-batch, and [B] whether the sample's latents are finite

    def damaged(self) -> list[str]:
        """Keys of samples whose latents are not finite. Waits for the device: ask only after a non-finite step."""
        return [
            key for keys, finite in self.inputs for key, good in zip(keys, finite.tolist(), strict=True) if not good
        ]


def forward_backward(
    model: JointTransformer,
    micro_batches: Sequence[Prepared],
    objective: ObjectiveConfig,
    expert: str,
    layout: Layout,
    backward: Callable[[Tensor, bool], None] | None = None,
) -> StepLosses:
    """Accumulate the gradient of the global batch's loss into the model's parameters.

    Engines average gradients over all ranks, the shares of the ranks sum to the loss: each share is multiplied once by
    the number of ranks. `backward(loss, last)`: the engine's; without it the model is FSDP's or a plain one.
    """
    backward = backward or partial(backward_sharded, model)
    share = torch.zeros((), device=layout.device)
    inputs: list[tuple[list[str], Tensor]] = []
    sums = torch.zeros(2, 2, dtype=torch.float64, device=layout.device)
    noise = torch.zeros(2, NOISE_BINS, 2, dtype=torch.float64, device=layout.device)
    for i, prepared in enumerate(micro_batches):
        batch, draws = prepared.batch.to(layout.device), prepared.draws.to(layout.device)
        inputs.append((batch.keys, _finite(batch.video) & _finite(batch.audio) & _finite(batch.condition)))
        parts = loss_share(model, batch, draws, objective, expert, layout.sequence.size)
        backward(parts.share * layout.world, i == len(micro_batches) - 1)
        share = share + parts.share.detach()
        errors = ((parts.video, batch.video_weight, draws.t_video), (parts.audio, batch.audio_weight, draws.t_audio))
        for row, (mse, present, t) in enumerate(errors):
            weight = batch.weight * present * parts.learned[row]
            sums[row] += torch.stack([(weight * mse).sum(), weight.sum() / layout.sequence.size])
            # Each rank of a sequence-parallel group has a part of the error, and counts as much of the weight.
            noise[row] += noise_bins(t, mse * layout.sequence.size, weight) / layout.sequence.size
    return StepLosses(share, sums[0], sums[1], noise, inputs)


def _finite(latents: Tensor) -> Tensor:
    """[B, ...] -> [B]: whether a sample holds neither NaN nor inf."""
    return torch.isfinite(latents).flatten(1).all(1)


def backward_sharded(model: nn.Module, loss: Tensor, last: bool, accumulate: str = "sharded") -> None:
    """Backward through an FSDP2 model, or a plain one.

    `accumulate` "sharded": the gradient of each micro-batch is reduced to the shards, over replicas once, in the last.
    "unsharded": it is reduced in the last only, and a whole gradient lies on every rank until then.
    """
    for unit in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(unit, FSDPModule):
            hold_back = accumulate == "unsharded" and not last and _was_gathered(unit)
            unit.set_requires_gradient_sync(not hold_back, recurse=False)
            unit.set_requires_all_reduce(last, recurse=False)
    loss.backward()


def _was_gathered(unit: FSDPModule) -> bool:
    """Whether this unit ever took part. An expert before its first step has no gradient to hold back, and torch 2.11
    fails on it where gradients wait in another dtype than they come in (bfloat16)."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return group is None or all(hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params)
