"""Runs data.prepare on a folder of every kind of bad file: it must end, with one verdict for each.

    python -m bench.data.bad_files                  # writes bench/results/bad-files.md

The files are made by bench/data/bad_media.py; the same folder is a test (tests/data/prepare/test_bad_files.py).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench.data.bad_media import DeadlyPipeline, make_folder
from core.compose import Schema
from core.program import Call, Program
from data.dataset.index import DatasetIndex
from data.prepare.curation import PrepareConfig, prepare
from data.prepare.pool import Pool
from data.sources.verdict import printable
from tools.bench.record import commit, hardware


@dataclass
class BadFilesBench:
    """How bad files are prepared.

    workers: processes
    timeout: seconds that a step of a file may take
    output: folder of the record
    """

    workers: int = 2
    timeout: float = 5.0
    output: str = "bench/results"


def curate(folder: Path, output: Path, workers: int, timeout: float) -> dict[str, Any]:
    """The summary of data.prepare over the folder, with stages that kill or block their process for some names."""
    with mock.patch("data.prepare.curation.Pool", partial(Pool, make=DeadlyPipeline)):
        record = prepare(
            PrepareConfig(
                str(folder),
                str(output),
                frames=17,
                height=32,
                width=48,
                text_dim=64,
                scores=["silence", "motion"],
                workers=workers,
                timeout=timeout,
                units=1,
            )
        )
    summary: dict[str, Any] = record["summary"]
    return summary


def verdicts(output: Path) -> dict[str, list[str]]:
    """All verdicts on each file of a dataset, by name: what is stored of it, or why nothing is."""
    index, windows = DatasetIndex.open(output), Counter[str]()
    for row in range(len(index)):
        windows[index.read_meta(row)["source"]] += 1
    lost: Counter[str] = Counter()
    found: dict[str, list[str]] = {}
    for line in (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["start"] is None:
            found.setdefault(entry["source"], []).append(entry["reason"])
        else:
            lost[entry["source"]] += 1
    for name, count in windows.items():
        found.setdefault(name, []).append(f"kept: {count} windows" + (f", {lost[name]} refused" if lost[name] else ""))
    return found


def run(call: Call[BadFilesBench]) -> None:
    """Measure and write the record."""
    config = call.config
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "raw"
        folder.mkdir()
        make_folder(folder)
        files = sum(len(names) for _, _, names in os.walk(folder))
        began = time.monotonic()
        summary = curate(folder, Path(place) / "set", config.workers, config.timeout)
        seconds = time.monotonic() - began
        found = verdicts(Path(place) / "set")
    rows = [
        f"| `{_cell(name if len(name) < 60 else name[:28] + '...' + name[-28:])}` | {_cell('; '.join(reasons))} |"
        for name, reasons in sorted(found.items())
    ]
    several = sum(len(reasons) != 1 for reasons in found.values())
    notes = (
        f"{files} names in the folder; {summary['files']} of them were tried as media files, {len(found)} have a "
        f"verdict, {several} have more than one. {summary['kept']} files were kept. It took {seconds:.0f} s with "
        f"{config.workers} workers; a step may take {config.timeout:g} s here (600 s by default). Files named "
        "`kills-`, `loops`, `sleeps` and `raises-` are whole: there a stage ends its process, does not end, or raises."
    )
    lines = [
        "# Verdicts on bad files", "", f"- command: `{call.command}`",
        f"- hardware: {hardware()}", f"- commit: {commit()}", f"- date: {time.strftime('%Y-%m-%d')}", "", notes, "",
        "| file | verdict |", "|---|---|", *rows, "",
    ]  # fmt: skip
    path = Path(config.output) / "bad-files.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    print(f"{len(found)} verdicts, {several} files with more than one; written: {path}")


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


PROGRAM = Program(
    "bad-files",
    __doc__,
    run,
    schema=Schema("bench_bad_files", BadFilesBench, ()),
    command="python -m bench.data.bad_files",
)

if __name__ == "__main__":
    PROGRAM.start()
