"""One training step: forward and backward of every micro-batch, the true global norm, one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model.joint import JointTransformer
from train.feed import Prepared
from train.objective import ObjectiveConfig, loss_share


@dataclass
class StepLosses:
    """This rank's sums over its micro-batches, on the device; summed over ranks they describe the global batch."""

    share: Tensor  # scalar, the share of the loss
    video: Tensor  # [2]: weighted sum of per-sample MSE, sum of weights
    audio: Tensor  # [2]


def forward_backward(
    model: JointTransformer,
    micro_batches: Sequence[Prepared],
    objective: ObjectiveConfig,
    expert: str,
    ranks: int,
    device: torch.device,
) -> StepLosses:
    """Accumulate the gradient of the global batch's loss into the model's parameters.

    FSDP averages gradients over its ranks, the shares of the ranks sum to the loss: each share is multiplied once by
    the number of FSDP ranks. Gradients are reduced in the last micro-batch only.
    """
    share = torch.zeros((), device=device)
    sums = torch.zeros(2, 2, device=device)
    for i, prepared in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        batch, draws = prepared.batch.to(device), prepared.draws.to(device)
        parts = loss_share(model, batch, draws, objective, expert)
        (parts.share * ranks).backward()
        share = share + parts.share.detach()
        for row, mse, present in ((0, parts.video, batch.video_weight), (1, parts.audio, batch.audio_weight)):
            weight = batch.weight * present
            sums[row] += torch.stack([(weight * mse).sum(), weight.sum()])
    return StepLosses(share, sums[0], sums[1])
