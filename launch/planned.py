"""Plans a run before it is started: one that does not fit the memory of its GPUs is refused."""

from __future__ import annotations

import json

from core.errors import RunError
from launch.compose import Launch
from launch.slurm.slurm import SlurmConfig


def plan_launch(launch: Launch) -> str:
    """The plan, as plan.json of the run's folder holds it. RunError for a run that does not fit, with the sum."""
    from train.plan.plan import GIB, plan_run  # counting imports half of torch
    from train.plan.question import Question, clip_of, find_sheet

    cluster, sheet = launch.cluster, launch.submit.gpu
    assert sheet is not None
    per_node = cluster.per_node if isinstance(cluster, SlurmConfig) else cluster.world
    clip, _ = clip_of(launch.train, launch.overrides)
    plan = plan_run(Question(launch.train, cluster.world, per_node, find_sheet(sheet), clip))
    total, there = sum(plan.memory.values()) / GIB, plan.question.gpu.memory_gib
    if not plan.fits:
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in plan.memory.items() if size)
        raise RunError(
            f"run {launch.run_dir.root} needs {total:.1f} GiB of each GPU ({parts}), {plan.question.gpu.title} has "
            f"{there:.1f}: nothing was submitted; mova plan search=true finds a layout that fits"
        )
    print(
        f"run {launch.run_dir.root}: planned {plan.step.seconds:.3g} s a step, MFU {plan.mfu:.1%}, {total:.1f} of "
        f"{there:.1f} GiB, {plan.total_days:.1f} days (predicted)"
    )
    return json.dumps(plan.as_dict(), indent=1) + "\n"
