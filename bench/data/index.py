"""Time and memory that a process needs to reach a random step of a large dataset.

python -m bench.data.index                  # 45 million samples in 45,000 shards; writes bench/results/index.md
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.data.synthetic import BUCKETS, SCORES, make_rows
from core.compose import Schema
from core.program import Call, Program
from data.dataset.build import assemble
from data.dataset.index import DatasetIndex
from data.dataset.record import EMPTY_TEXT
from data.dataset.rows import save_rows
from data.dataset.selection import Rule, Selection
from data.loader.mixture import Mixture
from tools.bench.record import write_record

SIZES, WINDOW, SEED = [512, 1024, 256, 512, 384], 16, 0
TAKEN_DOWN = 1000
PART = 500  # shards whose rows are made at a time
CASES = ("whole", "selection", "mixture")


@dataclass
class IndexBench:
    """Size of the dataset.

    shards: of the dataset
    samples: of a shard
    steps: random steps at which it is opened
    place: folder for temporary files
    output: folder of the record
    """

    shards: int = 45_000
    samples: int = 1_000
    steps: int = 5
    place: str | None = None
    output: str = "bench/results"


def make_index(root: Path, shards: int, samples: int) -> None:
    """The index of a dataset without its samples: tars of the right length that hold nothing (they take no disk)."""
    root.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(1))
    sizes = samples + np.where(np.arange(shards) % 2, 64, -64) * (samples > 64)
    sizes[-1] += shards * samples - int(sizes.sum())
    save_file({"text": torch.ones(3, 4096, dtype=torch.bfloat16)}, root / EMPTY_TEXT)
    parts: dict[str, list[Path]] = {}
    for first in range(0, shards, PART):
        numbers = list(range(first, min(shards, first + PART)))
        rows = make_rows(numbers, sizes[numbers].tolist(), "plain", SCORES, rng)
        for column, values in rows.items():
            parts.setdefault(column, []).append(root / f"{column}.{first:06d}.npz")
            save_rows(parts[column][-1], values)
            for file in values.files:
                with open(root / file["name"], "wb") as tar:
                    tar.truncate(file["bytes"])
    assemble(root, parts, ["plain"])
    for path in root.glob("*.npz"):
        path.unlink()


def position(root: str, case: str, share: float) -> dict[str, Any]:
    """In a fresh process: open, select, find the batch of a random step in the first ten passes."""
    imported = resident()
    begin, used = time.perf_counter(), time.process_time()
    index = DatasetIndex.open(root)
    opened = time.perf_counter()
    loud = Rule.of(
        {"dnsmos_ovrl": [0.3, None], "silence_ratio": [None, 0.9]}, [index.key(r) for r in range(TAKEN_DOWN)]
    )
    chosen = time.perf_counter()
    if case == "whole":
        mixture = Mixture.of(index)
    elif case == "selection":
        mixture = Mixture([Selection(index, loud)])
    else:
        quiet = Rule.of({"silence_ratio": [0.5, None]})
        mixture = Mixture([Selection(index, loud), Selection(index, quiet)], [0.7, 0.3])
    selected = time.perf_counter()
    order = mixture.order(SIZES, SEED, WINDOW)
    step = int(share * 10 * len(index) / (sum(SIZES) / len(SIZES)))
    batch = order.batch(step)
    found, used = time.perf_counter(), time.process_time() - used
    order.batch(step + 1)
    following = time.perf_counter()
    return {
        "step": step,
        "pass": int(batch.passes[0]),
        "open": opened - begin,
        "select": selected - chosen,
        "find": found - selected,
        "next": following - found,
        "whole": found - begin,
        "used": used,
        "imported": imported,
        "memory": resident(),
    }


def resident() -> float:
    """Largest resident memory of this process since it began, GiB (mapped files included)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def measure(bench: IndexBench) -> list[tuple[str, str]]:
    """Make the index, measure, delete it; returns the table."""
    rng = np.random.Generator(np.random.Philox(int(time.time())))
    place = Path(tempfile.mkdtemp(dir=bench.place, prefix="bench-index-"))
    try:
        make_index(place / "dataset", bench.shards, bench.samples)
        results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(bench.steps):
                for case in CASES:
                    arguments = (str(place / "dataset"), case, float(rng.random()))
                    results[case].append(pool.apply(position, arguments))
    finally:
        shutil.rmtree(place)
    rows = [("samples, shards, buckets", f"{bench.shards * bench.samples:,}, {bench.shards:,}, {len(BUCKETS)}")]
    rows.append(("random steps, each in a fresh process", ", ".join(f"{r['step']:,}" for r in results["whole"])))
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    rows.append(("load of the machine at the end (average of a minute)", load))
    for case, what in zip(
        CASES, ("whole dataset", "2 thresholds, 1,000 keys down", "2 selections by weight"), strict=True
    ):
        found = results[case]

        def shown(name: str, found: list[dict[str, Any]] = found) -> str:
            values = [result[name] for result in found]
            return f"{statistics.median(values):.3f} s (worst {max(values):.3f})"

        parts = f"opening {shown('open')}, selecting {shown('select')}, finding the step {shown('find')}"
        rows.append((f"{what}: opened and positioned", shown("whole")))
        rows.append((f"{what}: of which", parts))
        rows.append((f"{what}: processor time", shown("used")))
        rows.append((f"{what}: the next step", shown("next")))
        memory = max(result["memory"] for result in found)
        imported = max(result["imported"] for result in found)
        rows.append(
            (f"{what}: memory of the process, at most", f"{memory:.2f} GiB, of which {imported:.2f} for imports")
        )
    return rows


def run(call: Call[IndexBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    rows = measure(bench)
    path = Path(bench.output) / "index.md"
    write_record(path, "Opening a large dataset at a random step", call.command, rows, NOTES)


NOTES = (
    "The index is synthetic (columns of random values, put together as those of a real dataset; the tars are files "
    "without content) and warm in the page cache; opening looks at the size of every tar. Times are medians over the "
    "steps, without starting Python (processor time: this process alone, whatever else "
    "the machine did); memory is the peak of resident pages (VmHWM), mapped ones included. Bars: 2 s, 1 GB."
)


PROGRAM = Program(
    "index", __doc__, run, schema=Schema("bench_index", IndexBench, ()), command="python -m bench.data.index"
)

if __name__ == "__main__":
    PROGRAM.start()
