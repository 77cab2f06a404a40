"""How soon a process stands at a random step of a large dataset, and with how much memory.

    python -m tools.bench.index                  # 45 million samples in 45,000 shards; writes bench/index.md

Keys: shards, samples (a shard, on average), steps (random ones, each in a fresh process), place (folder for the
synthetic index, about 2 GB of disk; it is deleted), output (folder).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from data.clip import Bucket
from data.index import EMPTY_TEXT, FORMAT, DatasetIndex
from data.mixture import Mixture
from data.selection import Rule, Selection
from tools.bench.record import write_record

BUCKETS = [
    Bucket(frames=frames, height=height, width=width, audio_steps=sound, fps=24.0, has_video=True, has_audio=True)
    for frames, height, width, sound in [
        (49, 44, 80, 403), (49, 60, 60, 403), (25, 44, 80, 203), (49, 80, 44, 403), (13, 90, 160, 103),
    ]
]  # fmt: skip
SIZES, WINDOW, SEED = [512, 1024, 256, 512, 384], 16, 0
TAKEN_DOWN = 1000
CASES = ("whole", "selection", "mixture")


@dataclass
class IndexBench:
    """What is measured."""

    shards: int = 45_000
    samples: int = 1_000
    steps: int = 5
    place: str | None = None
    output: str = "bench"


def make_index(root: Path, shards: int, samples: int) -> None:
    """The index of a dataset without its samples: tars of the right length that hold nothing (they take no disk).

    Keys and scores are real columns; those of offsets, sizes and checksums are empty files too (nothing here reads
    them).
    """
    index = root / "index"
    index.mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(1))
    sizes = samples + np.where(np.arange(shards) % 2, 64, -64) * (samples > 64)
    sizes[-1] += shards * samples - int(sizes.sum())
    rows = int(sizes.sum())
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    key = np.lib.format.open_memmap(index / "key.npy", mode="w+", dtype="S24", shape=(rows,))
    for start in range(0, rows, 1 << 20):
        count = min(1 << 20, rows - start)
        key[start : start + count] = digits[rng.integers(0, 16, (count, 24), dtype=np.uint8)].view("S24")[:, 0]
    for name in ("score-dnsmos_ovrl", "score-silence_ratio"):
        score = np.lib.format.open_memmap(index / f"{name}.npy", mode="w+", dtype=np.float32, shape=(rows,))
        for start in range(0, rows, 1 << 20):
            score[start : start + (1 << 20)] = rng.random(min(1 << 20, rows - start), dtype=np.float32)
        score.flush()
    key.flush()
    kinds = {"offset": np.uint64, "size": np.uint64, "crc": np.uint32, "finite": np.uint8}
    columns = {"shard": np.uint32} | {
        f"{part}_{kind}": dtype for part in ("av", "json", "text-plain") for kind, dtype in kinds.items()
    }
    for name, dtype in columns.items():
        np.lib.format.open_memmap(index / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows,)).flush()
    columns |= {"key": "S24", "score-dnsmos_ovrl": np.float32, "score-silence_ratio": np.float32}  # type: ignore[dict-item]
    save_file({"text": torch.ones(3, 4096, dtype=torch.bfloat16)}, root / EMPTY_TEXT)
    records = []
    for number, size in enumerate(sizes.tolist()):
        names = {"av": f"av-{number:06d}.tar", "text": f"text-plain-{number:06d}.tar"}
        for name in names.values():
            with open(root / name, "wb") as file:
                file.truncate(size * 1_000_000)
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        records.append(
            {
                "name": names["av"],
                "samples": size,
                "bucket": number % len(BUCKETS),
                "bytes": size * 1_000_000,
                "sha256": digest,
                "text": {"plain": names["text"]},
                "text_bytes": {"plain": size * 1_000_000},
                "text_sha256": {"plain": digest},
            }
        )
    empty = (root / EMPTY_TEXT).read_bytes()
    record = {
        "format": FORMAT,
        "samples": rows,
        "buckets": [bucket.to_dict() for bucket in BUCKETS],
        "captioners": ["plain"],
        "text_dim": 4096,
        "encoders": {},
        "empty_text": {"bytes": len(empty), "sha256": hashlib.sha256(empty).hexdigest()},
        "shards": records,
        "columns": sorted(columns),
        "column_sha256": {name: "" for name in columns},
        "fingerprint": hashlib.sha256(b"synthetic").hexdigest(),
    }
    (index / "dataset.json").write_text(json.dumps(record))


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
        rows.append((f"{what}: of it", parts))
        rows.append((f"{what}: processor time", shown("used")))
        rows.append((f"{what}: the next step", shown("next")))
        memory = max(result["memory"] for result in found)
        imported = max(result["imported"] for result in found)
        rows.append((f"{what}: memory of the process, at most", f"{memory:.2f} GiB, {imported:.2f} of it the imports"))
    return rows


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_index")
def main(config: DictConfig) -> None:
    """Entry point."""
    bench = OmegaConf.to_object(config)
    assert isinstance(bench, IndexBench)
    rows = measure(bench)
    path = Path(bench.output) / "index.md"
    command = f"python -m tools.bench.index {' '.join(sys.argv[1:])}".strip()
    write_record(path, "Opening a large dataset at a random step", command, rows, NOTES)
    print("\n".join(f"{what}: {value}" for what, value in rows) + f"\nwritten to {path}")


NOTES = (
    "The index is synthetic (keys and two scores are real columns of random values, the tars are files without "
    "content) and warm in the page cache; opening looks at the size of every tar. Times are medians over the steps, "
    "without starting Python (processor time: this process alone, whatever else "
    "the machine did); memory is the peak of resident pages (VmHWM), mapped ones included. Bars: 2 s, 1 GB."
)


if __name__ == "__main__":
    ConfigStore.instance().store(name="bench_index_schema", node=IndexBench)
    main()
