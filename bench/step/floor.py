"""Forward and backward on one CPU thread, compared with the floor: the model's own linear and attention kernels.

    python -m bench.step.floor                              # writes bench/results/floor.md

The kernels are read off a real forward with their true shapes, and each is timed alone, forward and backward. CPU time
of the process is measured; kernels and models are timed in turn in every round, and ratios are taken within a round,
so that other load on the machine disturbs them little.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from data.clip import Bucket
from model.bridge import BridgeConfig
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.bench.step import make_batch
from train.objective.objective import Objective, ObjectiveConfig
from train.parallel.memory import LiveMemory
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import build_model
from train.parallel.recompute import GIB, KINDS, shape_of, unit_cost, units
from train.parallel.workload import Workload
from train.step import forward_backward

CLIP = Bucket(frames=5, height=24, width=40, audio_steps=96, fps=24.0, has_video=True, has_audio=True)
MODEL = JointConfig(  # 100 M parameters, heads as wide as those of the released model
    TowerConfig(dim=768, num_heads=6, num_layers=8, ffn_dim=2048, in_dim=36, out_dim=16, text_dim=512),
    TowerConfig(
        dim=384, num_heads=3, num_layers=6, ffn_dim=1536, in_dim=128, out_dim=128, text_dim=512, patch_size=[1],
        rope="dac",
    ),
    BridgeConfig(),
    two_experts=False,
    text_length=128,
)  # fmt: skip
WORKLOAD = Workload(1, (CLIP.frames, CLIP.height, CLIP.width), CLIP.audio_steps)
LEAST = 0.02  # seconds that a kernel runs for in a round, at least


@dataclass
class FloorBench:
    """What is compared with the floor.

    rounds: of everything in turn
    kinds: of recomputation; none is always measured. "half": a budget of half of the activations that `none` keeps
    backends: of torch.compile that `none` is also measured with
    output: folder of the record
    """

    rounds: int = 7
    kinds: list[str] = field(default_factory=lambda: [*KINDS, "half"])
    backends: list[str] = field(default_factory=list)
    output: str = "bench/results"


class KernelCall(NamedTuple):
    """A call of a linear or attention kernel: shapes and strides of its tensors, and which of them need a gradient."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    learned: tuple[bool, ...]


class Kernels(TorchFunctionMode):
    """While entered, counts the kernels that are called."""

    FUNCTIONS: dict[Any, str] = {linear: "linear", scaled_dot_product_attention: "attention"}

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[KernelCall] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name := self.FUNCTIONS.get(func):
            given: list[Tensor] = [x for x in args if isinstance(x, Tensor)]
            shapes, strides = (tuple(tuple(get(x)) for x in given) for get in (Tensor.size, Tensor.stride))
            self.calls[KernelCall(name, shapes, strides, tuple(x.requires_grad for x in given))] += 1
        return func(*args, **(kwargs or {}))


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of a call, in all threads of this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def prepare(kernel: KernelCall) -> Callable[[], None]:
    """A function that runs a kernel forward and backward, on random numbers in the shapes and strides of the model."""
    given = [
        torch.randn(shape).as_strided_(shape, stride).requires_grad_(learned)
        for shape, stride, learned in zip(kernel.shapes, kernel.strides, kernel.learned, strict=True)
    ]
    learned = [x for x in given if x.requires_grad]
    run: Callable[..., Tensor] = linear if kernel.name == "linear" else scaled_dot_product_attention
    gradient = torch.randn_like(run(*given))

    def both() -> None:
        torch.autograd.grad(run(*given), learned, gradient)

    both()
    return both


def time_kernel(run: Callable[[], None]) -> float:
    """CPU seconds of one run, the mean over at least LEAST seconds."""
    count, total = 0, 0.0
    while total < LEAST:
        total += seconds(run)
        count += 1
    return total / count


class Runs:
    """A model that is run forward and backward through the functions that training uses.

    kept: bytes that forward leaves for backward, activations and what is made of the batch
    """

    def __init__(self, kind: str, backend: str = "none", gib: float | None = None) -> None:
        """`gib`: of a budget, with kind "budget"."""
        parallel = ParallelConfig(compute_dtype="float32", recompute=kind, recompute_gib=gib, compile=backend)
        self._layout = make_layout(parallel, torch.device("cpu"))
        self.model = build_model(MODEL, parallel, self._layout, seed=0, workload=WORKLOAD)
        self._objective = Objective(ObjectiveConfig(), MODEL.experts)
        self._prepared = make_batch(MODEL, 1, 0, self._objective, CLIP)
        self.kept = 0
        if backend == "none":
            with LiveMemory() as memory:
                self._step(partial(self._note, memory))

    def __call__(self) -> None:
        self._step(None)
        for parameter in self.model.parameters():
            parameter.grad = None

    def _step(self, backward: Callable[[Tensor, bool], None] | None) -> None:
        forward_backward(self.model, [self._prepared], self._objective.config, "high", self._layout, backward)

    def _note(self, memory: LiveMemory, loss: Tensor, last: bool) -> None:
        self.kept = memory.live


