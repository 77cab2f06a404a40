"""`init`: where the weights of a run's first step come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.weights.parts import PARTS

FRESH, ZERO = "fresh", "zero"
TRAINING = "training.json"  # beside the weights that mova export writes


@dataclass
class InitConfig:
    """The weights of a run without a checkpoint of its own; null everywhere: all of them are drawn from the seed.

    source: a folder (MOVA, Wan, diffusers, an export), a safetensors file, a run or one of its checkpoints
    video_high: another source for this part, or "fresh": drawn
    video_low: as video_high
    audio: as video_high; a folder with one video tower provides everything but stem and head
    bridge: as video_high, or "zero": drawn, with outputs of zero
    """

    source: str | None = None
    video_high: str | None = None
    video_low: str | None = None
    audio: str | None = None
    bridge: str | None = None

    def __post_init__(self) -> None:
        if self.source in (FRESH, ZERO):
            raise ValueError(
                f"init.source={self.source}: give a folder; {FRESH} is for a part, such as init.audio={FRESH}"
            )
        for part in PARTS:
            if getattr(self, part) == ZERO and part != "bridge":
                raise ValueError(f"init.{part}={ZERO}: only the Bridge can start with outputs of zero; give {FRESH}")

    def given(self) -> bool:
        """Whether any weights are named."""
        return self.source is not None or any(getattr(self, part) is not None for part in PARTS)

    def places(self) -> dict[str, str]:
        """{key: path} of what is read."""
        named = {key: getattr(self, key) for key in ("source", *PARTS)}
        return {f"init.{key}": value for key, value in named.items() if value not in (None, FRESH, ZERO)}


def init_of(resolved: Mapping[str, Any]) -> InitConfig:
    """The `init` of a run's plain config; of earlier versions, none."""
    return InitConfig(**(resolved.get("init") or {}))
