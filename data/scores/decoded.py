"""A window as it will be encoded: what scores look at and listen to."""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from data.media import SAMPLE_RATE


@dataclass
class DecodedWindow:
    """A window as it will be encoded. frames: [3, F, H, W] in [-1, 1] or None; waveform: [n] mono at 16 kHz or None;
    sounds: the same sound at further rates."""

    frames: Tensor | None
    waveform: Tensor | None
    fps: float
    sounds: dict[int, Tensor] = field(default_factory=dict)

    def sound_at(self, rate: int) -> Tensor | None:
        """[n] mono at a rate that was asked for (16 kHz always was); None without sound."""
        return self.waveform if rate == SAMPLE_RATE or self.waveform is None else self.sounds[rate]

    @cached_property
    def grey(self) -> Tensor:
        """[F, H, W] brightness (BT.601 weights) in [-1, 1], made by the first score that sees no colour, for all."""
        assert self.frames is not None, "no picture"
        red, green, blue = self.frames
        out: Tensor = (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)
        return out
