"""A run and a dataset that an older version of this project made open and go on in this one, with the same losses.

`stored/run-and-dataset.tar.xz` holds `shards/` and `runs/old/` as commit fe71bb1 left them, made once with

    python -m data.synthesize output=clips clips=8 frames=17 height=32 width=32 kinds=[tick]
    python -m data.prepare source=clips output=shards "buckets=[{frames: 17, height: 32, width: 32}]" text_dim=8 \\
        samples_per_shard=4
    python -m launch cluster.processes=2 run.id=old steps=4 run.root=runs data.path=shards data.valid_path=shards ...

and `stored/unbroken-metrics.jsonl` what the same command wrote there with steps=8. `SETTING` below is its "...", in the
names that the keys have today; the stored config has the names that they had then.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data.dataset.index import DatasetIndex

STORED = Path(__file__).parent / "stored"
REPOSITORY = Path(__file__).parents[2]
SETTING = [
    "model.video.dim=12", "model.video.num_heads=1", "model.video.num_layers=1", "model.video.ffn_dim=8",
    "model.video.freq_dim=16", "model.video.text_dim=8", "model.audio.dim=12", "model.audio.num_heads=1",
    "model.audio.num_layers=1", "model.audio.ffn_dim=8", "model.audio.freq_dim=16", "model.audio.text_dim=8",
    "model.text_length=4", "model.bridge.head_dim=12", "objective=phase2", "objective.clean_video_prob=0.25",
    "objective.paired_prob=0.5", "optim.warmup=2", "optim.decay_steps=4", "optim.lr_tower=1e-2", "optim.lr_bridge=1e-2",
    "data.batch_size=4", "data.shuffle_shards=2", "data.reader_threads=2", "parallel.compute_dtype=float32",
    "monitor.wandb=disabled", "validation.every=4", "validation.samples=2", "checkpoint.permanent_every=100",
    "guard.max_nonfinite=3", "ema.decay=0.9",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(STORED / "run-and-dataset.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def losses(metrics: Path) -> dict[tuple[int, str], float]:
    """{(step, name): value} of all losses and norms of training and validation."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("train/", "valid/")) and isinstance(value, float)
    }


def test_a_run_of_an_older_version_goes_on_with_the_same_losses(folder: Path) -> None:
    command = [sys.executable, "-m", "launch", "cluster.processes=2", "run.id=old", "run.root=runs", "steps=8"]
    done = subprocess.run(
        [*command, "data.path=shards", "data.valid_path=shards", *SETTING],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before = losses(STORED / "unbroken-metrics.jsonl")
    after = losses(folder / "runs" / "old" / "metrics.jsonl")
    assert sorted({step for step, _ in before}) == sorted({step for step, _ in after})
    assert before.keys() <= after.keys(), "a loss that was recorded then is not recorded now"
    for key, value in before.items():
        assert after[key] == pytest.approx(value, rel=2e-5, abs=1e-9), key


def test_a_dataset_of_an_older_version_opens_unchanged(folder: Path) -> None:
    index = DatasetIndex.open(folder / "shards")
    assert index.verify() == [] and len(index) == 8
    assert index.fingerprint == "3689dcd77ffb91fd508abe614e5bd5c3b14020d6eb73a94638de97af3cf15e54"
