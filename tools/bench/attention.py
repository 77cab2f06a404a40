"""Rates of attention on this machine, forward and backward, with the backend that training chooses.

    mova bench attention sheet=my-machine.yaml     # writes its keys into the sheet, and keeps the others

Not causal, head width 128. On a GPU bfloat16, 5 heads (40 among 8 ranks) over 4,096 to 43,120 tokens; on the CPU
float32, the 4 heads of `small` over the tokens of its clips. Each length is timed `rounds` times; a sheet gets the
10th percentile, the median and the best over all lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from core.compose import Schema
from core.program import Call, Program
from core.ranges import bounded
from model.backends.choice import choose
from model.backends.interface import Needs
from tools.bench import rates

GPU_LENGTHS, GPU_HEADS = [4096, 16384, 43120], 5
CPU_LENGTHS, CPU_HEADS = [208, 416, 832], 4
BACKWARD = 2.5  # products of a backward, forward's being 1: five of the same size, two in forward


@dataclass
class AttentionBench:
    """What is measured.

    lengths: tokens, queries and keys alike; []: by the device
    heads: attention heads; 0: by the device
    width: of a head
    rounds: how often
    processes: that work at the same time, a GPU each where there are GPUs
    sheet: a YAML file that gets the rates; null: none
    """

    lengths: list[int] = bounded([], "[1, inf)")
    heads: int = bounded(0, "[0, inf)")
    width: int = bounded(128, "[1, inf)")
    rounds: int = bounded(20, "[1, inf)")
    processes: int = bounded(1, "[1, 4096]")
    sheet: str | None = None


def measure(lengths: list[int], heads: int, width: int, rounds: int) -> dict[str, list[float]]:
    """TFLOP/s by round: "forward" and "backward" over all lengths, and each length's."""
    device = rates.the_device()
    dtype = rates.dtype_of(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    backend = choose("auto", Needs(device.type, dtype, capability)).backend
    given = {
        length: [torch.randn(1, length, heads, width, device=device).to(dtype).requires_grad_() for _ in range(4)]
        for length in lengths
    }

    def once() -> dict[str, float]:
        found: dict[str, float] = {}
        spent = {"forward": 0.0, "backward": 0.0}
        for length, (q, k, v, grad) in given.items():
            forward = rates.time_of(lambda q=q, k=k, v=v: backend(q, k, v), device)  # type: ignore[misc]
            out = backend(q, k, v)
            backward = rates.time_of(
                lambda out=out, q=q, k=k, v=v, grad=grad: torch.autograd.grad(  # type: ignore[misc]
                    out, (q, k, v), grad, retain_graph=True
                ),
                device,
            )
            for name, seconds in (("forward", forward), ("backward", backward)):
                spent[name] += seconds
                found[f"{name} {length}"] = flops(length, heads, width, name) / seconds / 1e12
        for name, seconds in spent.items():
            found[name] = sum(flops(length, heads, width, name) for length in given) / seconds / 1e12
        return found

    return rates.in_rounds(rounds, once)


def flops(length: int, heads: int, width: int, which: str) -> float:
    """FLOPs of one forward or backward."""
    return 4 * length**2 * heads * width * (BACKWARD if which == "backward" else 1.0)


def run(call: Call[AttentionBench]) -> None:
    """Measure, print and merge into the sheet."""
    bench, on_gpu = call.config, rates.the_device().type == "cuda"
    lengths = bench.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS)
    heads = bench.heads or (GPU_HEADS if on_gpu else CPU_HEADS)
    found = rates.on_processes(bench.processes, measure, lengths, heads, bench.width, bench.rounds)
    values = {name: rates.spread(found[name]) for name in found}
    rows = [(f"{name}, {length:,} tokens", values[f"{name} {length}"], "TFLOP/s")
            for name in ("forward", "backward") for length in lengths]  # fmt: skip
    keys = {"attention_tflops": values["forward"], "attention_backward_tflops": values["backward"]}
    rates.show([*rows, *((key, value, "TFLOP/s over all lengths") for key, value in keys.items())])
    rates.merge_sheet(bench.sheet, keys, call.command, {})


PROGRAM = Program("bench attention", __doc__, run, schema=Schema("bench_attention", AttentionBench, ()))

if __name__ == "__main__":
    PROGRAM.start()
