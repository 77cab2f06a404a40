"""Checks this project's code on one GPU: whether it is correct, and how fast. At most 8 minutes; `make test-gpu`.

    mova bench gpu name=h100   # writes bench/results/gpu-h100.md
    mova bench gpu rehearse=true output=/tmp # the same at small sizes on the CPU, in seconds

In this order: versions and backends; attention against float32 at true shapes; a run of 20 steps, saved and resumed,
that may not wait for the device; two blocks at full width by recomputation and compilation; moments on the host; the
copy of a save. A part that fails is recorded and the next one runs; the exit status is then 1.
"""

from __future__ import annotations

import re
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from tools.bench.gpu_parts import PARTS, REHEARSAL, TRUE, ResultRow, Sizes, one_process
from tools.bench.record import commit, hardware


@dataclass
class GpuBench:
    """Settings of the measurement on one GPU.

    name: in the name of the record; null: the GPU's
    output: folder of the record
    minutes: time limit in minutes
    rehearse: small sizes on the CPU
    parts: which parts; []: all
    """

    name: str | None = None
    output: str = "bench/results"
    minutes: float = 8.0
    rehearse: bool = False
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"parts={unknown}: unknown; choose from {', '.join(PARTS)}")
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes}; give minutes above 0")


class Record:
    """All rows so far, as a page that is written again after each."""

    def __init__(self, path: Path, title: str, command: str) -> None:
        self._path, self._rows, self._errors = path, list[tuple[str, ResultRow]](), list[str]()
        measured = hardware() if torch.cuda.is_available() else f"{hardware()}; GPU: not measured"
        self._head = [
            f"# {title}", "", f"- command: `{command}`", f"- hardware: {measured}",
            f"- commit: {commit()}, torch {torch.__version__}", f"- date: {time.strftime('%Y-%m-%d')}", "",
        ]  # fmt: skip

    def add(self, part: str, row: ResultRow) -> None:
        """Add a row; print and write it."""
        self._rows.append((part, row))
        print(f"{_mark(row):6} {part}: {row.what}: {row.value}", flush=True)
        self.write()

    def fail(self, part: str, why: str, details: str = "") -> None:
        """Record a part that failed."""
        self._errors += [f"## {part}", "", "```", details.strip(), "```", ""] if details else []
        self.add(part, ResultRow("failed", why, False))

    @property
    def failed(self) -> list[str]:
        """The rows that failed."""
        return [f"{part}: {row.what}" for part, row in self._rows if row.ok is False]

    def write(self) -> None:
        """Write the current page."""
        table = ["| part | what | result | |", "|---|---|---|---|"]
        for part, row in self._rows:
            cells = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in (part, row.what, row.value)]
            table.append(f"| {' | '.join(cells)} | {_mark(row)} |")
        ending = f"{len(self.failed)} failed." if self.failed else "Nothing failed."
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join([*self._head, *table, "", ending, "", *self._errors]))


def _mark(row: ResultRow) -> str:
    return {True: "ok", False: "FAILED", None: ""}[row.ok]


def measure(record: Record, names: list[str], sizes: Sizes, device: torch.device, seconds: float) -> None:
    """Run every part in turn; after `seconds` none is begun or continued."""
    end = time.monotonic() + seconds
    for name in names:
        begin = time.monotonic()
        if begin > end:
            record.fail(name, "not run: out of time")
            continue
        try:
            for row in PARTS[name](sizes, device):
                record.add(name, row)
                if time.monotonic() > end:
                    record.fail(name, "not completed: out of time")
                    break
        except Exception as error:
            lines = str(error).strip().splitlines()
            record.fail(name, f"{type(error).__name__}: {lines[0] if lines else ''}", traceback.format_exc())
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record.add(name, ResultRow("time", f"{time.monotonic() - begin:.1f} s"))


def run(call: Call[GpuBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    if not bench.rehearse and not torch.cuda.is_available():
        raise UserError("no GPU found; rehearse=true does the same at small sizes on the CPU")
    device = torch.device("cpu") if bench.rehearse else torch.device("cuda", 0)
    named = "rehearsal" if bench.rehearse else torch.cuda.get_device_name(device)
    name = bench.name or re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")
    title = "A rehearsal on the CPU, at small sizes: no GPU was measured" if bench.rehearse else f"One GPU: {named}"
    path = Path(bench.output) / f"gpu-{name}.md"
    record = Record(path, title, call.command)
    with one_process():
        sizes = REHEARSAL if bench.rehearse else TRUE
        measure(record, bench.parts or list(PARTS), sizes, device, 60 * bench.minutes)
    print(f"written to {path}")
    if record.failed:
        raise UserError(f"{len(record.failed)} failed: {'; '.join(record.failed)}")


PROGRAM = Program("bench gpu", __doc__, run, schema=Schema("bench_gpu", GpuBench, ()))

if __name__ == "__main__":
    PROGRAM.start()
