"""Renamed keys: stored configs that use the old name are read as if they used the new one.

Stored are the config.yaml of a run and the config in its checkpoints. On the command line, and in a user's own yaml, an
old name is an error that names the new one. A row stays as long as a run with the old name may be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.window": "data.shuffle_shards",
    "data.workers": "data.reader_threads",
    "data.places": "data.storage",
    "objective.hold_video": "objective.clean_video_prob",
    "objective.hold_audio": "objective.clean_audio_prob",
    "objective.pair": "objective.paired_prob",
    "parallel.compute": "parallel.compute_dtype",
    "optim.decay": "optim.decay_steps",
    "checkpoint.keep_every": "checkpoint.permanent_every",
    "guard.lag_every": "guard.straggler_every",
    "guard.lag_ratio": "guard.straggler_ratio",
    "cluster.fruitless": "cluster.max_failed_restarts",
    "cluster.preflight.most_excluded": "cluster.preflight.max_excluded",
    "launch.at_once": "launch.max_parallel_units",
}
# Removed keys: what to write instead.
REPLACED = {"data.captioner": "data.captioners={NAME: 1.0}", "run.start_from": "init.source=FOLDER"}


def new_name(key: str) -> str | None:
    """The new name of an old key, or of one below it, or what to write instead; None for every other key."""
    for old, new in (RENAMED | REPLACED).items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :] if old in RENAMED else new
    return None


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config (nested plain values) with today's key names, in its own order.

    If both names occur, the value under the new one wins.
    """
    return _translated(config, "")


def _translated(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        new = RENAMED.get(f"{prefix}{key}")
        name = new.removeprefix(prefix) if new else key
        if new and name in config:
            continue
        found[name] = _translated(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
    return found
