"""Measures how much the Bridge adds to the streams that it joins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        """[4]: sums of squares of what was added to video, of the video stream, and the same for audio; resets them."""
        sums, self._sums = self._sums, torch.zeros(4, dtype=torch.float64, device=self._device)
        self.active = False
        return sums

    def _look(self, _: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        if not self.active or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            for index, (before, after) in enumerate(zip(inputs[1:3], outputs, strict=True)):
                pair = torch.stack([(after - before).float().square().sum(), before.float().square().sum()])
                self._sums[2 * index : 2 * index + 2] += pair