def half_budget(model: JointTransformer, kept: int) -> float:
    """GiB for the units of a model such that half of `kept` bytes are kept, of which the rest of it has its part."""
    shapes = [shape_of(name) for name, module in model.named_modules() if module in set(units(model))]
    costs = {shape: unit_cost(MODEL, shape, "none", WORKLOAD, 1, torch.float32).kept for shape in set(shapes)}
    return (sum(costs[shape] for shape in shapes) - kept / 2) / GIB


def measure(bench: FloorBench) -> dict[str, Any]:
    """CPU seconds by round: of a step's kernels by name, and of each model. On a rank of its own."""
    plain = Runs("none")
    size = sum(parameter.numel() for parameter in plain.model.parameters())
    with Kernels() as kernels:
        plain()
    runs = {"none": plain} | {kind: Runs(kind) for kind in bench.kinds if kind not in ("none", "half")}
    if "half" in bench.kinds:
        runs["half"] = Runs("budget", gib=half_budget(plain.model, plain.kept))
    runs |= {f"none, compiled ({backend})": Runs("none", backend) for backend in bench.backends}
    for run in runs.values():
        run()
    alone = {kernel: prepare(kernel) for kernel in kernels.calls}
    floor: dict[str, list[float]] = {name: [] for name in ("linear", "attention")}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(bench.rounds):
        sums = dict.fromkeys(floor, 0.0)
        for kernel, count in kernels.calls.items():
            sums[kernel.name] += count * time_kernel(alone[kernel])
        for name, total in sums.items():
            floor[name].append(total)
        for name, run in runs.items():
            gc.collect()
            found[name].append(seconds(run))
        last = {f"{name} kernels": values[-1] for name, values in floor.items()}
        last |= {name: values[-1] for name, values in found.items()}
        print(f"round {number + 1}/{bench.rounds}: " + ", ".join(f"{k} {v:.2f} s" for k, v in last.items()))
    kept = {name: run.kept for name, run in runs.items() if run.kept}
    return {"kernels": floor, "seconds": found, "calls": kernels.calls, "size": size, "kept": kept}


def table(measured: dict[str, Any], loads: tuple[float, float]) -> list[tuple[str, str]]:
    """The rows of the record."""
    found, kernels = measured["seconds"], measured["kernels"]
    floors = [sum(parts) for parts in zip(kernels["linear"], kernels["attention"], strict=True)]
    rows = [
        ("parameters", f"{measured['size']:,}"),
        ("load of the machine before and after, one minute", f"{loads[0]:.1f}, {loads[1]:.1f}"),
        ("kernels of a step, distinct ones", f"{measured['calls'].total()}, {len(measured['calls'])}"),
        ("floor: the kernels, each alone", _spread(floors, "s", 3)),
        ("- linear", _spread(kernels["linear"], "s", 3)),
        ("- attention", _spread(kernels["attention"], "s", 3)),
    ]
    for name in found:
        ratios = [a / b for a, b in zip(found[name], floors, strict=True)]
        rows.append((f"`{name}` over the floor", f"{_spread(ratios, '', 3)}; {_spread(found[name], 's', 3)}"))
    for name in list(found)[1:]:
        ratios = [a / b for a, b in zip(found[name], found["none"], strict=True)]
        rows.append((f"`{name}` over `none`", _spread(ratios, "", 3)))
    most = measured["kept"]["none"]
    rows += [
        (f"`{name}` keeps for backward", f"{kept / GIB:.3f} GiB, {kept / most:.1%} of `none`")
        for name, kept in measured["kept"].items()
    ]
    return rows


def _spread(values: list[float], unit: str, digits: int) -> str:
    median, least, most = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} {unit} ({least} to {most})".replace("  ", " ")


def run(call: Call[FloorBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    if bench.rounds < 5:
        raise UserError(f"rounds={bench.rounds}: give at least 5, for a median of a busy machine")
    before = os.getloadavg()[0]
    [measured] = on_ranks(1, measure, bench)
    rows = table(measured, (before, os.getloadavg()[0]))
    title = "Forward and backward of 100 M parameters over their own linear and attention kernels"
    write_record(Path(bench.output) / "floor.md", title, call.command, rows, NOTES)


NOTES = (
    "CPU seconds of the process on one thread in float32: median (least to most) of the rounds; a ratio is made within "
    "a round. One clip of 5 x 24 x 40 latents with 96 steps of sound and 128 rows of text. The kernels are the calls "
    "of `linear` and `scaled_dot_product_attention` in a forward of the model, in their shapes and strides, each run "
    "alone forward and backward until 20 ms are full. The models run through `train.step.forward_backward`, loss "
    "included, as one rank; no update. `half` is `parallel.recompute=budget` with half of the bytes that `none` keeps; "
    "what is kept was counted at the end of a forward."
)


PROGRAM = Program(
    "floor",
    __doc__,
    run,
    schema=Schema("bench_floor", FloorBench, ()),
    command="python -m bench.step.floor",
)

if __name__ == "__main__":
    PROGRAM.start()
