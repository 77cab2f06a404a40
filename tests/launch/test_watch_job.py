"""The job that makes clips beside a run: what its script asks for, what it runs, what a signal does to it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from core.errors import RunError, UserError
from core.run_dir import RunDir
from launch.__main__ import PROGRAM
from launch.compose import compose_own
from launch.slurm.slurm import SlurmConfig
from launch.slurm.watch import WatchJobConfig, check, render
from tests.launch.test_script import NASTY, config


def script(tmp_path: Path, job: WatchJobConfig, cluster: SlurmConfig) -> str:
    root = tmp_path / "it's a run=1"
    return render(job, cluster, RunDir(root), root / "code")


def test_it_asks_for_one_node_and_no_more_than_it_needs(tmp_path: Path) -> None:
    text = script(tmp_path, WatchJobConfig(True, gpus=2, memory="64G", keys=["every=5000"]), config())
    for line in ("--nodes=1", "--ntasks=1", "--gres=gpu:h100:2", "--mem=64G", "--time=1-00:00:00", "--account=research",
                 "--requeue"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    assert "900G" not in text and "--nproc-per-node=2 -m tools.watch" in text and "parallel.ulysses=2" in text
    alone = script(tmp_path, WatchJobConfig(True, time="60"), config(gpus=0, gpu_type=None))
    assert "gres" not in alone and "#SBATCH --time=60\n" in alone and "torch.distributed.run" not in alone


@pytest.fixture
def stage(tmp_path: Path):
    """Runs the script here, with a stand-in for Python; `calls` is what it was given."""
    (tmp_path / "python").write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" "$NASTY" >"$SEEN/calls"\n[ -z "$LONG" ] && exit 7\n'
        'trap "echo asked >$SEEN/asked; exit 0" TERM\ntouch "$SEEN/ready"\nwhile :; do sleep 0.05; done\n'
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >"$SEEN/requeued"\n')
    for name in ("python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    cluster = config(environment={"NASTY": NASTY}, setup=[], container=[], python=str(tmp_path / "python"))
    text = script(tmp_path, WatchJobConfig(True, keys=[f"prompts=[{NASTY}]"]), cluster)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path), "SLURM_JOB_ID": "12",
                   "SLURM_JOB_NODELIST": "n1"}  # fmt: skip

    def start(**more: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", "-c", text], env=environment | more, stderr=subprocess.DEVNULL)

    return tmp_path, start


def test_values_arrive_as_they_are_and_so_does_its_exit_status(stage) -> None:
    folder, start = stage
    assert start().wait(20) == 7
    words = (folder / "calls").read_text().split("\0")[:-1]
    assert words == ["-m", "tools.watch", f"{folder}/it's a run=1", f"prompts=[{NASTY}]", NASTY]


@pytest.mark.parametrize("number, again", [(signal.SIGUSR2, True), (signal.SIGTERM, False)])
def test_before_the_time_limit_the_clip_is_made_and_the_job_comes_back(stage, number: int, again: bool) -> None:
    folder, start = stage
    process = start(LONG="1")
    while not (folder / "ready").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert (folder / "asked").exists() and (folder / "requeued").exists() == again


def test_a_mistyped_key_is_found_before_anything_is_submitted() -> None:
    with pytest.raises(RunError, match="watch.keys: .*evry"):
        check(WatchJobConfig(True, keys=["evry=5"]))
    with pytest.raises(UserError, match="not a key=value"):
        compose_own(["watch.keys=[5000]"])
    assert compose_own(["cluster=slurm", "watch.enabled=true", 'watch.keys=["every=5"]']).watch.keys == ["every=5"]


def test_here_it_is_a_command_of_its_own(tmp_path: Path, capsys, monkeypatch) -> None:
    from launch import compose

    monkeypatch.setattr(compose, "_check_data", lambda config: None)
    arguments = ["watch.enabled=true", f"run.root={tmp_path}", "run.id=x", "data.path=nowhere"]
    assert PROGRAM.run(arguments) == 1 and f"mova watch {tmp_path}/x" in capsys.readouterr().err
