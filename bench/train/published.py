"""The time model of `mova plan` against published training runs: predicted, published, error. No GPU is used.

    python -m bench.train.published     # writes bench/results/published.md

One constant for each software stack states how many times longer its steps take than the model's. A run is predicted
with the constant of the other runs of its stack (leave one out), so its own figure is not used for it; a run that is
alone in its stack with the mean constant of the others. Keys: rate (of the sheets), output (folder).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.train.published_runs import PublishedRun, published_runs
from core.compose import Schema
from core.program import Call, Program
from tools.bench.record import commit
from train.plan.gpu import RATES
from train.plan.timing import Clock, bound, simulate


@dataclass
class PublishedBench:
    """What is compared.

    rate: of the sheets: low, middle or high
    output: folder of the record
    """

    rate: str = "middle"
    output: str = "bench/results"

    def __post_init__(self) -> None:
        if self.rate not in RATES:
            raise ValueError(f"rate {self.rate!r} is not one of {', '.join(RATES)}")


@dataclass(frozen=True)
class Comparison:
    """One run. modelled: seconds of the time model alone; predicted: with the constant of other runs of its stack;
    foreign: with the mean constant of the other stacks; alone: in its stack, so that both are the same; least:
    seconds that no step can beat."""

    run: PublishedRun
    modelled: float
    predicted: float
    foreign: float
    alone: bool
    least: float

    @property
    def ratio(self) -> float:
        """How many times longer than the model it takes."""
        return self.run.seconds / self.modelled

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was published."""
        return self.predicted / self.run.seconds - 1


def compare(runs: Sequence[PublishedRun], rate: str) -> list[Comparison]:
    """All runs, each predicted without its own figure."""
    modelled = [
        simulate(
            Clock(run.gpu, rate), run.forward, run.backward, run.links, run.after, run.micro_batches, run.reduced_last
        ).seconds
        for run in runs
    ]
    ratios = {run.name: run.seconds / seconds for run, seconds in zip(runs, modelled, strict=True)}
    found = []
    for run, seconds in zip(runs, modelled, strict=True):
        siblings = [ratios[one.name] for one in runs if one.stack == run.stack and one is not run]
        rest = [one for one in runs if one.stack != run.stack]
        elsewhere = statistics.geometric_mean(constants(rest, [ratios[one.name] for one in rest]).values())
        own = statistics.geometric_mean(siblings) if siblings else elsewhere
        least = bound(run.needed, run.hardware)
        found.append(Comparison(run, seconds, seconds * own, seconds * elsewhere, not siblings, least))
    return found


def constants(runs: Sequence[PublishedRun], ratios: Sequence[float]) -> dict[str, float]:
    """The constant of each stack: the geometric mean of its runs' ratios."""
    stacks = dict.fromkeys(run.stack for run in runs)
    return {
        stack: statistics.geometric_mean(ratio for run, ratio in zip(runs, ratios, strict=True) if run.stack == stack)
        for stack in stacks
    }


def mean_error(found: Sequence[Comparison]) -> float:
    """Mean of the errors' sizes."""
    return statistics.fmean(abs(one.error) for one in found)


def foreign_error(found: Sequence[Comparison]) -> float:
    """The same where a whole stack is left out."""
    return statistics.fmean(abs(one.foreign / one.run.seconds - 1) for one in found)


def page(found: Sequence[Comparison], command: str, rate: str) -> str:
    """The record."""
    lines = [
        "# The time model against published runs", "", f"- command: `{command}`",
        f"- predicted, not measured; no GPU was used; rates of conf/gpu: {rate}",
        f"- commit: {commit()}, date: {time.strftime('%Y-%m-%d')}", "",
        "| run | stack | published | s a step | model alone, s | times longer | predicted, s | error | bound, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in found:
        run = one.run
        lines.append(
            f"| {run.name} | {run.stack}{' (alone)' if one.alone else ''} | {run.figure} | {run.seconds:.2f} | "
            f"{one.modelled:.2f} | {one.ratio:.2f} | {one.predicted:.2f} | {one.error:+.0%} | {one.least:.2f} |"
        )
    together = [one for one in found if not one.alone]
    stacks = constants([one.run for one in found], [one.ratio for one in found])
    largest = max(abs(one.error) for one in found)
    nearest = min(one.run.seconds / one.least for one in found)
    lines += [
        "",
        f"Mean error, leaving one run out: **{mean_error(found):.1%}** over all {len(found)}, "
        f"{mean_error(together):.1%} over the {len(together)} that are not alone in their stack (wanted: below 20 %). "
        f"Largest: {largest:.0%}. Leaving a whole stack out: {foreign_error(found):.1%}.",
        "",
        "Constants: " + "; ".join(f"{stack} {value:.2f}" for stack, value in stacks.items()) + ".",
        "",
        f"{'No run beats its bound' if nearest > 1 else 'A RUN BEATS ITS BOUND'}; the nearest takes "
        f"{nearest:.2f} times as long.",
        "",
        NOTES,
        "",
    ]
    for one in found:
        left = f"; left out: {one.run.left_out}" if one.run.left_out else ""
        lines.append(f"- {one.run.name}: {one.run.source}{left}")
    return "\n".join([*lines, ""])


NOTES = """\
`predicted` is the model's time multiplied by the geometric mean of `times longer` of the other runs of the same
stack; a run that is alone takes the mean constant of the other stacks, so its error shows what a stack of
which nothing is known may cost. `bound`: products and attention without recomputation at the highest rates, nothing
else. Nothing is fitted to a run: `bench/train/published_runs.py` has the geometry, the layout and the kernels.

What the errors do not show: torchtitan's four runs differ in compilation and in the number of nodes alone, so each is
easily told from the other three. Wan's figures are TFLOP/s by a calculator that was not published; its step times here
follow from this project's count (three forwards, attention not causal), so all of Wan's may be off by one factor. The
two FSDP2 runs of Wan, 175.88 on one node and 228.85 on eight, have the same work per GPU; the model has them within
1 %, and no public source says why one node is slower. MOVA's own figure is of a trainer that encodes its clips in the
step and keeps its weights on the host in float32: most of that is not modelled."""


def run(call: Call[PublishedBench]) -> None:
    """Compare and write the record."""
    found = compare(published_runs(), call.config.rate)
    path = Path(call.config.output) / "published.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(found, call.command, call.config.rate))
    for one in found:
        print(f"{one.run.name}: published {one.run.seconds:.2f} s, predicted {one.predicted:.2f} s ({one.error:+.0%})")
    print(f"mean error {mean_error(found):.1%}; written to {path}")


PROGRAM = Program(
    "published", __doc__, run, schema=Schema("bench_published", PublishedBench, ()),
    command="python -m bench.train.published",
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.start()
