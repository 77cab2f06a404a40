"""Host time of a step by recomputation, as a ratio to a step in which nothing is computed again.

    python -m bench.step.host                      # writes bench/results/host.md, one CPU minute

Forward and backward of a model of MOVA's depth with narrow layers, as rank 0 of eight that share a clip: kernels take
next to no time, so what is measured is what a host does to issue them. CPU time of the process, all variants in turn in
every round. Nothing is sent: the process group is torch's fake one.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from model.joint import JointConfig
from tools.bench.record import write_record
from train.config import compose_train
from train.objective.objective import ObjectiveConfig
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import build_model
from train.parallel.workload import Workload
from train.plan.count import REST, Counts, count_step, make_batch, simulated_ranks
from train.step import forward_backward

RANKS = 8
WORK = Workload(1, (3, 8, 8), 20)
PLAIN = "none"


@dataclass
class HostBench:
    """What is measured.

    kinds: of recomputation, beside none
    rounds: of all in turn
    layers: of the video and of the audio tower
    output: folder of the record
    """

    kinds: list[str] = field(default_factory=lambda: ["selective", "full"])
    rounds: int = 7
    layers: list[int] = field(default_factory=lambda: [40, 30])
    output: str = "bench/results"


def narrow(layers: list[int]) -> JointConfig:
    """The smallest preset with so many layers in the video and the audio tower, a Bridge in each, and one expert."""
    config = compose_train(["model=tiny", "run.id=host", "data.path=none"])[0].model
    video, audio = (
        dataclasses.replace(tower, num_layers=number)
        for tower, number in zip((config.video, config.audio), layers, strict=True)
    )
    bridge = dataclasses.replace(config.bridge, strategy="full")
    return dataclasses.replace(config, video=video, audio=audio, bridge=bridge, two_experts=False)


def settings(kind: str) -> ParallelConfig:
    """The layout with this recomputation."""
    return ParallelConfig(ulysses=RANKS, recompute=kind, compute_dtype="bfloat16")


def launches(config: JointConfig, kinds: list[str]) -> dict[str, int]:
    """Kernels of forward and backward, counted on a CPU's operators."""
    found: dict[str, Counts] = count_step(config, settings(PLAIN), WORK, kinds, gpu=False)
    often = {"video": config.video.num_layers, REST: 1}
    return {
        kind: sum(
            often.get(shape, config.audio.num_layers) * (unit.forward.launches + unit.backward.launches)
            for shape, unit in shapes.items()
        )
        for kind, shapes in found.items()
    }


def step_of(config: JointConfig, kind: str) -> Callable[[], float]:
    """A function that runs forward and backward and returns the CPU seconds. Within a simulated process group."""
    layout = make_layout(settings(kind), torch.device("cpu"))
    model = build_model(config, settings(kind), layout, seed=0)
    batch = make_batch(config, WORK)

    def run() -> float:
        begin = time.process_time()
        forward_backward(model, [batch], ObjectiveConfig(), "high", layout)
        taken = time.process_time() - begin
        for parameter in model.parameters():
            parameter.grad = None
        return taken

    run()
    return run


def measure(bench: HostBench, config: JointConfig) -> dict[str, list[float]]:
    """CPU seconds of every variant by round."""
    with simulated_ranks(RANKS):
        runs = {kind: step_of(config, kind) for kind in (PLAIN, *bench.kinds)}
        found: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(bench.rounds):
            for kind, run in runs.items():
                found[kind].append(run())
    return found


def table(found: dict[str, list[float]], counted: dict[str, int]) -> list[tuple[str, str]]:
    """The rows of the record."""
    rows = []
    for kind, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found[PLAIN], strict=True)]
        more = counted[kind] / counted[PLAIN]
        ratio = statistics.median(ratios)
        rows += [
            (f"`{kind}`: CPU s, median (least to most)", _spread(seconds)),
            (f"`{kind}` over `{PLAIN}`", _spread(ratios)),
            (f"`{kind}`: kernels, counted", f"{counted[kind]:,}, {more:.2f} of `{PLAIN}`"),
            (f"`{kind}`: host time of a kernel over that of `{PLAIN}`", f"{ratio / more:.2f}"),
        ]
    return rows


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def run(call: Call[HostBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    if bench.rounds < 5:
        raise UserError(f"rounds={bench.rounds}: give at least 5, for a median of a busy machine")
    torch.set_num_threads(1)
    config = narrow(bench.layers)
    counted = launches(config, [PLAIN, *bench.kinds])
    found = measure(bench, config)
    title = "Host time of a step by recomputation"
    write_record(Path(bench.output) / "host.md", title, call.command, table(found, counted), NOTES)


NOTES = (
    f"Forward and backward in eager mode of the model of true depth and tiny widths, as rank 0 of {RANKS} on a fake "
    "process group, on one CPU thread; a ratio is made within a round. The kernels of a CPU, short as they are, are in "
    "these seconds, so a host that only issues them takes less; FSDP2's hooks are in them too. Kernels are counted on "
    "fake tensors (`train/plan/count.py`), without FSDP2's. The last row of `selective` is SELECTIVE_HOST of "
    "`train/plan/stages.py`."
)


PROGRAM = Program(
    "host",
    __doc__,
    run,
    schema=Schema("bench_host", HostBench, ()),
    command="python -m bench.step.host",
)

if __name__ == "__main__":
    PROGRAM.start()
