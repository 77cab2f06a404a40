"""What `mova bench matmul`, `attention` and `exchange` share: timing, the spread of repeated rounds, and the sheet.

A rate is [low, middle, high]: the 10th percentile, the median and the best of the rounds (train/plan/gpu.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from core.durable import write_atomically
from core.errors import UserError
from tools.bench.ranks import on_ranks
from tools.bench.record import hardware
from train.plan.gpu import MEASURED_BY, GpuConfig, read_plain

LEAST = 0.01  # seconds of one timing: shorter actions are repeated within it
DIGITS = 4


def the_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(device: torch.device) -> torch.dtype:
    """What training computes in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def time_of(action: Callable[[], object], device: torch.device, least: float = LEAST) -> float:
    """Seconds that one call of an action takes, the device's work included, repeated until `least` seconds are over."""
    action()
    wait(device)
    calls, seconds = 1, 0.0
    while True:
        begin = time.perf_counter()
        for _ in range(calls):
            action()
        wait(device)
        seconds = time.perf_counter() - begin
        if seconds >= least:
            return seconds / calls
        calls = max(2 * calls, int(1.2 * calls * least / max(seconds, 1e-9)))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float], times: bool = False) -> list[float]:
    """[low, middle, high] of what rounds found: 10th percentile, median, best. `times`: the least is the best."""
    ordered = sorted(values, reverse=times)
    place = 0.1 * (len(ordered) - 1)
    below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    low = below + (above - below) * (place - int(place))
    return [float(f"{value:.{DIGITS}g}") for value in (low, statistics.median(ordered), ordered[-1])]


def in_rounds(rounds: int, once: Callable[[], Mapping[str, float]]) -> dict[str, list[float]]:
    """What each round found, by name, after one round that does not count. Processes of a group begin each together."""
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        if dist.is_initialized():
            dist.barrier()
        values = once()
        if number:
            for name, value in values.items():
                found.setdefault(name, []).append(value)
    return found


def on_processes(processes: int, measure: Callable[..., dict[str, list[float]]], *arguments: Any) -> dict[str, Any]:
    """What `measure` finds on so many processes that work at the same time, all of their rounds together.

    They have as many threads as those of `mova launch`. One process is this one. UserError where there are fewer GPUs.
    """
    if processes == 1:
        return measure(*arguments)
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise UserError(f"processes is {processes}, and this machine has {gpus} GPUs: give {gpus} at most")
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    backend = "nccl" if gpus else "gloo"
    ranks = on_ranks(processes, measure, *arguments, threads=threads, backend=backend)
    return {name: [value for rank in ranks for value in rank[name]] for name in ranks[0]}


def show(rows: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Print a table: what, [low, middle, high], unit."""
    width = max(len(what) for what, _, _ in rows)
    print(f"{'':<{width}}  {'low':>10} {'middle':>10} {'high':>10}")
    for what, values, unit in rows:
        print(f"{what:<{width}}  " + " ".join(f"{value:>10.4g}" for value in values) + f"  {unit}")


def merge_sheet(path: str | None, found: Mapping[str, Any], command: str, notes: Mapping[str, str]) -> None:
    """Write keys into a sheet, which keeps those that it has beside them, and where they come from. None: nowhere.

    `notes`: the source of a key that was not measured. UserError where there is something else in the file.
    """
    if path is None:
        print("sheet=PATH writes what was measured into a sheet that mova plan reads")
        return
    place = Path(path)
    before = read_plain(place) if place.exists() else {}
    stated = before.get("sources")
    sources = dict(stated) if isinstance(stated, dict) else {}
    measured = f"measured {time.strftime('%Y-%m-%d')} on {hardware()}: {command}"
    sources |= {key: notes.get(key, measured) for key in found}
    merged = {**before, **found, "sources": sources}
    ordered = {key: merged[key] for key in GpuConfig.__dataclass_fields__ if key in merged}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120))
    lacking = [key for key in MEASURED_BY if key not in merged]
    print(f"written to {place}" + (f"; {', '.join(lacking)} are not measured yet" if lacking else ""))
