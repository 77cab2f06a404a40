"""One cluster for all tests of this folder, and a launcher in front of it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

import launch.__main__ as program
from data.clip import Bucket
from tests.shards import make_dataset
from tests.slurm.cluster import Cluster, cluster, missing

SMALL = [
    "model.video.dim=48", "model.video.num_heads=1", "model.video.num_layers=1", "model.video.ffn_dim=64",
    "model.audio.dim=48", "model.audio.num_heads=1", "model.audio.num_layers=1", "model.audio.ffn_dim=64",
    "model.video.text_dim=6", "model.audio.text_dim=6", "model.text_length=4", "data.batch_size=4",
    "data.shuffle_shards=2", "monitor.wandb=disabled", "objective=phase2", "optim.lr_tower=1e-2",
    "optim.lr_bridge=1e-2",
]  # fmt: skip
FAKE = Path(__file__).with_name("fake.sh")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are marked, so that the default selection leaves them out."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.fail(f"no SLURM can be started here: {reason}")
    root = tmp_path_factory.mktemp("slurm")
    root.parent.chmod(0o755)
    with cluster(root) as running:
        yield running


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset."""
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    return make_dataset(tmp_path_factory.mktemp("shards") / "data", [(bucket, 8), (bucket, 6)], dim=6)


class Launcher:
    """`mova launch cluster=slurm` as a user types it, from a folder of its own."""

    def __init__(self, slurm: Cluster, data: Path, folder: Path) -> None:
        self.slurm, self.data, self.folder = slurm, data, folder

    def arguments(self, run_id: str, *more: str, fake: str | None = None) -> list[str]:
        given = [
            *SMALL, "cluster=slurm", "cluster.signal_lead=10", "cluster.preflight.enabled=false", "cluster.memory=100",
            f"run.root={self.folder}/runs", f"run.id={run_id}", f"data.path={self.data}",
            "+cluster.environment.GLOO_SOCKET_IFNAME=lo", "+cluster.environment.OMP_NUM_THREADS=1",
        ]  # fmt: skip
        if fake is not None:
            given += [f"cluster.container=[{FAKE}]", f"+cluster.environment.FAKE={fake}"]
        return given + list(more)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """In this process, which has imported torch already: a second instead of eight."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment(), clear=True), contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        ):  # fmt: skip
            status = program.PROGRAM.run(list(arguments))
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    def start_in(self, source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """By the command, with the code of a folder."""
        return subprocess.run(
            [sys.executable, "-m", "launch", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120,
            env={**self.environment(), "PYTHONPATH": str(source)},
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """A user's variables on the login node."""
        mine = {name: value for name, value in self.slurm.environment.items() if name != "OMP_NUM_THREADS"}
        return {**mine, "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def submit(self, run_id: str, *more: str, fake: str | None = None) -> "Run":
        """A submission that must succeed."""
        done = self.start(*self.arguments(run_id, *more, fake=fake))
        assert done.returncode == 0, done.stderr
        return Run(self.slurm, self.folder / "runs" / run_id)


class Run:
    """A run that was submitted."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.jobs = [job for line in self.attempts() if line["event"] == "queued" for job in line["jobs"]]
        self.job = self.jobs[-1]

    def attempts(self, event: str | None = None) -> list[dict]:
        lines = [json.loads(line) for line in (self.folder / "attempts.jsonl").read_text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    def status(self) -> dict:
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def step(self) -> int:
        markers = self.folder.glob("checkpoints/step-*/COMMITTED")
        return max((int(marker.parent.name[5:]) for marker in markers), default=0)

    def losses(self) -> dict[int, float]:
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert len(steps) == len(set(steps)), "a step stands twice in metrics.jsonl"
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    def log(self) -> str:
        """All that the run's processes printed."""
        return "\n".join(f"-- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("logs/*.out")))

    def wait(self, *states: str, seconds: float = 60, job: str | None = None) -> str:
        try:
            return self.slurm.wait_state(job or self.job, *states, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def wait_for(self, condition: Callable[["Run"], object], seconds: float, what: str) -> None:
        try:
            self.slurm.wait_for(lambda: condition(self), seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None


@pytest.fixture
def launcher(slurm_cluster: Cluster, data: Path, tmp_path: Path) -> Iterator[Launcher]:
    yield Launcher(slurm_cluster, data, tmp_path)
    slurm_cluster.clear()
