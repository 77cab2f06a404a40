"""Cost of the list of sources in memory, disk and time at 17 million rows, and how evenly units share the work.

python -m bench.data.sources                # tables of 10,000 and 100,000 rows; writes bench/results/sources.md
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.compose import Schema
from core.program import Call, Program
from data.sources.cells import TableLayout
from data.sources.manifest import ManifestRow
from data.sources.survey import Survey, SurveyEntry
from data.sources.table import SourceTable, make_table, prepare_table
from tools.bench.record import write_record

CAPTION = "A dog runs over a wet meadow, barks twice and shakes itself; water drums on the leaves of a lime tree. "
A_FOLDER = 1000  # files


@dataclass
class SourcesBench:
    """Sizes of the lists of sources.

    rows: of each table
    made_up: files of a table without files
    target: rows that are extrapolated to
    units: parts of the work
    place: folder for temporary files
    output: folder of the record
    """

    rows: list[int] = field(default_factory=lambda: [10_000, 100_000])
    made_up: int = 1_000_000
    target: int = 17_000_000
    units: int = 1000
    place: str | None = None
    output: str = "bench/results"


def make_source(root: Path, sizes: np.ndarray) -> Path:
    """Files of these sizes (holes but for their first bytes) and a manifest of them, with captions and two scores."""
    with open(root / "manifest.jsonl", "w") as manifest:
        for number, size in enumerate(sizes.tolist()):
            name = f"{number // A_FOLDER:05d}/clip-{number:08d}.mp4"
            if number % A_FOLDER == 0:
                (root / name).parent.mkdir()
            with open(root / name, "wb") as file:
                file.write(number.to_bytes(8, "big"))
                file.truncate(size)
            row = {"path": name, "caption": CAPTION * 2, "dover": number % 97 / 97, "desync": number % 89 / 89}
            manifest.write(json.dumps(row) + "\n")
    return root / "manifest.jsonl"


def list_all(source: str, place: str, units: int) -> dict[str, float]:
    """In a fresh process: make the table. Seconds of its two steps, and peak memory beyond the imports."""
    imported, begin = peak(), time.perf_counter()
    make_table(Path(place), Survey(source, TableLayout()), "")
    listed = time.perf_counter()
    prepare_table(Path(place), units, hash_all=False)
    return {"list": listed - begin, "deal": time.perf_counter() - listed, "memory": peak() - imported}


class MadeUp:
    """What a survey of `count` files would find, all of other sizes, without the files."""

    root, label, digest, columns, unread = "/raw", "made up", "0", ["dover", "desync"], list[str]()

    def __init__(self, count: int):
        self.count = count

    def summary(self) -> dict[str, Any]:
        """As Survey's."""
        return {"segments": self.count}

    def __iter__(self) -> Iterator[SurveyEntry]:
        for number in range(self.count):
            name = f"{number // A_FOLDER:05d}/clip-{number:08d}.mp4"
            scores = {"dover": number % 97 / 97, "desync": number % 89 / 89}
            yield SurveyEntry(
                name.encode(), ManifestRow(name, number + 1, None, [CAPTION * 2], scores), 50_000 + number
            )


def store_made_up(count: int, units: int) -> float:
    """In a fresh process: peak memory beyond the imports of a table of `count` made-up files."""
    imported = peak()
    with tempfile.TemporaryDirectory() as folder:
        make_table(Path(folder) / "table", MadeUp(count), "")
        prepare_table(Path(folder) / "table", units, hash_all=False)
    return peak() - imported


def read_unit(place: str) -> dict[str, float]:
    """In a fresh process: peak memory beyond the imports with the first unit in memory, and its files."""
    imported = peak()
    with SourceTable(Path(place)) as table:
        files = len(table.unit(0))
        return {"files": files, "memory": peak() - imported}


