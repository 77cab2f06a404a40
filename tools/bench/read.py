"""Reading speed: this project, stock webdataset and the raw file, on samples of real size; and a training step's wait.

mova bench read   # writes bench/results/read.md
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import webdataset
from omegaconf import MISSING
from safetensors.torch import load

from core.compose import Schema
from core.program import Call, Program
from data.batch import Batch, Sample, assemble, pad_text, unfilled
from data.clip import Bucket, EncodedClip
from data.dataset.build import build_index
from data.dataset.checksum import KINDS, ChecksumKind, sha256
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter, write_empty_text
from model.joint import JointConfig
from tools.bench.record import write_record
from tools.bench.step import CLIP
from train.data_config import DataConfig
from train.dataloader import close_data, open_data, open_stream, start_state
from train.engine.optim import ShardedOptimizer
from train.engine.optim_config import OptimConfig
from train.objective.objective import Objective, ObjectiveConfig
from train.parallel.mesh import ParallelConfig, make_layout, start_process_group
from train.parallel.parallelize import build_model
from train.step import forward_backward

REAL = Bucket(frames=49, height=44, width=80, audio_steps=403, fps=24.0, has_video=True, has_audio=True)
TEXT = (512, 4096)
STORED = 9  # frames of the condition before its constant tail
CAPTIONER = "builtin"
BATCH = 4


@dataclass
class ReadBench:
    """The dataset and the training run.

    samples: of the dataset
    repeats: of each variant
    steps: training steps, in which the time waiting for data is measured
    folder: for temporary files
    output: folder of the record
    """

    model: JointConfig = MISSING
    samples: int = 24
    repeats: int = 15
    steps: int = 20
    folder: str | None = None
    output: str = "bench/results"


def make_shards(root: Path, bucket: Bucket, samples: int, text: tuple[int, int]) -> None:
    """One shard of random latents."""
    generator = torch.Generator().manual_seed(0)
    grid = (16, bucket.frames, bucket.height, bucket.width)
    with ShardWriter(root, samples, CAPTIONER) as writer:
        for number in range(samples):
            video = torch.randn(grid, generator=generator).bfloat16()
            condition = video.clone()
            condition[:, STORED:] = condition[:, STORED - 1 : STORED]
            sound = torch.randn(bucket.audio_steps, 128, generator=generator).bfloat16()
            caption = torch.randn(text, generator=generator).bfloat16()
            writer.write(EncodedClip(f"{number:024x}", video, sound, condition, {}), bucket, "", caption)
    write_empty_text(root, torch.zeros(1, text[1]))
    build_index(root).close()


def as_format_2(root: Path) -> Path:
    """The same dataset with an index of format 2: with CRC-32."""
    index = DatasetIndex.open(root)
    folder = root.with_name(f"{root.name}-format-2")
    folder.mkdir()
    for path in root.glob("*.*"):
        os.link(path, folder / path.name)
    (folder / "index").mkdir()
    old = KINDS[2]
    record = {**index.record, "format": 2, "column_sha256": {}}
    for name, values in index.columns.items():
        if name.endswith("_xxh3"):
            member = name.removesuffix("_xxh3")
            name, values = f"{member}_{old.name}", np.array(_checksums(index, member, old), old.dtype)
        np.save(folder / "index" / f"{name}.npy", values)
        record["column_sha256"][name] = sha256(folder / "index" / f"{name}.npy")
    record["columns"] = sorted(record["column_sha256"])
    for name in ("sha256", "column_xxh3", "column_bytes", "column_block"):
        del record[name]
    (folder / "index" / "dataset.json").write_text(json.dumps(record))
    return folder


def _checksums(index: DatasetIndex, member: str, kind: ChecksumKind) -> list[int]:
    found = []
    for row in range(len(index)):
        shard = index.shards[index.shard_of(row)]
        name = shard["name"] if member in ("av", "json") else shard["text"][member.removeprefix("text-")]
        with open(Path(index.root) / name, "rb") as file:
            file.seek(int(index.columns[f"{member}_offset"][row]))
            found.append(kind.of(file.read(int(index.columns[f"{member}_size"][row]))))
    return found


def read_raw(files: list[Path], buffer: memoryview) -> None:
    """Read the bytes of the files, one part after another into the same memory."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_ours(index: DatasetIndex, size: int = BATCH) -> Batch:
    """Read every sample into fresh batches, as the stream does; returns the last batch."""
    empty = pad_text(index.empty_text(), TEXT[0])
    for row in range(len(index)):
        if row % size == 0:
            batch = unfilled(0, REAL, size, empty, TEXT[0], size)
        index.read_into(row, CAPTIONER, **batch.slot(row % size))
    return batch


