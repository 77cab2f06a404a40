"""Rates of matrix products and elementwise operators on this machine, and what an operator costs the host.

    mova bench matmul sheet=my-machine.yaml     # writes its keys into the sheet, and keeps the others
    mova bench matmul processes=4               # what one process reaches while four work

A product is the forward of a linear layer and both products of its backward, at the shapes of the video tower. On a
GPU bfloat16 and MOVA-360p's 5,390 tokens of 8 ranks; on the CPU float32 and `small` with 4 clips of the quickstart.
Elementwise operators (a sum, a product, a copy) read and write tensors of the tower's width. Each is timed `rounds`
times; a sheet gets the 10th percentile, the median and the best.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch

from core.compose import Schema
from core.program import Call, Program
from core.ranges import bounded
from tools.bench import rates
from tools.bench.record import hardware
from train.monitor.throughput import peak_of

GPU_SHAPES = [[5390, 5120, 5120], [5390, 5120, 13824], [5390, 13824, 5120], [8192, 8192, 8192]]
CPU_SHAPES = [[832, 512, 512], [832, 512, 1536], [832, 1536, 512], [1024, 1024, 1024]]
TENSORS = 8  # that elementwise operators go through in turn, so that none is in a cache because it was just used
LINKS = 100  # operators of a chain that autograd records
QUEUED = 200  # small kernels behind a long one
GIB = 2**30


@dataclass
class MatmulBench:
    """What is measured.

    shapes: [rows, inputs, outputs] of each linear layer; []: by the device
    rounds: how often
    processes: that work at the same time, a GPU each where there are GPUs
    sheet: a YAML file that gets the rates; null: none
    """

    shapes: list[list[int]] = field(default_factory=list)
    rounds: int = bounded(20, "[1, inf)")
    processes: int = bounded(1, "[1, 4096]")
    sheet: str | None = None

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if len(shape) != 3 or min(shape) < 1:
                raise ValueError(f"shapes has {shape}; each is [rows, inputs, outputs], all above 0")


def measure(shapes: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """By round: "gemm" (TFLOP/s over all shapes) and each shape's, "memory" and "copy" (GB/s), "launch" and "host"
    (us)."""
    device = rates.the_device()
    layers = [_Layer(rows, inputs, outputs, device) for rows, inputs, outputs in shapes]
    width, dtype = (shapes[0][0], shapes[0][2]), rates.dtype_of(device)
    tensors = [torch.randn(width, device=device).to(dtype) for _ in range(TENSORS)]

    def once() -> dict[str, float]:
        seconds = [layer.seconds() for layer in layers]
        flops = [layer.flops for layer in layers]
        return {
            "gemm": sum(flops) / sum(seconds) / 1e12,
            **{str(shape): one / spent / 1e12 for shape, one, spent in zip(shapes, flops, seconds, strict=True)},
            "memory": memory_rate(tensors, device) / 1e9,
            "launch": 1e6 * launch_time(device),
            "host": 1e6 * host_time(device),
            "copy": copy_rate(tensors[0], device) / 1e9,
        }

    return rates.in_rounds(rounds, once)


class _Layer:
    """A linear layer's three products."""

    def __init__(self, rows: int, inputs: int, outputs: int, device: torch.device) -> None:
        self._device, dtype = device, rates.dtype_of(device)
        self._x = torch.randn(rows, inputs, device=device).to(dtype)
        self._weight = torch.randn(outputs, inputs, device=device).to(dtype)
        self._grad = torch.randn(rows, outputs, device=device).to(dtype)
        self.flops = 3 * 2 * rows * inputs * outputs

    def seconds(self) -> float:
        """Of all three."""
        x, weight, grad = self._x, self._weight, self._grad
        products = (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x)
        return sum(rates.time_of(product, self._device) for product in products)


