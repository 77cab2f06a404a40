"""Data preparation as a job array, and phases as a chain of runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore

from data.index import DatasetIndex
from data.prepare import PrepareConfig, prepare
from tests.data.conftest import make_media as make_media
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


def test_phases_follow_each_other(launcher: Launcher) -> None:
    """Three runs, each from the weights of the one before, one of them on other nodes and with other settings."""
    chosen = phases(
        one={"train": ["steps=3"]}, two={"train": ["steps=2", "seed=5"], "cluster": ["cluster.nodes=2"]},
        three={"train": ["steps=2"]},
    )  # fmt: skip
    done = launcher.start(*launcher.arguments("all", chosen))
    assert done.returncode == 0, done.stderr
    one, two, three = (
        Run(launcher.slurm, launcher.folder / "runs" / f"all-{name}") for name in ("one", "two", "three")
    )
    state = three.wait("COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert state == "COMPLETED", one.log() + two.log() + three.log()
    assert [run.status()["state"] for run in (one, two, three)] == ["finished"] * 3
    for before, run in ((one, two), (two, three)):
        assert f"weights of {before.folder}/checkpoints/step-0000000{before.step()}" in run.log()
    assert launcher.slurm.job(two.job)["NumNodes"] == "2" and list(two.losses()) == [0, 1]


def test_a_failed_phase_takes_the_next_ones_with_it(launcher: Launcher) -> None:
    chosen = phases(one={"train": ["steps=3"]}, two={"train": ["steps=2"]})
    done = launcher.start(*launcher.arguments("bad", chosen, fake="refuse"))
    assert done.returncode == 0, done.stderr
    two = Run(launcher.slurm, launcher.folder / "runs" / "bad-two")
    assert two.wait("CANCELLED", "COMPLETED", seconds=60) == "CANCELLED"
