"""Cost of finishing a dataset: combining the records of many units, without reading their shards.

python -m bench.data.finish   # 17 million samples, 45,000 shards, 1,000 units; writes bench/results/finish.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from bench.data.index import resident
from bench.data.synthetic import SCORES, make_rows
from core.compose import Schema
from core.program import Call, Program
from data.codec.builtin import BuiltinText
from data.dataset.index import DatasetIndex
from data.dataset.rows import AV, Rows, save_rows
from data.prepare.finish import finish
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.unit import (
    CAPTIONER,
    SHARDS_A_UNIT,
    UNITS,
    UnitConfig,
    UnitRecord,
    rejected_path,
    rows_path,
    table_path,
    thumbnails_path,
)
from data.sources.table import SourceTable
from data.windows.filter import FilterConfig
from data.windows.table import FIXED
from data.windows.window import Geometry
from tools.bench.record import write_record

REJECTED = 2000  # windows of a unit that were not kept, above those that were
THUMBNAILS = 24


@dataclass
class FinishBench:
    """Size of the dataset.

    units: parts of the work
    shards: of a unit
    samples: of a shard
    place: folder for temporary files
    output: folder of the record
    """

    units: int = 1000
    shards: int = 45
    samples: int = 378
    place: str | None = None
    output: str = "bench/results"


def make_unit(root: Path, unit: int, shards: int, samples: int) -> UnitRecord:
    """What a unit leaves beside its shards, and shards of the right length that hold nothing (they take no disk)."""
    rng = np.random.Generator(np.random.Philox(unit))
    numbers = [unit * SHARDS_A_UNIT + number for number in range(shards)]
    rows = make_rows(numbers, [samples + number % 3 - 1 for number in range(shards)], CAPTIONER, SCORES, rng)
    for column, values in rows.items():
        save_rows(rows_path(root, unit, ".", column), values)
        for file in values.files:
            with open(root / file["name"], "wb") as tar:
                tar.truncate(file["bytes"])
    _write_table(table_path(root, unit), rows[AV], unit)
    line = {"source": "a/folder/of/films/one-film.mp4", "start": 12.5, "reason": "dnsmos_ovrl >= 0.1"}
    rejected_path(root, unit).write_text((json.dumps(line) + "\n") * REJECTED)
    picture = base64.b64encode(rng.bytes(6000)).decode()
    first = sorted(rows[AV].columns["key"].tolist())[:THUMBNAILS]
    thumbnails = [
        {"key": key.decode(), "source": "film.mp4", "start": 0.0, "stored": number % 2 == 0, "why": "",
         "peaks": [0.5] * 40, "jpeg": picture, "scores": {}}
        for number, key in enumerate(first)
    ]  # fmt: skip
    thumbnails_path(root, unit).write_text(json.dumps(thumbnails))
    stored = len(rows[AV])
    return UnitRecord(
        unit, "synthetic", [], files=stored // 3, kept=stored // 3, windows=stored + REJECTED,
        stored_seconds=8.0 * stored, windows_rejected=REJECTED, span_seconds=9.0 * stored,
        buckets=[[".", "synthetic", stored]], cpu={"decode": 1.0 * stored},
    )  # fmt: skip


def _write_table(path: Path, rows: Rows, unit: int) -> None:
    """A unit's windows: those that were kept, and others."""
    import pyarrow
    import pyarrow.parquet as parquet

    kept, count = len(rows), len(rows) + REJECTED
    names = [f"folder-{unit:04d}/film-{number // 3:06d}.mp4" for number in range(count)]
    values: dict[str, Any] = {
        "key": [key.decode() for key in rows.columns["key"].tolist()]
        + [f"{unit:012d}{n:012d}" for n in range(REJECTED)],
        "source": names,
        "source_sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
        "start": np.arange(count) * 2.0,
        "seconds": np.full(count, 8.0),
        "kind": ["both"] * count,
        "part": ["."] * count,
        "failed": [""] * kept + ["dnsmos_ovrl >= 0.1"] * REJECTED,
        "reason": [""] * count,
        "unmeasured": [""] * count,
        **{name: np.full(count, 193, np.int32) for name in ("frames", "height", "width")},
        **{name: np.ones(count, bool) for name in ("has_video", "has_audio")},
        "stored": np.arange(count) < kept,
    }
    for name in SCORES:
        score = rows.columns[f"score-{name}"]
        values[name] = np.concatenate([score, np.full(REJECTED, 0.05, np.float32)])
    table = pyarrow.table({name: values[name] for name in (*FIXED, *SCORES)})
    fields = [(name, getattr(pyarrow, kind if kind != "double" else "float64")()) for name, kind in FIXED.items()]
    schema = pyarrow.schema([*fields, *((name, pyarrow.float32()) for name in SCORES)])
    parquet.write_table(table.cast(schema), path, compression="zstd")


