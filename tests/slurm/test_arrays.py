"""Data preparation as a job array, and phases as a chain of runs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore

from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.prepare.curation import PrepareConfig, prepare
from tests.data.conftest import make_media as make_media
from tests.shards import make_dataset
from tests.slurm.conftest import Launcher, Run

SETTINGS = ["frames=17", "height=32", "width=48", "samples_per_shard=3", "text_dim=64", "workers=1"]


@pytest.fixture
def source(make_media: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(6):
        sound = 0.3 * np.sin(np.arange(24000) / (3 + number)) + np.random.default_rng(number).normal(0, 0.02, 24000)
        make_media(folder / f"{number}.mp4", times=[i / 24 for i in range(36)], sound=sound, rate=16000)
    return folder


def test_an_array_prepares_what_one_process_prepares(launcher: Launcher, source: Path, tmp_path: Path) -> None:
    """Three tasks, of which one is killed at its first start: SLURM's requeue and a second submission complete it."""
    whole, output = tmp_path / "whole", launcher.folder / "out"
    prepare(
        PrepareConfig(
            source=str(source), output=str(whole), frames=17, height=32, width=48, samples_per_shard=3, text_dim=64,
            workers=1, units=3,
        )
    )  # fmt: skip
    once = tmp_path / "once"
    given = [
        "cluster=slurm", "job=prepare", "launch.units=3", "cluster.memory=100", f"source={source}", f"output={output}",
        *SETTINGS,
    ]  # fmt: skip
    crash = f'[ "$SLURM_ARRAY_TASK_ID" != 1 ] || [ -e {once} ] || {{ touch {once}; exit 1; }}'
    done = launcher.start(*given, f"cluster.setup=['{crash}']")
    assert done.returncode == 0, done.stderr
    launcher.slurm.wait_for(lambda: not launcher.slurm.run("squeue", "-h"), 120, "the array ends")
    assert not output.exists() and sorted(path.name for path in (launcher.folder / "out.partial/units").glob("*.json"))
    again = launcher.start(*given)
    assert again.returncode == 0, again.stderr
    launcher.slurm.wait_for(output.exists, 120, "the dataset is put together")
    assert DatasetIndex.open(output).fingerprint == DatasetIndex.open(whole).fingerprint
    logs = "\n".join(path.read_text() for path in launcher.folder.glob("out.jobs/logs/*.out"))
    assert logs.count("is done already") == 2 and "== unit 1 of 3" in logs


def phases(**given: dict[str, list[str]]) -> str:
    """The argument that chooses these phases, as if they stood in a file of conf/phases/."""
    ConfigStore.instance().store(group="phases", name="of_a_test", node=given)
    return "phases=of_a_test"


def test_the_phases_of_mova_follow_each_other(launcher: Launcher) -> None:
    """`phases=mova` as it stands, at a tiny size: three runs, each from the weights of the one before, the second on
    other nodes, the third at another resolution."""
    for phase, side in (("phase1", 2), ("phase2", 2), ("phase3", 4)):
        bucket = Bucket(frames=2, height=side, width=side, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
        for seed, name in enumerate(("speech/train", "other/train", "speech/valid")):
            make_dataset(launcher.folder / "shards" / phase / name, [(bucket, 4)], seed=seed, dim=6, mixes=True)
    tiny = [
        "model=tiny", "parallel=fsdp2", "parallel.ring=1", "parallel.ulysses=1", "parallel.compute_dtype=float32",
        "parallel.recompute=none", "steps=2", "validation.every=1", "validation.samples=1",
    ]  # fmt: skip
    given = launcher.arguments("all", "phases=mova", "phases.phase2.cluster=['cluster.nodes=2']", *tiny)
    done = launcher.start(*[argument for argument in given if not argument.startswith(("data.path=", "objective="))])
    assert done.returncode == 0, done.stderr
    one, two, three = (
        Run(launcher.slurm, launcher.folder / "runs" / f"all-{name}") for name in ("phase1", "phase2", "phase3")
    )
    state = three.wait("COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert state == "COMPLETED", one.log() + two.log() + three.log()
    assert [run.status()["state"] for run in (one, two, three)] == ["finished"] * 3
    for before, run in ((one, two), (two, three)):
        assert f"tensors of {before.folder}/checkpoints/step-00000002 (checkpoint" in run.log()
    assert launcher.slurm.job(two.job)["NumNodes"] == "2" and list(two.losses()) == [0, 1]
    grids = [json.loads((run.folder / "layout.json").read_text())["a step of a group"] for run in (one, two, three)]
    assert "2 x 2 x 2 latents" in grids[0] and "2 x 4 x 4 latents" in grids[2]


def test_a_failed_phase_takes_the_next_ones_with_it(launcher: Launcher) -> None:
    chosen = phases(one={"train": ["steps=3"]}, two={"train": ["steps=2"]})
    done = launcher.start(*launcher.arguments("bad", chosen, fake="refuse"))
    assert done.returncode == 0, done.stderr
    two = Run(launcher.slurm, launcher.folder / "runs" / "bad-two")
    assert two.wait("CANCELLED", "COMPLETED", seconds=60) == "CANCELLED"
