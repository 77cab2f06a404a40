"""Checks that a node has the host memory that a run's ranks need on it."""

from __future__ import annotations

import os

from core.errors import RunError
from core.run_dir import RunDir


def memory_shortage(run: RunDir, gpus: int) -> list[str]:
    """A message if `gpus` ranks of a run, laid out over the job's nodes by its config.yaml, do not fit this node."""
    from omegaconf import OmegaConf

    from model.joint import JointConfig
    from train.parallel.host_memory import host_bytes, shortage
    from train.parallel.mesh import ParallelConfig
    from train.parallel.parts import trained_towers

    try:
        config = run.read_config()
    except (OSError, RunError):
        return []  # reported by launch/slurm/inputs.py
    model, parallel = (
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), config.get(name) or {}))
        for kind, name in ((JointConfig, "model"), (ParallelConfig, "parallel"))
    )
    assert isinstance(model, JointConfig) and isinstance(parallel, ParallelConfig)
    world = gpus * int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    average = float((config.get("ema") or {}).get("decay", 0)) > 0
    try:
        trained = trained_towers((config.get("optim") or {}).get("train", ["video", "audio", "bridge"]), model.experts)
        needed = sum(host_bytes(model, parallel, world, average, trained=trained).values())
    except RunError:
        return []  # degrees that do not fit are refused by the launcher
    found = shortage(needed, gpus)
    return [found] if found else []
