"""Memory and time that data.caption needs for a large table: building it, and looking up a shard's captions in it.

python -m bench.data.captions               # tables of 0.5 and 1.5 million rows; writes bench/results/captions.md
"""

from __future__ import annotations

import csv
import multiprocessing
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.compose import Schema
from core.program import Call, Program
from data.codec.builtin import text
from data.sources.caption_table import CaptionTable, copy_table
from tools.bench.record import write_record

TASK = 17_000_000  # rows that the task has
SEGMENTS = 10  # rows a file, in a table by source
WORDS = "a brown dog runs over the wet grass behind a house while somebody calls its name and rain falls on a tin roof"


@dataclass
class CaptionBench:
    """How large the tables are.

    rows: of each table
    windows: of a shard
    place: folder for temporary files
    output: folder of the record
    """

    rows: list[int] = field(default_factory=lambda: [500_000, 1_500_000])
    windows: int = 1_000
    place: str | None = None
    output: str = "bench/results"


def write_table(path: Path, by: str, rows: int) -> None:
    """A CSV table, by "key" or "source", with captions of about 20 words."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "caption"] if by == "key" else ["source", "start", "end", "caption"])
        for row in range(rows):
            caption = f"{WORDS} {row}"
            if by == "key":
                writer.writerow([f"{row * 7919:024x}", caption])
            else:
                start = row % SEGMENTS * 8
                writer.writerow([f"part/{row // SEGMENTS:09d}.mp4", start, start + 8, caption])


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (at most)."""
    match = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure(by: str, rows: int, windows: int, place: str) -> dict[str, float]:
    """In a process of its own: lay out one table, then look up the windows of 20 shards."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path, laid_out = Path(folder) / "table.csv", Path(folder) / "table"
        laid_out.mkdir()
        write_table(path, by, 1000)
        copy_table(path, {}, "", laid_out)  # imports and first allocations
        write_table(path, by, rows)
        for left in laid_out.iterdir():
            left.unlink()
        before, begin = resident("VmRSS"), time.process_time()
        copy_table(path, {}, "", laid_out)
        found = {"memory": resident("VmHWM") - before, "seconds": (time.process_time() - begin) / rows}
        found["disk"] = sum(file.stat().st_size for file in laid_out.iterdir()) / rows
        table = CaptionTable(laid_out)
        generator, begin = np.random.Generator(np.random.Philox(1)), time.process_time()
        for _ in range(20):
            first = int(generator.integers(0, max(1, rows - windows)))
            chosen = range(first, min(rows, first + windows))
            if by == "key":
                got = table.find([f"{row * 7919:024x}" for row in chosen], [0.0] * len(chosen))
            else:
                names = [f"part/{row // SEGMENTS:09d}.mp4" for row in chosen]
                got = table.find(names, [row % SEGMENTS * 8 + 4 for row in chosen])
            assert got.captions == [f"{WORDS} {row}" for row in chosen]
        found["find"] = (time.process_time() - begin) / 20
        begin = time.process_time()
        for row in range(200):
            text.encode(f"{WORDS} {row}")
        return found | {"encode": (time.process_time() - begin) / 200}


def bench(config: CaptionBench) -> list[tuple[str, str]]:
    """The rows of the table."""
    lines = []
    with tempfile.TemporaryDirectory(dir=config.place) as place:
        for by in ("key", "source"):
            memory = []
            for rows in config.rows:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, (by, rows, config.windows, place))
                name = f"{rows:,} rows by {by}"
                memory.append(found["memory"])
                lines.append((f"{name}: memory for laying out", f"{found['memory'] / 2**20:.0f} MiB"))
                lines.append((f"{name}: time for laying out", f"{found['seconds'] * 1e6:.1f} µs a row"))
                lines.append((f"{name}: disk", f"{found['disk']:.0f} bytes a row"))
                lines.append((f"{name}: finding {config.windows:,} windows", f"{found['find'] * 1e3:.1f} ms"))
            more = (memory[-1] - memory[0]) / (config.rows[-1] - config.rows[0])
            whole, seconds = memory[-1] + more * (TASK - config.rows[-1]), found["seconds"] * TASK / 60
            lines.append((f"rows by {by}: memory for each further one", f"{more:.0f} bytes"))
            lines.append((f"{TASK:,} rows by {by}, extrapolated", f"{whole / 2**30:.2f} GiB, {seconds:.1f} minutes"))
        lines.append(("one caption of 22 words encoded, width 4096", f"{found['encode'] * 1e3:.2f} ms"))
    return lines


def run(call: Call[CaptionBench]) -> None:
    """Measure and write the record."""
    config = call.config
    begin = time.perf_counter()
    rows = bench(config)
    for name, value in rows:
        print(f"{name}: {value}")
    notes = (
        "Each case in a process of its own; times are processor time; memory is the peak of resident pages (VmHWM) "
        "above what the process had before, with the reader of the table. A lookup holds none of the table: its files "
        f"are mapped. By source there are {SEGMENTS} rows a file. All of it took {time.perf_counter() - begin:.0f} s."
    )
    write_record(Path(config.output) / "captions.md", "Captions for a finished dataset", call.command, rows, notes)


PROGRAM = Program(
    "captions", __doc__, run, schema=Schema("bench_captions", CaptionBench, ()), command="python -m bench.data.captions"
)

if __name__ == "__main__":
    PROGRAM.start()
