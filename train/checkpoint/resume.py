"""Checks whether a run may continue in its folder with this config."""

from __future__ import annotations

import os
from typing import Any

import yaml

from core.durable import write_atomically
from core.errors import RunError, missing
from core.run_dir import RunDir
from train.engine.schedule import moved_rate

# Keys, and groups of keys, that may differ when a run continues, and on what condition: they change neither the order
# of samples nor the mathematics. All others are fixed. docs/configuration.md is made from this (`make tables`).
MAY_CHANGE = {
    "steps": "where the schedule of the learning rate allows it, or with `run.new_schedule=true` "
    "([recovery](recovery.md#checkpoints))",
    "parallel": "any other layout, engine and number of ranks; bit for bit only where the layout stays the same",
    "ema": "averages that are newly on start from the weights",
    "checkpoint": "",
    "guard": "",
    "monitor": "",
    "inspect": "",
    "validation": "",
    "data.path": "the folder may move: the dataset must be the same",
    "data.datasets": "folders may move: datasets, weights and thresholds must be the same",
    "data.segments": "segments may be added from a later step on",
    "data.captioners": "what they mean must stay the same; a segment changes them",
    "data.valid_path": "",
    "data.micro_batch": "",
    "data.prefetch": "",
    "data.reader_threads": "",
    "data.storage": "",
    "data.ignore_encoders": "lets data of other encoders in ([encoders](encoders.md))",
    "data.quarantine_budget": "",
    "run.root": "the folder may move",
    "run.new_schedule": "",
}
OF_OLDER_RUNS = ("data.captioner", "run.start_from")  # keys of stored configs that the state in checkpoints answers


def open_run(run: RunDir, config: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """Create the folder of a run for this config, or check that the run in it may continue with this config. Returns
    whether the folder existed. `defaults`: of the config's keys.

    Raises RunError with the differing values side by side when keys of a run that has begun differ and may not change.
    """
    there = check_run(run, config, defaults)
    if run.checkpoints.is_symlink() and not run.checkpoints.exists():
        target = os.readlink(run.checkpoints)
        raise missing(f"{run.checkpoints} is a link to {target}, which does not exist: mount or restore it")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomically(run.config, yaml.safe_dump(config, sort_keys=False))
    return there


def check_run(run: RunDir, config: dict[str, Any], defaults: dict[str, Any]) -> bool:
    """As `open_run`, but nothing is written."""
    if not run.config.exists() or not run.has_begun():
        return False
    earlier = run.read_config()
    differing = config_differences(earlier, config, defaults)
    if differing:
        raise RunError(
            f"run {run.root.name!r} exists with another config; choose another run.id or undo:\n"
            + "\n".join(f"  {line}" for line in differing)
        )
    if jump := moved_rate(earlier, config, run.committed_step()):
        raise RunError(f"run {run.root.name!r} would continue, but {jump}")
    return True


def config_differences(earlier: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Lines "key: earlier -> now" for every key that differs and may not change within a run.

    defaults: of all keys. A key that an earlier version did not have is no difference if it has its default now.
    """
    before, after, usual = _flatten(earlier), _flatten(now), _flatten(defaults)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == free or key.startswith(free + ".") for free in (*MAY_CHANGE, *OF_OLDER_RUNS)):
            continue
        if key not in before and key in usual and after[key] == usual[key]:
            continue
        if before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return lines


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
