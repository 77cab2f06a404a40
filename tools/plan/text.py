"""The plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from core.terminal import clock
from train.parallel.mesh import counted as amount
from train.plan.plan import GIB, Plan
from train.plan.search import BEST, reason
from train.plan.timing import PART_NAMES

BAR = 24  # characters of the longest bar


def render_text(plan: Plan, why: str, plans: Sequence[Plan], change: Plan | None) -> str:
    """All of it. `why`: where the size of the clips comes from; `plans`: of a search; `change`: the fastest that
    fits."""
    question, found = plan.question, plan.as_dict()
    clip, config = question.clip, question.config
    nodes = -(-question.world // question.per_node)
    lines = [
        f"{question.world:,} x {question.gpu.title} ({nodes:,} x {question.per_node}), {question.rate} rates: "
        "predicted, not measured",
        f"clips       {clip.frames} frames of {clip.height} x {clip.width} ({why}): {found['video_tokens']:,} video "
        f"tokens; {config.data.batch_size} a step, {question.steps:,} steps",
        f"layout      {layout_words(plan)}",
        "",
        f"memory      {verdict(plan)}, fullest in the {plan.peak.when}",
        *bars({name: size / GIB for name, size in plan.memory.items()}, "GiB"),
        "",
        f"step        {digits(plan.step.seconds)} s, MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%}; no layout beats "
        f"{digits(found['bound_seconds'])} s",
        *bars({PART_NAMES.get(name, name): seconds for name, seconds in plan.step.parts.items()}, "s"),
    ]
    if plan.step.host > plan.step.device:
        lines.append(
            f"            the host needs {digits(plan.step.host)} s to issue the kernels: longer than they run"
        )
    lines += ["", *_run_lines(plan, found), ""]
    if plans:
        lines += [
            f"layouts     the best {min(BEST, len(plans))} of {len(plans)}, bfloat16, FSDP2",
            *search_lines(plans),
        ]
        lines += [f"engines     {engines(plan)}"]
    elif not plan.fits:
        lines += [f"remedy      {remedy(change)}"]
    return "\n".join(lines)


def layout_words(plan: Plan) -> str:
    """The layout in one line, as the keys that choose it."""
    layout = plan.layout
    keys = [
        "dp_replicate", "ring", "ulysses", "recompute", "recompute_gib", "accumulate", "optimizer_state", "residual",
        "linear",
    ]  # fmt: skip
    usual = {
        "dp_replicate": 1, "ring": 1, "accumulate": "sharded", "optimizer_state": "device", "residual": "compute",
        "linear": "compute",
    }  # fmt: skip
    shown = [f"parallel.{key}={layout[key]}" for key in keys if layout[key] not in (None, usual.get(key))]
    if layout["micro_batch"] > 1:
        shown.append(f"data.micro_batch={layout['micro_batch']}")
    return " ".join([*shown, f"({amount(plan.what['micro_batches'], 'micro-batch', 'micro-batches')})"])


def digits(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    total, there = sum(plan.memory.values()) / GIB, plan.question.gpu.memory_gib
    if plan.fits:
        return f"fits: {total:.1f} of {there:.1f} GiB, {there - total:.1f} to spare"
    return f"DOES NOT FIT: {total:.1f} GiB, a GPU has {there:.1f}, {total - there:.1f} too much"


def remedy(change: Plan | None) -> str:
    """The cheapest change that makes it fit, in one line."""
    if change is None:
        return "no layout of these GPUs fits; take more GPUs, or parallel.optimizer_state=host"
    return (
        f"{layout_words(change)}: {sum(change.memory.values()) / GIB:.1f} GiB, {digits(change.step.seconds)} s a step"
    )


def engines(plan: Plan) -> str:
    """What speaks for and against ZeRO, in one line."""
    there = plan.question.gpu.memory_gib
    least = [
        f"{name} holds at least {gib:.1f} GiB before activations{'' if gib < there else ', which does not fit'}"
        for name, gib in plan.what["zero_least_gib"].items()
    ]
    return "; ".join([*least, "zero3 splits as FSDP2 does; no time is predicted for the three"])


def bars(parts: Mapping[str, float], unit: str) -> list[str]:
    """A line each, the largest first; what is nothing is left out."""
    shown = sorted(((name, value) for name, value in parts.items() if value > 0), key=lambda one: -one[1])
    most = max((value for _, value in shown), default=1.0)
    return [f"   {name:24s} {value:9.3f} {unit:4s} {'#' * round(BAR * value / most)}".rstrip() for name, value in shown]


def search_lines(plans: Sequence[Plan]) -> list[str]:
    """The best layouts with the reason why each is not the first."""
    best = plans[0]
    lines = []
    for one in plans[:BEST]:
        total = sum(one.memory.values()) / GIB
        words = layout_words(one).rpartition(" (")[0]
        lines.append(f"   {digits(one.step.seconds):>7s} s  MFU {one.mfu:5.1%}  {total:6.1f} GiB  {words}")
        lines.append(f"{'':14s}{reason(one, best)}")
    return lines


def _run_lines(plan: Plan, found: Mapping[str, object]) -> list[str]:
    total, days = plan.total_days, plan.days
    spent = ", ".join(f"{name} {clock(value * 86400)}" for name, value in days.items())
    host, checkpoint = sum(plan.host.values()) / GIB, sum(plan.checkpoint.values()) / GIB
    read, stored = found["read_gb_per_s"], found["clip_mb"]
    assert isinstance(read, dict) and isinstance(stored, dict)
    metadata, interval, best, between = (
        float(str(found[name]))
        for name in (
            "checkpoint_metadata_mb", "checkpoint_interval_seconds", "best_interval_seconds", "failure_seconds"
        )
    )  # fmt: skip
    cost = "" if found["cost"] is None else f", {found['cost']:,.0f} at the price of assume.price"
    sent = ", ".join(f"{axis} {digits(size / 1e9)}" for axis, size in plan.sent.items())
    return [
        f"run         {clock(total * 86400)} ({spent}): {found['gpu_days']:,.1f} GPU-days{cost}; "
        f"{found['clips_per_day']:,.0f} clips a day",
        f"data        {found['clips']:,} clips, {found['video_hours']:,.0f} hours; at most "
        f"{found['storage_tb']:,.1f} TB ({stored['total']:.1f} MB a clip), read at {digits(read['total'])} GB/s",
        f"encoding    {found['encoding_gpu_hours']:,.0f} GPU-hours before it, at "
        f"{plan.question.assumed.encoder_tflops:g} TFLOP/s (assumed)",
        f"checkpoint  {checkpoint:,.1f} GiB in {plan.question.world:,} files, .metadata {digits(metadata)} MB; "
        f"a step waits {found['checkpoint_stall_seconds']:.2g} s for its copy",
        f"failures    one in {clock(between)}: with a checkpoint every {clock(interval)} {found['goodput']:.1%} "
        f"of the time trains; {clock(best)} would cost the least",
        f"a node      {host:,.0f} GiB of {plan.question.gpu.host_gib:,.0f} GiB host memory; "
        f"{found['file_descriptors']:,} file descriptors a rank",
        f"sent        GB a rank and step: {sent or 'nothing'}",
    ]
