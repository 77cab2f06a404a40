"""What was planned for a run (mova plan), to stand beside what is measured."""

from __future__ import annotations

import json
import logging
from typing import Any

from core.run_dir import RunDir
from train.monitor.kernel_kinds import KERNEL_KINDS

METRICS = {"perf/planned_step_time": "step_seconds", "perf/planned_memory_gib": "peak_gib", "perf/planned_mfu": "mfu"}

logger = logging.getLogger(__name__)


def read_planned(run: RunDir, world: int) -> dict[str, float]:
    """Metrics that are the same at every step, from plan.json of the run's folder; {} where there is none for so many
    ranks. A damaged file is told in the log, and ends no run."""
    try:
        plan = json.loads(run.plan.read_text())
        if plan["gpus"] != world:
            logger.warning(
                "%s is a plan for %s GPUs, this run has %d ranks; it is left out", run.plan, plan["gpus"], world
            )
            return {}
        busy = plan.get("kernel_seconds", {})  # not in plans of earlier versions
        kinds = {f"perf/planned_{kind}_time": float(busy[kind]) for kind in KERNEL_KINDS if kind in busy}
        return {name: _total(plan[key]) for name, key in METRICS.items()} | kinds
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read as a plan (%s); it is left out", run.plan, error)
        return {}


def _total(value: Any) -> float:
    return float(value["total"] if isinstance(value, dict) else value)
