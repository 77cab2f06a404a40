"""The optimizer as configured, and the learning rate and weight decay that each parameter gets from it.

train/engine/optim.py does the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.ranges import bounded
from train.engine.schedule import SCHEDULES
from train.parallel.parts import NAMES, PartsConfig, check_names


@dataclass
class OptimConfig:
    """AdamW. Learning rates and weight decay are the paper's (Table 7), the rest are the field's usual values.

    lr_tower: learning rate of the towers
    lr_bridge: learning rate of the Bridge
    weight_decay: of AdamW
    betas: decay of the two moments
    eps: added to the root of the second moment
    clip: largest global gradient norm (a huge one switches clipping off)
    warmup: steps of linear warm-up
    schedule: after the warm-up: "constant", "cosine" down to final_ratio, or "wsd": constant, then linear down to
        final_ratio over the last `decay_steps` steps
    final_ratio: the last learning rate as a fraction of the highest
    decay_steps: steps of the final decay of "wsd"
    train: the parts that learn, of video_high, video_low, video (both), audio, bridge; the others are frozen
    parts: learning rate and weight decay of single parts
    """

    lr_tower: float = bounded(1e-5, "[0, inf)")
    lr_bridge: float = bounded(2e-5, "[0, inf)")
    weight_decay: float = bounded(0.001, "[0, inf)")
    betas: list[float] = bounded([0.9, 0.95], "[0, 1)")
    eps: float = bounded(1e-8, "(0, inf)")
    clip: float = bounded(1.0, "(0, inf)")
    warmup: int = bounded(1000, "[0, inf)")
    schedule: str = "constant"
    final_ratio: float = bounded(0.1, "[0, 1]")
    decay_steps: int = bounded(0, "[0, inf)")
    train: list[str] = field(default_factory=lambda: ["video", "audio", "bridge"])
    parts: PartsConfig = field(default_factory=PartsConfig)

    def __post_init__(self) -> None:
        check_names(self.train)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas is {self.betas}; give two numbers")
        if self.schedule == "wsd" and self.decay_steps < 1:
            raise ValueError("optim.schedule=wsd needs optim.decay_steps, the steps of its last, falling part")


def group_of(name: str) -> str:
    """The LR group of a parameter by its full name."""
    return "bridge" if name.startswith("dual_tower_bridge.") else "tower"


def rate_of(name: str, config: OptimConfig) -> float:
    """The LR of a parameter by its full name, before the schedule's factor."""
    own = [part.lr for part in config.parts.of(name) if part.lr is not None]
    return [*own, config.lr_bridge if group_of(name) == "bridge" else config.lr_tower][0]


def decay_of(name: str, config: OptimConfig) -> float:
    """The weight decay of a parameter by its full name."""
    own = [part.weight_decay for part in config.parts.of(name) if part.weight_decay is not None]
    return [*own, config.weight_decay][0]


def rates(config: OptimConfig, factor: float) -> dict[str, float]:
    """The LRs of a step: "lr_tower", "lr_bridge", and those of the parts that have one of their own."""
    own = {name: getattr(config.parts, name).lr for name in NAMES}
    named = {"tower": config.lr_tower, "bridge": config.lr_bridge} | {n: lr for n, lr in own.items() if lr is not None}
    return {f"lr_{name}": lr * factor for name, lr in named.items()}
