"""Where a step of MOVA stands on H100s: its operations by source line, and the time model's step beside the bound.

    python -m bench.step.roofline                  # writes bench/results/roofline.md, about two CPU minutes

No GPU is used and nothing is measured. Counted: kernels, their FLOPs and bytes, by line of the program, and memory of
live tensors, on fake tensors with the kernels of a GPU (train/plan/count.py, train/plan/lines.py). Predicted: seconds
and MFU, by the planner's time model (train/plan/timing.py) at rates that others have published.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.step import before
from bench.step.before import AIMS, BEFORE, BEFORE_BYTES, EARLIER, EARLIER_MEMORY, EARLIER_STEPS, RATES, STUDY
from bench.step.operations import CATEGORIES, Operation, Step, category, counted_step, gap
from bench.step.precision import NOTE, precisions
from core.compose import Schema
from core.program import Call, Program
from tools.bench.record import commit
from train.config import compose_train
from train.plan.gpu import GpuConfig
from train.plan.plan import GIB, KnownCounts, Plan, plan_run
from train.plan.question import ClipSize, Question, find_sheet
from train.plan.search import with_budget, with_layout
from train.plan.stages import SELECTIVE_HOST

TOP = 15  # lines that are listed
ROUNDS = 6  # of looking for a budget
KINDS = ("none", "selective", "budget", "full")


class RooflineCase(NamedTuple):
    """A layout. clip: pixels; settings: of parallel."""

    experiment: str
    clip: ClipSize
    world: int
    settings: tuple[str, ...] = ()


CLIP_360P, CLIP_720P = ClipSize(193, 352, 640), ClipSize(193, 720, 1280)
CASES = {
    "360p, 16 GPUs, Ulysses 8": RooflineCase("mova_phase1_360p", CLIP_360P, 16, ("dp_replicate=1",)),
    "360p, 64 GPUs, Ulysses 8": RooflineCase("mova_phase1_360p", CLIP_360P, 64),
    "360p, 1,024 GPUs, Ulysses 8, 16 copies": RooflineCase("mova_phase1_360p", CLIP_360P, 1024, ("dp_replicate=16",)),
    "720p, 64 GPUs, Ulysses 8": RooflineCase("mova_phase3_720p", CLIP_720P, 64, ("ring=1",)),
    "720p, 64 GPUs, ring 2 x Ulysses 8": RooflineCase("mova_phase3_720p", CLIP_720P, 64, ("ring=2",)),
}
FIRST = "360p, 64 GPUs, Ulysses 8"  # whose operations are listed


@dataclass
class RooflineBench:
    """What is counted.

    cases: of CASES
    model: a file of conf/model in the place of each experiment's own ("": its own)
    output: folder of the record
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    model: str = ""
    output: str = "bench/results"


def sheet() -> GpuConfig:
    """The H100 of conf/gpu with the rates of the study: products and attention at low, middle and high, all others at
    the middle."""
    found = find_sheet("h100")
    fixed: dict[str, Any] = {
        name: [getattr(found, name)[1]] * 3 for name in GpuConfig.rate_names() if not name.endswith("_tflops")
    }
    return dataclasses.replace(found, **fixed)


def differences(gpu: GpuConfig) -> list[str]:
    """Where a sheet has other rates than the study."""
    found = []
    for name, values in RATES.items():
        here = getattr(gpu, name)
        if name == "launch_us":
            if not min(values) <= here[1] <= max(values):
                found.append(f"{name} is {here[1]:g}, not within {values}")
        elif [*values] != (here if len(values) > 1 else here[1:2]):
            found.append(f"{name} is {here}, {[*values]} in the study")
    return found