def put_together(place: str, bench: FinishBench, records: list[UnitRecord]) -> dict[str, Any]:
    """In a fresh process: finish the dataset."""
    filters = FilterConfig({"dnsmos_ovrl": [0.1, None], "silence_ratio": [None, 0.9]}, drop=False)
    pipeline = Pipeline(PipelineConfig([Geometry(193, 24, 360, 640)], filters=filters, manifest_columns=list(SCORES)))
    nothing = {"count": 0, "first": []}
    summary = {"without_caption": nothing, "several_captions": nothing, "beside": {}}
    table = SimpleNamespace(files=sum(record.files for record in records), summary=summary)
    units = UnitConfig(
        Path(place) / "set.partial",
        bench.units,
        "synthetic",
        0,
        1 << 30,
        BuiltinText(4096),
        (".",),
        tuple(pipeline.columns),
    )
    imported, begin, used = resident(), time.perf_counter(), time.process_time()
    finish(units, "films", Path(place) / "set", {}, records, pipeline, cast(SourceTable, table), False)
    return {
        "wall": time.perf_counter() - begin,
        "used": time.process_time() - used,
        "imported": imported,
        "memory": resident(),
    }


def measure(bench: FinishBench) -> list[tuple[str, str]]:
    """Make the units, put them together, delete all; returns the table."""
    place = Path(tempfile.mkdtemp(dir=bench.place, prefix="bench-finish-"))
    try:
        root = place / "set.partial"
        (root / UNITS).mkdir(parents=True)
        (root / ".unfinished").touch()
        records = [make_unit(root, unit, bench.shards, bench.samples) for unit in range(bench.units)]
        size = sum(path.stat().st_size for path in (root / UNITS).iterdir())
        record = len(json.dumps(asdict(records[0])))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(put_together, (str(place), bench, records))
        begin = time.perf_counter()
        index = DatasetIndex.open(place / "set")
        opened = time.perf_counter() - begin
        samples, shards = len(index), len(index.shards)
        index.close()
    finally:
        shutil.rmtree(place)
    return [
        ("units, shards, samples", f"{bench.units:,}, {shards:,}, {samples:,}"),
        ("records of the units beside their shards", f"{size / 1e9:.2f} GB; a record has {record:,} bytes"),
        ("finishing: tables, report, selection, index, the folder's name", f"{found['wall']:.1f} s"),
        ("of which processor time", f"{found['used']:.1f} s"),
        ("memory of the process, at most", f"{found['memory']:.2f} GiB, of which {found['imported']:.2f} for imports"),
        ("opening the dataset then", f"{opened:.2f} s"),
        ("load of the machine at the end (average of a minute)", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
    ]


def run(call: Call[FinishBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    rows = measure(bench)
    path = Path(bench.output) / "finish.md"
    write_record(path, "Putting the units of a dataset together", call.command, rows, NOTES)


NOTES = (
    "The units are synthetic: rows of the index (random keys, checksums, scores), a table of all windows and "
    f"{REJECTED:,} further ones that were not kept, rejections and thumbnails for each; the shards are files of the "
    "right length without content, since finishing reads none of their bytes. Memory is the peak of resident pages "
    "(VmHWM), mapped ones included. Before, finishing read every byte twice in one process: at 100 to 160 TB and the "
    "2 GB/s that SHA-256 has on this machine, 28 to 45 hours for the two passes' SHA-256 and CRC-32 alone (counted)."
)


PROGRAM = Program(
    "finish", __doc__, run, schema=Schema("bench_finish", FinishBench, ()), command="python -m bench.data.finish"
)

if __name__ == "__main__":
    PROGRAM.start()
