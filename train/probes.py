"""What a step's device-side metrics are made of: norms by module group, the update against the weights, the Bridge.

Everything here is a sum that ranks add up in the vector of train/guard.py, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.ema import tower_of

NOISE_BINS = 10  # of the noise levels from 0 to 1
GROUPS = {"video_dit": "video_high", "video_dit_2": "video_low", "audio_dit": "audio", "dual_tower_bridge": "bridge"}
PLACES = {tower: place for place, tower in enumerate(GROUPS)}


class Piece(NamedTuple):
    """A part of the weights on this rank with what AdamW keeps of it (None before its first update)."""

    tower: str
    weights: Tensor
    state: dict[str, Tensor] | None
    lr: float


@torch.no_grad()
def squares_by_group(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Tensor:
    """Sums of squares [groups] float64 of (parameter name or tower, values)."""
    found = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    grouped: dict[int, list[Tensor]] = {}
    for name, values in tensors:
        grouped.setdefault(PLACES[tower_of(name)], []).append(values)
    for place, parts in grouped.items():  # a tensor of places would come from the host, and wait for the device
        found[place] = torch.stack(torch._foreach_norm(parts)).to(torch.float64).square().sum()
    return found


@torch.no_grad()
def update_squares(pieces: Iterable[Piece], betas: list[float], eps: float, device: torch.device) -> Tensor:
    """Sums of squares [groups] of what AdamW's last step took away, weight decay not counted: lr·m̂ / (√v̂ + eps)."""
    found = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    for piece in pieces:
        if piece.state is None or piece.state["exp_avg"].device != piece.weights.device:
            continue  # moments that lie on the host would have to visit the device for this alone
        steps = piece.state["step"].to(torch.float64)
        root = (piece.state["exp_avg_sq"] / (1 - betas[1] ** steps).clamp(min=1e-12).to(piece.weights.dtype)).sqrt_()
        move = piece.state["exp_avg"] / root.add_(eps)
        size = torch.linalg.vector_norm(move).to(torch.float64) * piece.lr / (1 - betas[0] ** steps).clamp(min=1e-12)
        found[PLACES[piece.tower]] += size.square()
    return found


class BridgeProbe:
    """Compares what the Bridge adds with the streams that it adds to, in the steps in which it is `active`.

    A hook on the Bridge from outside: its inputs are the streams before, its outputs the streams after.
    """

    def __init__(self, bridge: nn.Module, device: torch.device) -> None:
        self.active = False
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # added, stream: of video, of audio
        self._device = device
        bridge.register_forward_hook(self._look)

    def take(self) -> Tensor:
        """[4]: squares of what was added to video, of the video stream, and the same of audio; begins anew."""
        sums, self._sums = self._sums, torch.zeros(4, dtype=torch.float64, device=self._device)
        self.active = False
        return sums

    def _look(self, _: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        if not self.active or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            for place, (before, after) in enumerate(zip(inputs[1:3], outputs, strict=True)):
                pair = torch.stack([(after - before).float().square().sum(), before.float().square().sum()])
                self._sums[2 * place : 2 * place + 2] += pair


def noise_bins(t: Tensor, mse: Tensor, weight: Tensor) -> Tensor:
    """[NOISE_BINS, 2] float64: weighted sum of errors [B], and sum of weights, by the noise level of timesteps [B]."""
    places = (t / (1000 / NOISE_BINS)).long().clamp(max=NOISE_BINS - 1)
    found = torch.zeros(NOISE_BINS, 2, dtype=torch.float64, device=mse.device)
    return found.index_add_(0, places, torch.stack([weight * mse, weight], dim=1).to(torch.float64))