class Table:
    """The questions of all cases, and what was counted for them."""

    def __init__(self, bench: RooflineBench) -> None:
        self.bench, self.gpu = bench, sheet()
        self._counted: dict[ClipSize, KnownCounts] = {}

    def counted(self, name: str) -> KnownCounts:
        """Of the case's model and clips."""
        return self._counted.setdefault(CASES[name].clip, KnownCounts(lines=True))

    def question(self, name: str, kind: str, whole: bool = False, compiled: bool = False) -> Question:
        """A case with this recomputation; `whole`: the experiment's batch, else one clip for each group of ranks."""
        case = CASES[name]
        given = [f"experiment={case.experiment}", "run.id=roofline", "data.path=none"]
        given += [f"parallel.{setting}" for setting in case.settings]
        given += [f"model={self.bench.model}"] * bool(self.bench.model)
        given += ["parallel.compile=inductor"] * compiled
        config, _ = compose_train([*given, f"parallel.recompute={kind}"])
        if not whole:
            groups = case.world // (config.parallel.ring * config.parallel.ulysses)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=groups))
        return Question(config, case.world, 8, self.gpu, case.clip)

    def fitted(self, name: str, compiled: bool = False) -> Question:
        """With as little recomputation as the memory allows: none, or the largest budget that fits."""
        counted = self.counted(name)
        none = self.question(name, "none", compiled=compiled)
        return none if plan_run(none, counted).fits else self.budget(name, False, compiled)

    def budget(self, name: str, whole: bool, compiled: bool = False) -> Question:
        """With the largest budget that fits: by what a plan leaves over, or lacks."""
        best = asked = self.question(name, "attention", whole, compiled)
        tried: set[float | None] = set()
        for _ in range(ROUNDS):
            plan = plan_run(asked, self.counted(name))
            parallel = asked.config.parallel
            tried.add(parallel.recompute_gib)
            if plan.fits:
                best = asked
                following = with_budget(plan)
            else:
                lacks = sum(plan.memory.values()) / GIB - self.gpu.memory_gib
                gib = round((parallel.recompute_gib or 0.0) - lacks - 0.1, 1)
                following = with_layout(asked, dataclasses.replace(parallel, recompute_gib=gib))
            if following is None or following.config.parallel.recompute_gib in tried:
                break
            asked = following
        return best

    def step(self, question: Question, name: str) -> Step:
        """Counted by line."""
        return counted_step(question, self.counted(name))


def words(plan: Plan) -> str:
    """The recomputation of a layout."""
    gib = plan.layout["recompute_gib"]
    compiled = plan.question.config.parallel.compile != "none"
    return f"{plan.layout['recompute']}" + (f" {gib:g} GiB" if gib else "") + (", compiled" if compiled else "")


