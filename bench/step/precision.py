"""A step in other precisions (parallel.linear, parallel.residual): predicted time, counted memory and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench.step.operations import counted_step
from train.plan.plan import GIB, KnownCounts, plan_run
from train.plan.question import Question
from train.plan.search import with_layout

PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "linear=float8": {"linear": "float8"},
    "residual=float32": {"residual": "float32"},
    "both": {"linear": "float8", "residual": "float32"},
}
AIM = 0.51  # MFU with linear=float8 at 360p, at the middle rates
NOTE = (
    "One clip on each group of ranks, nothing checkpointed, compiled blocks; the first row is bfloat16 throughout. "
    "float8: its rate (820, 900, 980 TFLOP/s) has the casts of operands in it, as the study assumes; MFU is of the "
    "peak in bfloat16 in all rows."
)


def precisions(base: Question, counted: KnownCounts) -> Iterator[str]:
    """The table. `base`: the compiled step in bfloat16, one micro-batch."""
    yield (
        "| precision | low: ms, MFU | middle: ms, MFU | high: ms, MFU | products, ms | elementwise, GB | kept for "
        "backward, GiB | counted peak, GiB | fits |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, settings in PRECISIONS.items():
        asked = with_layout(base, dataclasses.replace(base.config.parallel, **settings))
        plans = [plan_run(dataclasses.replace(asked, rate=rate), counted) for rate in ("low", "middle", "high")]
        cells = [f"{1e3 * one.step.seconds:,.0f}, {one.mfu:.1%}" for one in plans]
        plan, step = plans[1], counted_step(asked, counted)
        products = sum(plan.step.parts.get(kind, 0.0) for kind in ("gemm", "float8"))
        moved = sum(one.times * one.op.bytes for one in step.operations if one.op.kind == "memory")
        yield (
            f"| {name} | {' | '.join(cells)} | {1e3 * products:,.0f} | {moved / 1e9:,.0f} | "
            f"{plan.what['kept_gib']:.1f} | {plan.peak.total / GIB:.1f} | {'yes' if plan.fits else '**no**'} |"
        )
        if name == "linear=float8":
            reached = plan.mfu
    said = "reached" if reached >= AIM else "not reached"
    yield ""
    yield f"- **float8: the aim is {AIM:.1%} at the middle rates; predicted {reached:.1%}: {said}.**"