def peak() -> int:
    """Most bytes of memory that this process has held so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def balance(place: str) -> str:
    """max/mean of files and of bytes over the units."""
    with SourceTable(Path(place)) as table:
        found = np.array(table.sizes(), float)
        (largest,) = table._base.execute("SELECT max(size) FROM files").fetchone()
    files, size = found.max(axis=0) / found.mean(axis=0)
    return f"files {files:.3f}, bytes {size:.3f}; the largest file alone {largest / found[:, 1].mean():.3f}"


def measure(bench: SourcesBench) -> list[tuple[str, str]]:
    """Make sources and tables, measure, delete them; returns the table."""
    rng = np.random.Generator(np.random.Philox(0))
    kinds: dict[str, Callable[[int], np.ndarray]] = {
        "equal sizes": lambda count: np.full(count, 50_000),
        "log-normal sizes (sigma 1)": lambda count: np.asarray(rng.lognormal(13, 1, count)).astype(int) + 8,
        "wild sizes (Pareto, 1.2)": lambda count: np.asarray(rng.pareto(1.2, count) * 1e5).astype(int) + 8,
    }
    costs: dict[int, dict[str, float]] = {}
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for kind, sizes in kinds.items():
            for count in bench.rows if not costs else bench.rows[:1]:
                root = Path(tempfile.mkdtemp(dir=bench.place, prefix="bench-sources-"))
                try:
                    source, place = make_source(root, sizes(count)), str(root / "table")
                    units = bench.units if count * 10 > bench.units * 100 else count // 100
                    found = pool.apply(list_all, (str(source), place, units))
                    if kind == "equal sizes":
                        costs[count] = found | {"disk": os.path.getsize(place)}
                        prepare_table(Path(place), max(1, count // (bench.target // bench.units)), hash_all=False)
                        costs[count]["unit"] = pool.apply(read_unit, (place,))["memory"]
                        prepare_table(Path(place), units, hash_all=False)
                    if kind != "equal sizes" or count == bench.rows[-1]:
                        rows.append((f"{kind}: max/mean over {units} units of {count:,} files", balance(place)))
                finally:
                    shutil.rmtree(root)
        made_up = {count: pool.apply(store_made_up, (count, bench.units)) for count in (bench.rows[-1], bench.made_up)}
    return [*memory_rows(bench, made_up), *cost_rows(bench, costs), *rows]


def memory_rows(bench: SourcesBench, made_up: dict[int, float]) -> list[tuple[str, str]]:
    """The same step without files, at sizes where buffers are full, and what follows for the target."""
    few, many = min(made_up), max(made_up)
    target = made_up[many] + max(0.0, made_up[many] - made_up[few]) / (many - few) * (bench.target - many)
    values = ", ".join(f"{value / 1e6:.1f} MB at {count:,}" for count, value in made_up.items())
    what = "memory of the process that stores and deals made-up files, beyond its imports"
    return [(what, f"{values}; **{target / 1e6:,.0f} MB at {bench.target:,}** (extrapolated)")]


def cost_rows(bench: SourcesBench, costs: dict[int, dict[str, float]]) -> list[tuple[str, str]]:
    """What was measured, and what follows for the target from the first and the last by a straight line."""
    few, many = min(costs), max(costs)
    shown: dict[str, tuple[str, float, str]] = {
        "memory": ("memory of the process that makes the table, beyond its imports", 1e6, "MB"),
        "disk": ("the table on disk", 1e6, "MB"),
        "list": ("listing (rows read, sizes asked for)", 1, "s"),
        "deal": ("finding copies (all sizes are equal: 3 parts of each file are read) and dealing to units", 1, "s"),
    }
    rows = []
    for name, (what, scale, measure_of) in shown.items():
        slope = (costs[many][name] - costs[few][name]) / (many - few)
        target = costs[many][name] + slope * (bench.target - many)
        values = ", ".join(f"{cost[name] / scale:.1f} {measure_of} at {count:,}" for count, cost in costs.items())
        if name == "memory":  # of buffers that fill up: memory_rows shows where it ends
            rows.append((what, values))
            continue
        rows.append((what, f"{values}; **{target / scale:,.0f} {measure_of} at {bench.target:,}** (extrapolated)"))
    share = bench.target // bench.units
    unit = costs[many]["unit"] / 1e6
    rows.append((f"memory of a process with the table open and a unit of about {share:,} files, beyond its imports",
                 f"{unit:.1f} MB"))  # fmt: skip
    return rows


def run(call: Call[SourcesBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    rows = measure(bench)
    path = Path(bench.output) / "sources.md"
    write_record(path, "The list of sources at full size", call.command, rows, NOTES)


NOTES = (
    "Each row has a path of 24 letters, a caption of 206 and two scores. The table is made by one process and stays on "
    "disk; the process that runs a unit holds the rows of this unit alone, its workers hold single files. Memory is "
    "the peak of resident pages (VmHWM) less that after the imports. Bar: 1 GB over all processes. Before, every "
    "process held all rows, 1.2 KB each. Between 10,000 and 100,000 rows memory grows because buffers (2 MB of the "
    "table, stacks of 16 threads) fill up, so that a straight line through them is no forecast; made-up files show "
    "where the growth ends. A unit is never smaller than its largest file."
)


PROGRAM = Program(
    "sources", __doc__, run, schema=Schema("bench_sources", SourcesBench, ()), command="python -m bench.data.sources"
)

if __name__ == "__main__":
    PROGRAM.start()