def read_stock(files: list[Path], empty: torch.Tensor) -> Batch:
    """The same with webdataset's own reader and safetensors' own loader."""
    streams = [webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False) for path in files]
    samples: list[Sample] = []
    for clip, text in zip(*streams, strict=True):
        sample = EncodedClip.from_members(clip["__key__"], clip["safetensors"], clip["json"], REAL)
        samples.append(Sample(sample.key, 0, 1.0, sample, load(text["safetensors"])["text"]))
        if len(samples) == BATCH:
            batch = assemble(0, REAL, samples, empty, TEXT[0], BATCH)
            samples = []
    return batch


def measure_reading(root: Path, samples: int, repeats: int) -> list[tuple[str, str]]:
    """Measure all variants in turn, so that other load on the machine affects all of them."""
    if samples % BATCH:
        raise ValueError(f"samples is {samples}: give a multiple of {BATCH}")
    make_shards(root, REAL, samples, TEXT)
    files = [root / "av-000000.tar", root / f"text-{CAPTIONER}-000000.tar"]
    total = sum(path.stat().st_size for path in files)
    checks: list[Literal["none", "crc", "full"]] = ["none", "crc", "full"]
    indexes = [DatasetIndex.open(root, verify=check) for check in checks]
    before = DatasetIndex.open(as_format_2(root))
    buffer = memoryview(bytearray(1 << 20))
    empty = indexes[0].empty_text()
    stock, ours = read_stock(files, empty), read_ours(indexes[0])
    for name in ("video", "audio", "condition", "text"):
        if not torch.equal(getattr(stock, name), getattr(ours, name)):
            raise AssertionError(f"{name} of the two readers differs")
    variants: dict[str, Callable[[], object]] = {
        "raw read of the same two files, parts of 1 MiB into the same memory": lambda: read_raw(files, buffer),
        "ours, no checksum (verify=none)": lambda: read_ours(indexes[0]),
        f"ours, checksums of format 3, {KINDS[3].name} (verify=crc, the default)": lambda: read_ours(indexes[1]),
        "ours, checksums and search for NaN (verify=full)": lambda: read_ours(indexes[2]),
        "stock webdataset and safetensors.load, no checksum": lambda: read_stock(files, empty),
        "ours, no checksum, batches of one": lambda: read_ours(indexes[0], 1),
        f"ours, checksums of format 2, {KINDS[2].name} (a dataset as it was written before)": lambda: read_ours(before),
    }
    wall: dict[str, list[float]] = {name: [] for name in variants}
    busy: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, read in variants.items():
            begin, used = time.perf_counter(), time.process_time()
            read()
            wall[name].append((time.perf_counter() - begin) / samples)
            busy[name].append((time.process_time() - used) / samples)
    size = total / samples
    names = list(variants)
    rows = [(f"sample: {REAL}; text {TEXT[0]}x{TEXT[1]}; in the files", f"{size / 1e6:.2f} MB")]
    for name in names:
        best, cpu = min(wall[name]), min(busy[name])
        rows.append(
            (name, f"{best * 1e3:.2f} ms a sample, {size / best / 1e9:.2f} GB/s; {cpu * 1e3:.2f} ms of processor time")
        )
    by_wall, by_cpu = ([min(times[name]) for name in names] for times in (wall, busy))
    for what, of, over in (
        ("ours without checksum, of the raw rate (wanted: 0.5)", 0, 1),
        ("ours without checksum, batches of one, of the raw rate", 0, 5),
        ("ours with checksum, of the raw rate (wanted: 0.5)", 0, 2),
        ("ours with the checksum of format 2, of the raw rate", 0, 6),
        ("ours without checksum, times stock webdataset (wanted: 3)", 4, 1),
        ("ours with checksum, times stock webdataset (wanted: 3)", 4, 2),
        ("ours with the checksum of format 2, times stock webdataset", 4, 6),
    ):
        rows.append((what, f"{by_wall[of] / by_wall[over]:.2f}; by processor time {by_cpu[of] / by_cpu[over]:.2f}"))
    adds = "; of format 2 ".join(f"{(by_cpu[over] - by_cpu[1]) * 1e3:.2f}" for over in (2, 6))
    rows.append(("what the checksum adds", f"{adds} ms of processor time a sample"))
    return rows


