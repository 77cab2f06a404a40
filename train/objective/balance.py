"""Balance of modalities by their losses: each modality's errors are divided by their own running mean.

Errors of video and of sound differ in size, and the ratio drifts in training; fixed weights then give one of them an
unintended share. With objective.balance the weights are relative to each modality's usual loss. The means cover losses
summed over all ranks, up to the step before the last one: every rank knows them without waiting. They belong to the
checkpoint, so a resumed run continues with the same ones to the bit.
"""

from __future__ import annotations

import math
from typing import Any

from train.parallel.step_sums import KNOWN, StepSums


class Balance:
    """Running means by part: "video_high", "video_low" (each expert has noise levels of its own) and "audio"."""

    def __init__(self, decay: float, state: dict[str, Any]) -> None:
        """`decay` of a mean per loss. `state`: that of TrainState, kept up to date in place: "means" holds by part the
        decayed sum and the number of its losses, "recent" [step, part, loss] of those that are too young to be used."""
        self._decay, self._state = decay, state

    def scales(self, step: int, expert: str) -> tuple[float, float]:
        """Factors of the errors of video and of audio in a step; 1 before the modality has a known loss."""
        state = self._state
        recent, means = state.setdefault("recent", []), state.setdefault("means", {})
        for _, part, loss in (entry for entry in recent if entry[0] <= step - KNOWN):
            total, count = means.get(part, (0.0, 0))
            means[part] = [self._decay * total + (1 - self._decay) * loss, count + 1]
        recent[:] = [entry for entry in recent if entry[0] > step - KNOWN]
        video, audio = (self._scale(part) for part in (f"video_{expert}", "audio"))
        return video, audio

    def add(self, sums: StepSums, expert: str) -> None:
        """Include a finished step: the losses that it had, if it was finite."""
        for part, loss in ((f"video_{expert}", sums.loss_video), ("audio", sums.loss_audio)):
            if sums.finite and math.isfinite(loss):
                self._state.setdefault("recent", []).append([sums.step, part, loss])

    def _scale(self, part: str) -> float:
        total, count = self._state["means"].get(part, (0.0, 0))
        mean = total / (1 - self._decay**count) if count else 0.0
        return 1 / mean if mean > 0 else 1.0
