"""The learning rate as a function of the step index (invariant 8), and which changes of a run's `steps` move it.

With schedule=constant `steps` are free to change. cosine depends on them from the end of warm-up on, wsd from the begin
of its decay: a change that gives steps already done another rate makes it jump at the next one, and is refused unless
run.new_schedule=true confirms it. Does not import torch.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Protocol

SCHEDULES = ("constant", "cosine", "wsd")


class Schedule(Protocol):
    """What the rate depends on besides `steps`: keys of OptimConfig (train/engine/optim_config.py)."""

    warmup: int
    schedule: str
    final_ratio: float
    decay_steps: int


def lr_factor(config: Schedule, step: int, steps: int) -> float:
    """The factor of every group's LR at step `step` (from 0) of `steps`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd" and step >= steps - config.decay_steps:
        progress = min(1.0, (step + 1 - (steps - config.decay_steps)) / config.decay_steps)
        return 1 + (config.final_ratio - 1) * progress
    return 1.0


def moved_rate(earlier: dict[str, Any], now: dict[str, Any], done: int) -> str | None:
    """A message if the rate after `done` steps differs under the new config's steps, else None.

    earlier, now: resolved configs of a run, whose `optim` may not differ.
    """
    before, after = earlier.get("steps"), now.get("steps")
    if not done or before is None or after is None or before == after or now.get("run", {}).get("new_schedule"):
        return None
    config = SimpleNamespace(**now["optim"])
    was, becomes = (lr_factor(config, done - 1, steps) for steps in (before, after))
    if math.isclose(was, becomes, rel_tol=1e-9):
        return None
    return (
        f"steps: {before} -> {after}: optim.schedule={config.schedule} follows them, so after {done} steps the "
        f"learning rate would jump from {was:.3f} to {lr_factor(config, done, after):.3f} of its value; keep "
        f"steps={before}, start another run from these weights (init.source), or accept the jump: "
        "run.new_schedule=true"
    )


def misfit(config: Schedule, steps: int) -> str | None:
    """A message if the parts of a schedule do not fit into the steps, else None."""
    if config.warmup > steps or (config.schedule != "constant" and config.warmup == steps):
        never = "" if config.schedule == "constant" else f", and optim.schedule={config.schedule} never decays"
        last = min(1.0, steps / config.warmup)
        return (
            f"optim.warmup={config.warmup} of steps={steps}: the learning rate ends at {last:.2f} of its value{never}; "
            "set optim.warmup lower"
        )
    if config.schedule == "wsd" and config.warmup + config.decay_steps > steps:
        return (
            f"optim.warmup={config.warmup} and optim.decay_steps={config.decay_steps} overlap in steps={steps}: the "
            "learning rate falls before it has risen; set optim.decay_steps or optim.warmup lower"
        )
    return None
