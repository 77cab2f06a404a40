"""The operations of one planned step of rank 0 by source line, and what each costs by the planner's time model.

    step = counted_step(question, counted)
    step.operations                                # each with its line, how often it runs, bytes, FLOPs
    step.seconds(operation)                        # predicted

Kernels of units are counted (train/plan/count.py), those of FSDP2 and of the optimizer follow from the sizes of
weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from core.errors import RunError
from train.plan.compiled import FUSED
from train.plan.count import REST, Counts, Pass
from train.plan.gpu import GpuConfig
from train.plan.kernels import Op
from train.plan.lines import SourceLine
from train.plan.memory import UnitWeights, Weights
from train.plan.plan import KnownCounts, Plan, key_of, plan_run, resolved, simulated_layout, workload_of
from train.plan.question import Question
from train.plan.stages import ADAMW, AVERAGE
from train.plan.timing import Clock, Kernel, bound

FSDP, OPTIMIZER = "FSDP2", "AdamW, norm, clipping"  # places of what is not counted but follows from sizes


class Operation(NamedTuple):
    """A kernel at a line of the program, and how often it runs in a step."""

    line: SourceLine
    op: Op
    times: int


@dataclass(frozen=True)
class Step:
    """One planned step. calls: collectives of sequence parallelism, by axis; units: of FSDP2, that are gathered in
    forward, gathered in backward, reduced."""

    plan: Plan
    clock: Clock
    operations: list[Operation]
    calls: Counter[str]
    units: tuple[int, int, int]

    @property
    def launches(self) -> int:
        """Counted kernels and collectives that the host issues; FSDP2's and the optimizer's are not among them."""
        return sum(one.times for one in self.operations if one.line.place != FSDP and one.line.place != OPTIMIZER) + (
            self.calls.total()
        )

    def seconds(self, one: Operation) -> float:
        """Predicted, of all its launches."""
        return self.clock.kernel(Kernel(*one.op, one.times))


def counted_step(question: Question, counted: KnownCounts) -> Step:
    """Plan a step of one micro-batch; kernels by line. RunError where lines and kernels do not sum to the same."""
    alone = KnownCounts(known=counted.known, model=counted.model, host=counted.host, lines=True)
    plan = plan_run(question, alone)
    counted.model = alone.model
    [weights] = alone.weights.values()
    parallel = resolved(question.config.parallel, question.on_gpus)
    with simulated_layout(parallel, question.world) as layout:
        workload = workload_of(question, layout)
    if workload.micro_batches != 1:
        raise RunError(f"{workload.micro_batches} micro-batches: give as many clips as there are groups of ranks")
    counts = counted.known[key_of(parallel, workload, question.on_gpus)]
    check_sums(counts)
    found, calls = _of_units(weights, counts)
    operations = [Operation(line, op, times) for (line, op), times in found.items()]
    operations += _of_sizes(weights, question.config.ema.decay > 0)
    through = [unit for unit in weights.units if unit.passed]
    units = len(weights.units), len(through), sum(unit.trains for unit in through)
    step = Step(plan, Clock(question.gpu, question.rate), operations, calls, units)
    _check_plan(step)
    return step


def check_sums(counts: dict[str, Counts]) -> None:
    """RunError where the kernels of a pass by line are not those of the pass: something is at no line, or at two."""
    for kind, shapes in counts.items():
        for shape, unit in shapes.items():
            for name, one in (("forward", unit.forward), ("backward", unit.backward)):
                found: Counter[Op] = Counter()
                for (_, op), times in one.lines.items():
                    found[op] += times
                if found != one.ops:
                    raise RunError(
                        f"{name} of {shape} with {kind}: {found.total()} kernels by line, {one.ops.total()} counted"
                    )


def _of_units(weights: Weights, counts: dict[str, Counts]) -> tuple[Counter[tuple[SourceLine, Op]], Counter[str]]:
    rest = next(iter(counts.values()))[REST]
    passes: list[Pass] = [rest.forward, rest.backward]
    for unit in weights.units:
        for part in unit.parts:
            if part.shape != REST:
                both = counts[part.kind][part.shape]
                passes += [both.forward, both.backward] if unit.passed else [both.forward]
    often = Counter(id(one) for one in passes)  # layers of a kind share their counts
    found: Counter[tuple[SourceLine, Op]] = Counter()
    calls: Counter[str] = Counter()
    for one in {id(one): one for one in passes}.values():
        for key, times in one.lines.items():
            found[key] += times * often[id(one)]
        for axis, number in one.calls.items():
            calls[axis] += number * often[id(one)]
    return found, calls


def _of_sizes(weights: Weights, average: bool) -> Iterable[Operation]:
    """Copies of FSDP2 and the optimizer, as the time model has them (train/plan/timing.py, train/plan/stages.py)."""

    def of(units: Iterable[UnitWeights], phase: str, operator: str, size: Callable[[UnitWeights], int]) -> None:
        for op, times in Counter(Op("memory", 0, size(unit)) for unit in units).items():
            if op.bytes:
                found.append(Operation(SourceLine(FSDP, "", phase, operator, ""), op, times))

    found: list[Operation] = []
    through = [unit for unit in weights.units if unit.passed]
    of(weights.units, "forward", "copy out of a gather", lambda unit: 2 * unit.gathered)
    of(through, "backward", "copy out of a gather", lambda unit: 2 * unit.gathered)
    of(through, "backward", "copy into a reduction", lambda one: one.reduced * 3 // 2)
    shard = sum(unit.shard for unit in weights.units) // weights.wide
    update = Op("memory", 0, shard * (ADAMW + AVERAGE * average))
    return [*found, Operation(SourceLine(OPTIMIZER, "", "update", "adamw", ""), update, 1)]


def _check_plan(step: Step) -> None:
    """RunError where the operations take another time than the plan's, by kind."""
    found: defaultdict[str, float] = defaultdict(float)
    for one in step.operations:
        part = {FSDP: "FSDP copies", OPTIMIZER: "optimizer"}.get(one.line.place, one.op.kind)
        found[part] += step.seconds(one)
    for part, seconds in found.items():
        planned = step.plan.step.parts[part]
        if not math.isclose(seconds, planned, rel_tol=1e-6):
            raise RunError(f"{part}: {seconds} s by line, {planned} s by the plan")