def memory_rate(tensors: list[torch.Tensor], device: torch.device) -> float:
    """Bytes a second, read and written, of a sum, a product and a copy, each into new memory, as an eager step."""
    size = tensors[0].numel() * tensors[0].element_size()
    pairs = list(zip(tensors, tensors[1:] + tensors[:1], strict=True))

    def through() -> None:
        for one, other in pairs:
            _ = one + other
            _ = one * 1.5
            _ = one.clone()

    return len(pairs) * (3 + 2 + 2) * size / rates.time_of(through, device)


def copy_rate(tensor: torch.Tensor, device: torch.device) -> float:
    """Bytes a second between a device and memory of its host that can't be paged out, there and back one after the
    other; on the CPU from memory to memory."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda")

    def both() -> None:
        there.copy_(tensor, non_blocking=True)
        tensor.copy_(there, non_blocking=True)

    return 2 * tensor.nbytes / rates.time_of(both, device)


def launch_time(device: torch.device) -> float:
    """Seconds of the smallest kernel on the device: on a GPU in a queue that the host has filled, on the CPU of the
    smallest operator."""
    x = torch.zeros(1, device=device)
    if device.type != "cuda":
        return rates.time_of(lambda: x.add_(1), device)
    ahead = torch.zeros(8192, 8192, device=device, dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rates.wait(device)
    for _ in range(8):  # longer than the host needs to queue what follows
        ahead @ ahead
    begin.record()
    for _ in range(QUEUED):
        x.add_(1)
    end.record()
    rates.wait(device)
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / QUEUED


def host_time(device: torch.device) -> float:
    """Seconds of the host for one operator: a chain that autograd records and goes back through, on tiny tensors."""
    factor = torch.ones(1, device=device)
    leaf = torch.ones(1, device=device, requires_grad=True)
    rates.wait(device)
    begin = time.perf_counter()
    x = leaf * factor
    for _ in range(LINKS - 1):
        x = x * factor
    x.backward()
    spent = time.perf_counter() - begin
    rates.wait(device)
    return spent / (2 * LINKS)  # each product has one in backward


def run(call: Call[MatmulBench]) -> None:
    """Measure, print and merge into the sheet."""
    bench, device = call.config, rates.the_device()
    shapes = bench.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    found = rates.on_processes(bench.processes, measure, shapes, bench.rounds)
    gemm, memory, copy = (rates.spread(found[name]) for name in ("gemm", "memory", "copy"))
    launch, host = (rates.spread(found[name], times=True) for name in ("launch", "host"))
    rows = [(f"product {shape}", rates.spread(found[str(shape)]), "TFLOP/s") for shape in shapes]
    rows += [
        ("gemm_tflops", gemm, "TFLOP/s over all shapes"), ("memory_gb_s", memory, "GB/s"),
        ("launch_us", launch, "us"), ("host_us", host, "us an operator"),
        ("host_gb_s", copy, "GB/s to and from host memory"),
    ]  # fmt: skip
    rates.show(rows)
    title, memory_gib, peak = machine(device, gemm[-1])
    notes = {} if peak != gemm[-1] else {"peak_tflops": "the best product: no peak of this device is known"}
    keys = {
        "title": title, "device": device.type, "memory_gib": memory_gib, "peak_tflops": peak, "gemm_tflops": gemm,
        "memory_gb_s": memory, "launch_us": launch, "host_us": host, "host_gib": host_gib(),
        "host_gb_s": copy,
    }  # fmt: skip
    rates.merge_sheet(bench.sheet, keys, call.command, notes)


def machine(device: torch.device, best: float) -> tuple[str, float, float]:
    """(its name, GiB of its memory, peak TFLOP/s); the peak is `best` where no peak is known."""
    if device.type != "cuda":
        return hardware(), host_gib(), best
    properties = torch.cuda.get_device_properties(device)
    peak = peak_of(properties.name)
    return properties.name, round(properties.total_memory / GIB, 2), best if peak is None else peak / 1e12


def host_gib() -> float:
    """Memory of this host, GiB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 2)


PROGRAM = Program("bench matmul", __doc__, run, schema=Schema("bench_matmul", MatmulBench, ()))

if __name__ == "__main__":
    PROGRAM.start()
