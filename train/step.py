"""One training step: forward and backward of every micro-batch, the true global norm, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.joint import JointTransformer
from train.engine.engine import backward_sharded
from train.objective.noise import Prepared
from train.objective.objective import NOISE_BINS, ObjectiveConfig, StepLosses, loss_share, noise_bins
from train.parallel.mesh import Layout

Details = dict[str, float | str]  # metrics of a step


@dataclass
class StepUnderWay:
    """A step that has ended while its sums over the ranks are on their way. details: its metrics that need no sums."""

    losses: StepLosses
    details: Details


def forward_backward(
    model: JointTransformer,
    micro_batches: Sequence[Prepared],
    objective: ObjectiveConfig,
    expert: str,
    layout: Layout,
    backward: Callable[[Tensor, bool], None] | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> StepLosses:
    """Accumulate the gradient of the global batch's loss into the model's parameters.

    Engines average gradients over all ranks, the shares of the ranks sum to the loss: each share is multiplied once by
    the number of ranks. `backward(loss, last)`: the engine's; without it the model is FSDP's or a plain one.
    `scales`: of the two modalities' weights (train/objective/balance.py).
    """
    backward = backward or partial(backward_sharded, model)
    share = torch.zeros((), device=layout.device)
    inputs: list[tuple[list[str], Tensor]] = []
    sums = torch.zeros(2, 2, dtype=torch.float64, device=layout.device)
    noise = torch.zeros(2, NOISE_BINS, 2, dtype=torch.float64, device=layout.device)
    for i, prepared in enumerate(micro_batches):
        batch, draws = prepared.batch.to(layout.device), prepared.draws.to(layout.device)
        inputs.append((batch.keys, _finite(batch.video) & _finite(batch.audio) & _finite(batch.condition)))
        parts = loss_share(model, batch, draws, objective, expert, layout.sequence.size, scales)
        backward(parts.share * layout.world, i == len(micro_batches) - 1)
        share = share + parts.share.detach()
        errors = ((parts.video, batch.video_weight, draws.t_video), (parts.audio, batch.audio_weight, draws.t_audio))
        for row, (mse, present, t) in enumerate(errors):
            weight = batch.weight * present * parts.learned[row]
            sums[row] += torch.stack([(weight * mse).sum(), weight.sum() / layout.sequence.size])
            # Each rank of a sequence-parallel group has a part of the error, and counts as much of the weight.
            noise[row] += noise_bins(t, mse * layout.sequence.size, weight) / layout.sequence.size
    return StepLosses(share, sums[0], sums[1], noise, micro_batches[0].batch.bucket, inputs)


def _finite(latents: Tensor) -> Tensor:
    """[B, ...] -> [B]: whether a sample holds neither NaN nor inf."""
    return torch.isfinite(latents).flatten(1).all(1)