ALONE = "products and attention at their rates"
ATTENTION, PRODUCTS, ROPE, EXCHANGE = "attention", "products", "RoPE", "copies around exchanges and merges"
FUSED_KERNELS = "fused kernels of compiled blocks"
CATEGORIES = (
    ATTENTION, PRODUCTS, ROPE, "FSDP2 copies", EXCHANGE, "LayerNorm with modulation", "gate and residual",
    "RMSNorm of q and k", "GELU", "LayerNorm with weights", "bias gradients", FUSED_KERNELS,
    "other elementwise work", "optimizer",
)  # fmt: skip


def category(one: Operation) -> str:
    """Which of CATEGORIES an operation belongs to."""
    line, kind = one.line, one.op.kind
    file = line.place.partition(":")[0]
    if kind.startswith("attention"):
        return ATTENTION
    if kind in ("gemm", "float8"):
        return PRODUCTS
    if fixed := {FSDP: "FSDP2 copies", OPTIMIZER: "optimizer"}.get(line.place):
        return fixed
    if line.operator.startswith(FUSED):
        return FUSED_KERNELS
    if file == "model/rope.py" or "turn" in line.function.lower():
        return ROPE
    if file.startswith("train/parallel/"):
        return EXCHANGE
    if line.operator == "sum" and "Addmm" in line.made_by:
        return "bias gradients"
    for what, name in (("GELU", "gelu"), ("RMSNorm of q and k", "rms_norm")):
        if name in line.operator:
            return what
    if line.function.startswith(("modulate", "_Modulate")):
        return "LayerNorm with modulation"
    if "layer_norm" in line.operator:
        return "LayerNorm with weights"
    if line.function.startswith(("Block.", "_AddGated", "add_gated")):
        return "gate and residual"
    return "other elementwise work"


def gap(step: Step) -> dict[str, float]:
    """Milliseconds of a step by what lies between it and its products and attention alone, which stand first. RunError
    where they do not sum to it."""
    question = step.plan.question
    found: defaultdict[str, float] = defaultdict(float)
    for one in step.operations:
        seconds = step.seconds(one)
        if one.line.phase == "again":
            found[f"computed again: {category(one) if one.op.flops else 'elementwise work'}"] += seconds
        elif one.op.flops:
            alone = bound({one.op.kind: float(one.op.flops * one.times)}, _as_high(question))
            found[ALONE] += alone
            found["products and attention, small ones: memory or launch"] += seconds - alone
        else:
            found[category(one)] += seconds
    for part, seconds in step.plan.step.parts.items():
        if part.startswith("waiting") or part == "sequence parallelism":
            name = "exchanges of Ulysses, ring and merges, not hidden" if part.startswith("sequence") else part
            found[name] += seconds
    total = sum(found.values())
    if not math.isclose(total, step.plan.step.seconds, rel_tol=1e-6):
        raise RunError(f"{total} s by line and waiting, {step.plan.step.seconds} s by the plan")
    return {
        name: 1e3 * seconds for name, seconds in sorted(found.items(), key=lambda item: (item[0] != ALONE, -item[1]))
    }


def _as_high(question: Question) -> GpuConfig:
    """The sheet whose high rates are those of the question."""
    rates = dataclasses.asdict(question.gpu.at(question.rate))
    fixed: dict[str, Any] = {name: None if value is None else [value] * 3 for name, value in rates.items()}
    return dataclasses.replace(question.gpu, **fixed)
