"""The launcher: mistakes are found before any process starts; stops reach the workers; failures are one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import launch.__main__ as program
from core.errors import UserError
from data.clip import Bucket
from launch.compose import compose_launch
from tests.shards import make_dataset

REPOSITORY = Path(__file__).parents[2]
DIM = 6
SMALL = [
    "model.video.dim=48", "model.video.num_heads=1", "model.video.num_layers=1", "model.video.ffn_dim=64",
    "model.audio.dim=48", "model.audio.num_heads=1", "model.audio.num_layers=1", "model.audio.ffn_dim=64",
    f"model.video.text_dim={DIM}", f"model.audio.text_dim={DIM}", "model.text_length=4", "data.batch_size=2",
    "monitor.wandb=disabled", "steps=1000000",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `data`, a small dataset, and the runs."""
    root = tmp_path_factory.mktemp("launch")
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(root / "data", [(bucket, 8)], dim=DIM)
    return root


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    return [*SMALL, f"run.root={folder}", f"run.id={run}", f"data.path={folder / 'data'}", *more]


def start(given: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *given], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers that a test has started; none of their processes outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for_steps(run: Path, process: subprocess.Popen[str], steps: int = 2, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"train/loss"') >= steps):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "the run did not begin to train"
        time.sleep(0.1)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize(
    "wrong, told",
    [
        ("optim.lr_towr=1", "did you mean optim.lr_tower"),
        ("cluster.procs=2", "did you mean cluster.processes"),
        ("optim.lr_tower=fast", "optim.lr_tower takes a number"),
        ("model=huge", "mova_720p"),
        ("optim.schedule=step", "is not one of constant"),
        ("parallel.dp_replicate=3", "does not divide the 2 ranks"),
        ("data.path=/nowhere", "/nowhere does not exist"),
        ("run.id=a/b", "'a/b'"),
        ("model.video.text_dim=7", "text_dim"),
        ("cluster=cloud", "slurm"),
        ("cluster.restarts=-1", "cluster.restarts is -1; it must be 0 or more"),
        ("launch.dry_run=true", "cluster=slurm"),
        ("--nproc=2", "key=value"),
        ("optim.lr_tower=nan", "optim.lr_tower is nan; it must be 0 or more"),
        ("objective.shift_video=inf", "objective.shift_video is inf"),
        ("guard.stop_margin=nan", "guard.stop_margin is nan"),
        ("validation.sigmas=[0.1,nan]", "validation.sigmas[1] is nan"),
        ("steps=-5", "steps is -5"),
        ("steps=0", "steps is 0"),
        ("model=null", "model=null: choose one of the configs in conf/model"),
        ("init.source=/nowhere", "init.source=/nowhere does not exist"),
        ("init.source=.", "init.source=.: .: neither config.json nor any folder of a known layout"),
        ("run.start_from=runs/a", "this key was removed; use init.source=FOLDER instead"),
        ("init.source=fresh", "give a folder"),
        ("init.audio=zero", "only the Bridge can start"),
    ],
)
def test_a_mistake_starts_no_process_and_is_one_line(
    folder: Path, wrong: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_start(*_: object) -> None:
        raise AssertionError("processes were started")

    monkeypatch.setattr(program, "run_local", no_start)
    assert program.PROGRAM.run(arguments(folder, "never", "cluster.processes=2", wrong)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert told in said
    assert not (folder / "never").exists()


def test_a_right_config_is_split_between_launcher_and_training(folder: Path) -> None:
    given = arguments(folder, "never", "seed=7")
    launch = compose_launch(["cluster.processes=2", *given])
    assert launch.cluster.world == 2
    assert launch.overrides == given
    assert launch.train.seed == 7 and launch.run_dir.root == folder / "never"
    with pytest.raises(UserError, match="data.path is missing"):
        compose_launch(["run.id=x"])


def test_stop_and_failure(folder: Path, launched: list[subprocess.Popen[str]]) -> None:
    """SIGTERM to the launcher: all workers save, exit 0. While they run, nothing listens beyond the loopback.
    Then the same id with another config: exit 1, and no traceback."""
    run = folder / "stopped"
    process = start(arguments(folder, "stopped", "cluster.processes=2"))
    launched.append(process)
    wait_for_steps(run, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [socket for member in family for socket in member.net_connections() if socket.status == "LISTEN"]
    assert sockets and {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::1"}
    ranks = ranks_of(process)
    assert sorted(ranks) == ["rank 0", "rank 1"]
    assert ranks["rank 0"].ppid() == ranks["rank 1"].ppid() != process.pid, "one process has imported for both"

    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "waiting for the checkpoint" in said and "Traceback" not in said
    assert status(run)["state"] == "stopped"
    assert (run / "checkpoints" / f"step-{status(run)['step']:08d}" / "COMMITTED").is_file()
    assert not any(member.is_running() for member in family)

    refused = start(arguments(folder, "stopped", "cluster.processes=2", "seed=1"))
    launched.append(refused)
    _, said = refused.communicate(timeout=240)
    assert refused.returncode == 1
    assert "seed: 0 -> 1" in said and "Traceback" not in said
    assert said.startswith("error: run 'stopped' exists with another config")


def test_a_killed_worker_ends_the_run_and_nothing_is_left_of_it(
    folder: Path, launched: list[subprocess.Popen[str]]
) -> None:
    """The first rank has an upload under way, in a session of its own: an orphan of whom nobody knows any more."""
    long = f"8{os.getpid()}"
    upload = f"checkpoint.upload=[sh,-c,'trap \"\" TERM HUP; sleep {long} & sleep {long}; echo {{path}}']"
    process = start(arguments(folder, "killed", "cluster.processes=2", "checkpoint.every=5", upload))
    launched.append(process)
    wait_for_steps(folder / "killed", process)

    def sleepers() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", long]]

    deadline = time.monotonic() + 120
    while len(sleepers()) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "it uploads"
        time.sleep(0.1)
    ranks_of(process)["rank 0"].kill()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "rank 0 was killed by SIGKILL" in said.splitlines()[-1]
    assert not [one for one in sleepers() if runs(one)]


def runs(process: psutil.Process) -> bool:
    """An orphan that has ended stays a zombie where the first process of a container collects none."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def seen_of(process: psutil.Process) -> str:
    """Of a process that ought to have ended: what it is, what it waits for, and its signals."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    kept = [line for line in lines if line.startswith(("Name", "State", "PPid", "Sig", "Shd"))]
    waits = [Path(task, "wchan").read_text() for task in Path(f"/proc/{process.pid}/task").iterdir()]
    return "\n".join([str(process.cmdline()), *kept, f"threads wait in {waits}"])


def test_workers_do_not_outlive_a_killed_launcher(folder: Path, launched: list[subprocess.Popen[str]]) -> None:
    run = folder / "orphan"
    process = start(arguments(folder, "orphan", "cluster.processes=1"))
    launched.append(process)
    wait_for_steps(run, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    alive = workers
    deadline = time.monotonic() + 60
    while alive and time.monotonic() < deadline:
        time.sleep(0.2)
        alive = [worker for worker in alive if runs(worker)]
    seen = [seen_of(worker) for worker in alive]
    for worker in alive:
        worker.kill()
    assert not alive, "\n".join([*seen, str(status(run)), (run / "metrics.jsonl").read_text()[-2000:]])
    assert status(run)["state"] == "stopped"


def test_workers_start_again_after_a_death_and_go_on(folder: Path, launched: list[subprocess.Popen[str]]) -> None:
    """A worker is killed after a checkpoint: all start again from there. It is killed a second time: the limit."""
    run = folder / "again"
    process = start(arguments(folder, "again", "cluster.processes=2", "cluster.restarts=1", "checkpoint.every=5"))
    launched.append(process)
    wait_for_steps(run, process, steps=12)
    ranks_of(process)["rank 0"].kill()
    wait_for(lambda: len(events(run, "begin")) == 2, process)
    resumed = events(run, "begin")[1]["step"]
    assert resumed >= 10 and events(run, "end")[0]["ended"] == "crashed"
    wait_for(lambda: status(run)["state"] == "running" and committed(run) > resumed, process)
    ranks_of(process)["rank 1"].kill()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"all workers restart from step {resumed} (restart 1 of at most 1)" in said
    assert "given up: it was restarted 1 times" in said.splitlines()[-1] and len(events(run, "begin")) == 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "each step once"


def test_a_mistake_is_not_tried_again(folder: Path, launched: list[subprocess.Popen[str]]) -> None:
    """Only the workers can see it, and say so by their exit status."""
    process = start(arguments(folder, "mistake", "cluster.restarts=5", "parallel=zero2", "guard.skip_spikes=true"))
    launched.append(process)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1 and "guard.skip_spikes needs parallel=fsdp2" in said
    assert [line["ended"] for line in events(folder / "mistake", "end")] == ["refused"]


def ranks_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The training processes of a launcher, by the name that ps and top show."""
    family = psutil.Process(process.pid).children(recursive=True)
    return {member.name(): member for member in family if member.name().startswith("rank ")}


def events(run: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def committed(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/COMMITTED")), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
