"""The work of a rank in one step, from which memory, traffic, and the numbers of tokens and heads follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.joint import JointConfig


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a rank, before sequence parallelism splits it, and how many of them make its step.

    `grid`: latent frames, rows and columns; `audio_steps`: latent steps of sound.
    """

    clips: int
    grid: tuple[int, int, int]
    audio_steps: int
    micro_batches: int = 1

    def video_tokens(self, model: JointConfig) -> int:
        """Video tokens of one clip."""
        return math.prod(self.grid) // math.prod(model.video.patch_size)

    def audio_tokens(self, model: JointConfig) -> int:
        """Audio tokens of one clip."""
        return self.audio_steps // model.audio.patch_size[0]

    def frames(self, model: JointConfig) -> int:
        """Frames of video tokens."""
        return self.grid[0] // model.video.patch_size[0]