def standing(table: Table) -> Iterator[str]:
    """Predicted milliseconds and MFU of all cases at three rates, beside what they were."""
    yield (
        "| layout | recomputation | low: ms, MFU | middle: ms, MFU | high: ms, MFU | HFU, middle | "
        f"at {EARLIER}, middle | the study, middle |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name in table.bench.cases:
        asked = {words(plan_run(q, table.counted(name))): q for q in _usual(table, name)}
        for kind, question in asked.items():
            plans = [
                plan_run(dataclasses.replace(question, rate=rate), table.counted(name))
                for rate in ("low", "middle", "high")
            ]
            cells = [f"{1e3 * one.step.seconds:,.0f}, {one.mfu:.1%}" for one in plans]
            chosen = question.config.parallel.recompute
            studied = BEFORE[name] if chosen == "selective" else ""
            earlier = EARLIER_STEPS.get((name, chosen)) or EARLIER_STEPS.get((name, "budget"), "")
            if question.config.parallel.compile != "none":
                earlier = ""
            yield f"| {name} | {kind} | {' | '.join(cells)} | {plans[1].hfu:.1%} | {earlier} | {studied} |"


def _usual(table: Table, name: str) -> list[Question]:
    return [table.question(name, "selective"), table.fitted(name), table.fitted(name, compiled=True)]


def categories(step: Step) -> Iterator[str]:
    """The operations of a step by what they do."""
    passes = " | ".join(f"launches {name} | GB {name} | TFLOP {name}" for name in ("fwd", "bwd"))
    yield f"| what | {passes} | predicted ms | before: launches, GB, ms |"
    yield "|---|---|---|---|---|---|---|---|---|"
    groups: dict[str, list[Operation]] = {what: [] for what in CATEGORIES}
    for one in step.operations:
        groups[category(one)].append(one)
    rows = sorted(groups, key=lambda what: -sum(map(step.seconds, groups[what])))
    for what in [*rows, "sum"]:
        found = groups.get(what, step.operations)
        cells = []
        for is_forward in (True, False):
            part = [one for one in found if (one.line.phase == "forward") == is_forward]
            moved, flops = (sum(one.times * number(one) for one in part) for number in (_bytes, _flops))
            cells.append(f"{sum(one.times for one in part):,} | {moved / 1e9:.1f} | {flops / 1e12:.2f}")
        ms = 1e3 * sum(map(step.seconds, found))
        yield f"| {what} | {' | '.join(cells)} | {ms:,.1f} | {BEFORE_BYTES.get(what, '')} |"


def _bytes(one: Operation) -> int:
    return one.op.bytes


def _flops(one: Operation) -> int:
    return one.op.flops


def lines(step: Step) -> Iterator[str]:
    """The lines whose memory-bound kernels move the most bytes."""
    yield "| line | in | phase | operator | launches | GB | predicted ms |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, ...], list[Operation]] = {}
    for one in step.operations:
        if one.op.kind == "memory":
            line = one.line
            groups.setdefault((line.place, line.function, line.phase, line.operator), []).append(one)

    def moved(found: list[Operation]) -> int:
        return sum(one.times * one.op.bytes for one in found)

    for key, found in sorted(groups.items(), key=lambda item: -moved(item[1]))[:TOP]:
        times, ms = sum(one.times for one in found), 1e3 * sum(map(step.seconds, found))
        yield f"| {' | '.join(key)} | {times:,} | {moved(found) / 1e9:.1f} | {ms:.1f} |"
    rest = sum(map(moved, sorted(groups.values(), key=moved)[:-TOP]))
    yield f"| all others | | | | | {rest / 1e9:.1f} | |"


def by_kind(steps: dict[str, Step]) -> Iterator[str]:
    """Launches, bytes and FLOPs by kind of kernel and recomputation, and the host's part."""
    kinds = ("gemm", "attention", "attention_backward", "memory")
    yield f"| recomputation | {' | '.join(f'{kind}: launches, GB, TFLOP' for kind in kinds)} |"
    yield "|" + "---|" * (len(kinds) + 1)
    for name, step in steps.items():
        cells = []
        for kind in kinds:
            found = [one for one in step.operations if one.op.kind == kind]
            moved, flops = (sum(one.times * number(one) for one in found) for number in (_bytes, _flops))
            cells.append(f"{sum(one.times for one in found):,}, {moved / 1e9:.1f}, {flops / 1e12:.1f}")
        yield f"| {name} | {' | '.join(cells)} |"


def host(steps: dict[str, Step]) -> Iterator[str]:
    """Host time by counting: launches times the time of one."""
    plain = next(iter(steps.values()))
    yield "| recomputation | launches and collectives | over none | host s | host over device |"
    yield "|---|---|---|---|---|"
    for name, step in steps.items():
        seconds = step.launches * step.plan.question.gpu.at("middle").host_us * 1e-6
        device = step.plan.step.device
        ratio = step.launches / plain.launches
        yield f"| {name} | {step.launches:,} | {ratio:.2f} | {seconds:.3f} | {seconds / device:.2f} |"


def missing(plan: Plan, aim: float) -> float:
    """Milliseconds that a step takes longer than the MFU of an aim allows."""
    allowed: float = plan.what["model_flops"] / (aim * plan.question.gpu.peak_tflops * 1e12)
    return 1e3 * (plan.step.seconds - allowed)


def aims(steps: dict[str, Step]) -> Iterator[str]:
    """How far each aim is, and what the largest losses are."""
    for name, aim in AIMS.items():
        if step := steps.get(name):
            plan, over = step.plan, missing(step.plan, aim)
            reached = "reached" if over <= 0 else f"not reached, the step is {over:,.0f} ms too long"
            losses = [f"{what} {ms:,.0f}" for what, ms in [*gap(step).items()][1:6]]
            yield (
                f"- **{name}: the aim is {aim:.1%} in bfloat16 at the middle rates; predicted {plan.mfu:.1%} "
                f"({words(plan)}): {reached}.** The largest losses, ms: {', '.join(losses)}."
            )


def gaps(steps: list[tuple[str, Step]]) -> Iterator[str]:
    """What lies between the bound and the prediction."""
    found = [gap(step) for _, step in steps]
    rows = list(dict.fromkeys(row for one in found for row in one))
    yield f"| predicted ms | {' | '.join(f'{name} ({words(step.plan)})' for name, step in steps)} |"
    yield "|" + "---|" * (len(steps) + 1)
    for row in rows:
        yield f"| {row} | {' | '.join(f'{one.get(row, 0.0):,.1f}' for one in found)} |"
    yield f"| **sum** | {' | '.join(f'{sum(one.values()):,.0f}' for one in found)} |"
    limits = [
        step.plan.mfu * sum(one.values()) / next(iter(one.values()))
        for (_, step), one in zip(steps, found, strict=True)
    ]
    yield f"| MFU of the first row alone | {' | '.join(f'{limit:.1%}' for limit in limits)} |"
    yield f"| MFU | {' | '.join(f'{step.plan.mfu:.1%}' for _, step in steps)} |"
    units = [", ".join(map(str, step.units)) for _, step in steps]
    yield f"| units gathered in forward, gathered in backward, reduced | {' | '.join(units)} |"
    waits = [before.WAITS.get((name, step.plan.layout["recompute"]), "") for name, step in steps]
    yield f"| waiting for weights, for reductions, at {before.UNITS} with 136 units | {' | '.join(waits)} |"


def memory(table: Table) -> Iterator[str]:
    """Peak memory of every recomputation at 64 GPUs, with each experiment's own batch."""
    yield (
        "| layout | recomputation | kept for backward, GiB | counted peak, GiB | with the margin that is assumed | "
        "fits in 79.1 | FLOPs again | predicted ms a clip, MFU | "
        f"at {EARLIER}: counted peak (predicted) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in [one for one in table.bench.cases if CASES[one].world == 64]:
        for kind in KINDS:
            asked = table.budget(name, True) if kind == "budget" else table.question(name, kind, whole=True)
            plan = plan_run(asked, table.counted(name))
            again, clip = plan.hfu / plan.mfu - 1, 1e3 * plan.step.seconds / plan.what["micro_batches"]
            total = sum(plan.memory.values()) / GIB
            yield (
                f"| {name} | {words(plan)} | {plan.what['kept_gib']:.1f} | {plan.peak.total / GIB:.1f} | {total:.1f} | "
                f"{'yes' if plan.fits else '**no**'} | {again:.1%} | {clip:,.0f}, {plan.mfu:.1%} | "
                f"{EARLIER_MEMORY.get((name, kind), '')} |"
            )


def _three(name: str) -> str:
    return ", ".join(f"{value:g}" for value in RATES[name])


def page(bench: RooflineBench, command: str) -> str:
    """The record."""
    table = Table(bench)
    names = bench.cases
    first = FIRST if FIRST in names else names[0]
    steps = {kind: table.step(table.question(first, kind), first) for kind in ("none", "selective", "full")}
    steps["none, compiled"] = table.step(table.question(first, "none", compiled=True), first)
    of_64 = [name for name in names if CASES[name].world == 64]
    compiled = [(name, table.step(table.fitted(name, compiled=True), name)) for name in of_64]
    shown = [*compiled, *((name, table.step(table.fitted(name), name)) for name in of_64)]
    preset = (first, steps["selective"])  # whose memory holds more than one clip's
    asked = table.question(first, "none", compiled=True)
    differing = differences(find_sheet("h100"))
    agree = "has the same" if not differing else "differs: " + "; ".join(differing)
    parts = [
        "# The step on H100s: counted operations, predicted time", "", str(__doc__).split("\n\n")[-1].strip(), "",
        f"- command: `{command}`", f"- commit: {commit()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "- not measured on a GPU: every second and every MFU here is predicted",
        f"- rates: those of the study, products {_three('gemm_tflops')}, attention {_three('attention_tflops')} "
        f"forward and {_three('attention_backward_tflops')} backward TFLOP/s at low, middle and high; as there, all "
        f"others at the middle: memory {RATES['memory_gb_s'][0]:,}, links of a node {RATES['node_gb_s'][0]}, network "
        f"{RATES['network_gb_s'][0]} GB/s. `conf/gpu/h100.yaml` {agree}",
        f"- before: {STUDY}; and this program at {EARLIER}", "",
        "## Where it stands", "", WHERE, "", *standing(table), "", *aims(dict(compiled)), "",
        "## Between the bound and the prediction", "", GAP, "", *gaps([*shown, preset]), "",
        f"## Other precisions, {first}", "", NOTE, "", *precisions(asked, table.counted(first)), "",
        f"## Operations, {first}, nothing computed again", "", OPERATIONS, "", *categories(steps["none"]), "",
        f"## The {TOP} lines that move the most bytes", "", LINES, "", *lines(steps["none"]), "",
        "## By kind of kernel", "", *by_kind(steps), "",
        "## Host", "", HOST, "", *host(steps), "",
        "## Memory of a GPU, 64 x 80 GB", "", MEMORY, "", *memory(table), "",
    ]  # fmt: skip
    return "\n".join(parts)


WHERE = (
    "One clip on each group of ranks. The second row of a layout recomputes as little as its memory allows, and so "
    "does the third, with compiled blocks: kernels that inductor's backend for CPUs fuses, which stand for Triton's "
    "here, and calls of others (train/plan/compiled.py)."
)
GAP = (
    "At the middle rates, of the preset and of as little recomputation as the memory allows. The first row alone is "
    "the bound: products and attention of forward and backward, each at its rate."
)
OPERATIONS = (
    "Counted, of rank 0, forward and backward; FSDP2's copies and the optimizer follow from the sizes of weights, and "
    "the milliseconds are predicted at the middle rates. Before: of 16 ranks, which make the optimizer's share four "
    "times as large; one launch for each operator of aten, some of them two or three here counted as one."
)
LINES = (
    "Memory-bound kernels alone; of a backward, the line of the forward that made it, or the line of a backward that "
    "is written in the project."
)
HOST = (
    "By counting: kernels and collectives times 7 us; of compiled blocks, fused kernels of inductor's backend for CPUs "
    "and calls of others. FSDP2's and the optimizer's own launches are not among them. In eager mode a "
    f"kernel of selective takes {SELECTIVE_HOST:g} times as long, measured on a CPU ([host.md](host.md)), which is not "
    "in this table."
)
MEMORY = (
    "Counted: live tensors at the fullest moment of a step with the experiment's own batch, in several micro-batches. "
    "The margin is 5 % for the allocator and workspaces and 2.5 GiB for CUDA and NCCL. budget: the largest that fits."
)


def run(call: Call[RooflineBench]) -> None:
    """Count and write the record."""
    path = Path(call.config.output) / "roofline.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(call.config, call.command))
    print(f"written to {path}")


PROGRAM = Program(
    "roofline",
    __doc__,
    run,
    schema=Schema("bench_roofline", RooflineBench, ()),
    command="python -m bench.step.roofline",
)

if __name__ == "__main__":
    PROGRAM.start()
