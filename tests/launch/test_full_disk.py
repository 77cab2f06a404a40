"""Runs whose disk really fills up, or whose folder is away: they wait, go on, and end as if nothing had happened."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from core.errors import NO_ROOM
from core.run_dir import RunDir
from launch import room
from launch.attempts import REFUSED, Attempts, Limits, how_it_ended
from launch.local.local import LocalConfig
from launch.slurm import job
from tests.disks import disk
from tests.launch.test_launch import runs
from tests.train import chaos
from train.checkpoint.checkpoint import committed, damage

STEPS = 120
NARROW = ("dim=48", "num_heads=1", "num_layers=1", "ffn_dim=64")  # a `tiny` whose checkpoints fit on a small disk
RUN = [
    *(f"model.{part}.{key}" for part in ("video", "audio") for key in NARROW),
    f"steps={STEPS}", "checkpoint.every=5", "checkpoint.minutes=0", "checkpoint.max_failures=1",
    "checkpoint.permanent_every=0", "validation.every=50",
]  # fmt: skip


def start(root: Path, data: Path, said: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "launch", *chaos.SETTING, *RUN, "monitor.wandb=offline", f"run.root={root}", "run.id=one",
        f"data.path={data}", f"data.valid_path={data}", "cluster.disk_pause_minutes=[0.01,0.02]",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(chaos.REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(said, "ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[bytes], what: str) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert launcher.poll() is None, f"the launcher ended with {launcher.returncode}, and not: {what}"
        assert time.monotonic() < end, what
        time.sleep(0.02)


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [one for one in psutil.Process(launcher.pid).children() if runs(one)]


def test_a_run_waits_for_room_and_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Metrics, checkpoints, status, attempts, W&B and the launcher's own log lie on the disk that becomes full. Then
    the folder of the runs is away for a while. Neither is a restart of those that are limited: there are none."""
    data = chaos.dataset(tmp_path)
    assert chaos.start(tmp_path, "one", 1, *RUN, forked=False).statuses == [0]
    with disk("40m") as small:
        run = RunDir(small.path / "one")
        launcher = start(small.path, data, small.path / "launch.out")
        try:
            for hinder, help_again in (
                (small.fill, small.free),
                (lambda: small.run("mount", "-t", "tmpfs", "none", "/mnt"), lambda: small.run("umount", "/mnt")),
            ):
                before = run.committed_step() + 10
                wait_for(lambda before=before: run.committed_step() >= before, launcher, "it trains")
                hinder()
                wait_for(lambda: not workers(launcher), launcher, "its workers end")
                time.sleep(3)  # several pauses
                assert launcher.poll() is None and not workers(launcher), "it tries again, without room"
                help_again()
            assert launcher.wait(240) == 0, (small.path / "launch.out").read_text()
        finally:
            launcher.kill()
        ends = [line["ended"] for line in Attempts(run).read() if line["event"] == "end"]
        assert ends == [NO_ROOM, NO_ROOM, "finished"] and run.read_status()["state"] == "finished"
        assert chaos.curve(small.path, "one") == chaos.curve(tmp_path, "one")
        assert committed(run.checkpoints) and all(damage(path) is None for path in committed(run.checkpoints))
        assert not list(run.root.glob("**/.*.partial"))
        assert "cannot write: " in (small.path / "launch.out").read_text()
        expected, found = (chaos.final_tensors(root, "one", STEPS) for root in (tmp_path, small.path))
        assert all(bool((expected[key] == found[key]).all()) for key in expected)


def begun(root: Path) -> RunDir:
    run = RunDir(root / "one")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("steps: 100\n")
    return run


def test_what_stands_in_the_way_is_named() -> None:
    """Full, read-only, away; and room for a status but not for a checkpoint."""
    with disk("8m") as small:
        run = begun(small.path)
        assert room.obstacle(run) is None and room.obstacle_to_saving(run) is None
        small.fill()
        assert "No space left on device" in (room.obstacle(run) or "")
        assert how_it_ended(run, 1) == how_it_ended(run, 75) == NO_ROOM
        run.write_status("failed", error="the status is lost, and nothing else")
        small.free()
        assert run.read_status() == {} and how_it_ended(run, 1) == REFUSED
        marker = run.checkpoints / "step-00000005" / "COMMITTED"
        marker.parent.mkdir()
        marker.write_text('{"files": {"x": {"bytes": 9000000, "crc32": 0}}}')
        assert room.obstacle(run) is None and "a checkpoint needs 0.009 GB" in (room.obstacle_to_saving(run) or "")
        for options in (["--bind", "/mnt", "/mnt"], ["-o", "remount,bind,ro", "/mnt"]):
            small.run("mount", *options)
        assert "Read-only" in (room.obstacle(run) or "")
        small.run("umount", "/mnt")
        run.root.rename(small.path / "elsewhere")
        assert "is gone" in (room.obstacle(run) or "")
        run.write_status("failed")
        Attempts(run).end("1", 0, NO_ROOM, 75)
        assert not run.root.exists(), "a folder that is away is not made anew"


def test_attempts_without_room_count_toward_no_limit_and_their_record_is_written_later() -> None:
    with disk("2m") as small:
        run = begun(small.path)
        attempts, limits = Attempts(run), Limits(restarts=1, max_failed_restarts=1)
        attempts.submitted()
        for number in range(5):
            attempts.begin("1", number)
            with open(attempts.path, "a") as file:  # up to the end of a block: the next line needs another one
                file.write(" " * (4095 - file.tell() % 4096) + "\n")
            small.fill()
            attempts.end("1", number, NO_ROOM, 75)
            assert [line["event"] for line in attempts.read()][-2:] == ["begin", "end"]
            assert Attempts(run).read()[-1]["event"] == "begin"
            small.free()
            assert attempts.objection(limits) is None and attempts.restarts() == number
        attempts.begin("1", 5)
        assert [line["event"] for line in Attempts(run).read()] == ["submitted", *["begin", "end"] * 5, "begin"]
        assert "gained no step" in (attempts.objection(limits) or "")


def test_pauses_grow_from_one_minute_to_thirty_and_end_after_a_day() -> None:
    patience, now, pauses = room.Patience(LocalConfig()), 1000.0, []
    while (pause := patience.pause(5, now)) is not None:
        pauses.append(pause / 60)
        now += pause
    assert pauses[:7] == [1, 1, 2, 4, 8, 16, 30] and set(pauses[7:]) == {30.0}
    assert 24 * 3600 <= now - 1000 < 24.5 * 3600
    assert patience.pause(6, now) == 60, "a run that gained a step begins to wait anew"
    assert room.Patience(LocalConfig(disk_wait_hours=0)).pause(5, 0.0) is None
    for wrong in ({"disk_pause_minutes": [2.0, 1.0]}, {"disk_pause_minutes": [1.0]}):
        with pytest.raises(ValueError, match="cluster.disk_"):
            LocalConfig(**wrong)


def test_a_job_without_room_is_not_begun(tmp_path: Path) -> None:
    with disk("2m") as small:
        run = begun(small.path)
        small.fill()
        assert job.begin(run, "7", 0, "n1", Limits(3, 3), lock_wait=0.1) == job.NO_ROOM_YET
        small.free()
        assert job.begin(run, "7", 0, "n1", Limits(3, 3), lock_wait=0.1) == 0
        run.write_status("failed", error="disk full", exit_status=75, cause=NO_ROOM)
        assert job.end(run, "7", 0, 75, "RUNNING") == job.NO_ROOM_YET
        assert job.end(run, "7", 0, 75, "COMPLETING") == 1, "it was cancelled"