def measure_waiting(root: Path, config: JointConfig, steps: int) -> list[tuple[str, str]]:
    """Train with the stream that training uses; measure how long each step waits for data."""
    make_shards(root, CLIP, 64, (config.text_length, config.video.text_dim))
    layout = make_layout(ParallelConfig(), start_process_group())
    objective = Objective(ObjectiveConfig(), config.experts)
    model = build_model(config, ParallelConfig(), layout, seed=0)
    optimizer = ShardedOptimizer(model, OptimConfig(), layout.shard_group)
    data = DataConfig(path=str(root), batch_size=4, micro_batch=4)
    parts = open_data(data, config.video.text_dim)
    state = start_state(parts, data, seed=0)
    waits, times = [], []
    with open_stream(parts, state, data, layout, objective, 0, config.text_length) as stream:
        for step in range(steps + 2):
            begin = time.perf_counter()
            prepared = next(stream)
            forward_backward(model, prepared, objective.config, objective.expert(step), layout)
            optimizer.step(1.0, optimizer.global_norm())
            if step >= 2:
                times.append(time.perf_counter() - begin)
                waits.append(stream.data_wait)
    close_data(parts)
    dist.destroy_process_group()
    share = sum(waits) / sum(times)
    return [
        (f"step of the model: 4 clips, {CLIP}, median", f"{statistics.median(times):.3f} s"),
        ("data_wait of it, median (largest)", f"{statistics.median(waits) * 1e3:.3f} ms ({max(waits) * 1e3:.2f} ms)"),
        (f"data_wait of all {steps} steps' time (wanted: below 1 %)", f"{share:.3%}"),
    ]


def run(call: Call[ReadBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    torch.set_num_threads(1)  # reading is one thread's work
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        rows = measure_reading(Path(folder) / "real", bench.samples, bench.repeats)
        waiting = measure_waiting(Path(folder) / "clips", bench.model, bench.steps)
    name = call.choices["model"]
    rows += [(f"`{name}`: {what}", value) for what, value in waiting]
    rows.append(("load average of the machine (1 and 15 minutes)", "{0:.1f}, {2:.1f}".format(*os.getloadavg())))
    path = Path(bench.output) / "read.md"
    write_record(path, "Reading samples", call.command, rows, NOTES)


NOTES = (
    "Warm page cache, one thread, variants in turn, the best of all repeats. Read means: from the two tars (latents "
    f"and text) into fresh batches of {BATCH} in the model's layout, sound transposed, the condition's constant tail "
    f"restored ({STORED} of 49 frames are stored), so that 16.7 MB are written for 10.8 MB read; the raw read writes "
    "into one MiB that stays in the cache. All readers' tensors are compared for equality first. Where other programs "
    "share the cores, the processor time is the steadier number. The search for NaN is not needed at reading: "
    "`data.index` does it once and keeps the answer as a column. Reader threads (`data.reader_threads`) compute "
    "checksums side by side."
)


PROGRAM = Program("bench read", __doc__, run, schema=Schema("bench_read", ReadBench, (("model", "small"),)))

if __name__ == "__main__":
    PROGRAM.start()
