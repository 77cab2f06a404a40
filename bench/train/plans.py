"""The paper's phases on several clusters, planned: the fastest layout that fits each, beside what the paper reached.

    python -m bench.train.plans     # writes bench/results/plans.md, five minutes on two cores

Everything is predicted at the middle rates of conf/gpu; nothing is measured. What the paper reached is derived from its
days, batches and clips, with H100-class GPUs assumed (Table 7 of arXiv 2602.08794). Steps are those of the experiments:
one pass through the paper's hours. FLOPs, bytes and memory are those of one GPU and step. Phases 1 and 2 have the same
model, clips and batch, so one search serves both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.compose import Schema
from core.program import Call, Program
from tools.bench.record import commit
from tools.plan.text import digits, layout_words
from train.config import compose_train
from train.plan.plan import GIB, KnownCounts, Plan, plan_run
from train.plan.question import ClipSize, Question, find_sheet
from train.plan.search import search

CLUSTERS = ((16, "h100"), (64, "h100"), (256, "h100"), (1024, "h100"), (256, "b200"))
PHASES = {  # experiment, clip, MFU and days that are derived for the paper's run on 1,024 GPUs
    "phase 1": ("mova_phase1_360p", ClipSize(193, 352, 640), 0.17, 15),
    "phase 2": ("mova_phase2_360p", ClipSize(193, 352, 640), 0.23, 7),
    "phase 3": ("mova_phase3_720p", ClipSize(193, 720, 1280), 0.26, 20),
}
# What a layout decides: a change of each alone says what it is worth.
CHOICES = {"clip": ("ring", "ulysses"), "copies": ("dp_replicate",), "recomputation": ("recompute", "recompute_gib")}


@dataclass
class PlansBench:
    """What is planned.

    phases: of PHASES
    processes: that count side by side
    output: folder of the record
    """

    phases: list[str] = field(default_factory=lambda: list(PHASES))
    processes: int = 2
    output: str = "bench/results"


def plans_of(phase: str, world: int, gpu: str, counted: KnownCounts, processes: int) -> list[Plan]:
    """All layouts of a phase on a cluster, the best first."""
    experiment, clip, _, _ = PHASES[phase]
    config, _ = compose_train([f"experiment={experiment}", "run.id=plan", "data.path=none"])
    return search(Question(config, world, 8, find_sheet(gpu), clip), counted, processes)


def again(phase: str, plan: Plan, counted: KnownCounts) -> Plan:
    """The same layout in a phase that has the same model, clips and batch."""
    config, _ = compose_train([f"experiment={PHASES[phase][0]}", "run.id=plan", "data.path=none"])
    asked, data = plan.question.config, plan.question.config.data
    assert (config.model, config.data.batch_size) == (asked.model, data.batch_size)
    micro_batch = dataclasses.replace(config.data, micro_batch=data.micro_batch)
    config = dataclasses.replace(config, parallel=asked.parallel, data=micro_batch)
    return plan_run(dataclasses.replace(plan.question, config=config), counted)


def others(plans: Sequence[Plan]) -> dict[str, Plan]:
    """For each choice the best plan that differs from the first in it, and in as little else as there is."""
    best, found = plans[0], {}
    for choice, keys in CHOICES.items():
        different = [one for one in plans if any(one.layout[key] != best.layout[key] for key in keys)]
        rest = [key for other in CHOICES.values() if other is not keys for key in other]
        alone = [one for one in different if all(one.layout[key] == best.layout[key] for key in rest)]
        if candidates := alone or different:
            found[choice] = candidates[0]
    return found


def run(call: Call[PlansBench]) -> None:
    """Plan and write the record."""
    head = ["# The paper's phases, planned", "", str(__doc__).split("\n\n")[-1].strip(), ""]
    head += [f"- command: `{call.command}`", f"- commit: {commit()}, {time.strftime('%Y-%m-%d')}", ""]
    table = ["| phase | GPUs | layout | s a step | MFU | HFU | GiB of a GPU | days | GPU-days |"]
    table += ["|---|---|---|---|---|---|---|---|---|"]
    reasons: list[str] = []
    known: dict[ClipSize, tuple[KnownCounts, dict[tuple[int, str], Plan]]] = {}
    path = Path(call.config.output) / "plans.md"
    for phase in call.config.phases:
        _, clip, mfu, days = PHASES[phase]
        counted, found = known.setdefault(clip, (KnownCounts(), {}))
        if not found:
            reasons += ["", f"## {phase.capitalize()}: why this layout", ""]
        for world, gpu in CLUSTERS:
            if (world, gpu) in found:  # the same search
                best = again(phase, found[world, gpu], counted)
            else:
                plans = plans_of(phase, world, gpu, counted, call.config.processes)
                best = found[world, gpu] = plans[0]
                reasons += [f"- **{world:,} {gpu.upper()}**: {_work(best)}."]
                reasons += [f"    - other {choice}: {_against(one, best)}" for choice, one in others(plans).items()]
            table.append(_row(phase, best))
            print(table[-1], flush=True)
        ranks = 16 if phase == "phase 3" else 8
        table.append(
            f"| {phase} | 1,024, the paper's run (derived) | {ranks} ranks share a clip, shards of 16 | | {mfu:.0%} | "
            f"| | {days} | {1024 * days:,} |"
        )
        path.write_text("\n".join([*head, *table, *reasons, ""]))  # what is there, should the next one fail
    print(f"written to {path}")


def _row(phase: str, best: Plan) -> str:
    question = best.question
    return (
        f"| {phase} | {question.world:,} {question.gpu.title} | {_words(best)} ({best.what['micro_batches']} x "
        f"{best.layout['micro_batch']}) | {digits(best.step.seconds)} | {best.mfu:.1%} | {best.hfu:.1%} | "
        f"{sum(best.memory.values()) / GIB:.1f} of {question.gpu.memory_gib:.0f} | {best.total_days:,.1f}"
        f"{'' if best.fits else ' (does not fit)'} | {best.total_days * question.world:,.0f} |"
    )


def _words(plan: Plan) -> str:
    return layout_words(plan).replace("parallel.", "").replace("data.", "").rpartition(" (")[0]


def _repeated(plan: Plan) -> float:
    """FLOPs that backward computes again."""
    return float(plan.what["model_flops"]) * (plan.hfu / plan.mfu - 1)


def _work(plan: Plan) -> str:
    sent = ", ".join(f"{axis} {size / 1e9:.1f}" for axis, size in plan.sent.items())
    waits = sum(seconds for part, seconds in plan.step.parts.items() if part.startswith("waiting"))
    return (
        f"{_words(plan)}: {plan.what['model_flops'] / 1e12:,.0f} TFLOP and {_repeated(plan) / 1e12:,.0f} again; sends "
        f"GB {sent or 'none'}; keeps {plan.what['kept_gib']:.1f} GiB for backward; waits {digits(waits)} of "
        f"{digits(plan.step.seconds)} s for exchanges of weights and gradients"
    )


def _against(plan: Plan, best: Plan) -> str:
    """What another layout costs, in FLOPs, bytes and seconds of its largest loss."""
    total = sum(plan.memory.values()) / GIB
    if not plan.fits:
        largest = max(plan.peak.parts, key=lambda part: plan.peak.parts[part])
        there = plan.question.gpu.memory_gib
        return (
            f"{_words(plan)} does not fit: {total:.1f} of {there:.0f} GiB, of which {largest} "
            f"{plan.peak.parts[largest] / GIB:.1f}"
        )
    more = [f"{plan.step.seconds / best.step.seconds - 1:+.1%}"]
    if abs(more_flops := (_repeated(plan) - _repeated(best)) / 1e12) >= 1:
        more.append(f"{more_flops:+,.0f} TFLOP computed again")
    for axis in sorted(plan.sent.keys() | best.sent.keys()):
        if abs(difference := (plan.sent.get(axis, 0.0) - best.sent.get(axis, 0.0)) / 1e9) >= 0.1:
            more.append(f"{difference:+,.1f} GB over {axis}")
    lost = {part: seconds - best.step.parts.get(part, 0.0) for part, seconds in plan.step.parts.items()}
    part = max(lost, key=lambda name: lost[name])
    return f"{_words(plan)}: {', '.join(more)}; {lost[part]:+.2f} s of {part}; {total:.1f} GiB"


PROGRAM = Program(
    "plans", __doc__, run, schema=Schema("bench_plans", PlansBench, ()), command="python -m bench.train.plans"
)

if __name__ == "__main__":
    PROGRAM.start()
