"""Real training on the nodes of a real SLURM: curves that do not show what happened, and the code that runs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.snapshot import PACKAGES
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Launcher, Run

REPOSITORY = Path(__file__).parents[2]
STEPS = 150
TWO_NODES = ["cluster.nodes=2", f"steps={STEPS}", "checkpoint.every=50"]


@pytest.fixture(scope="module")
def unbroken(slurm_cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on two nodes that nothing disturbs."""
    run = Launcher(slurm_cluster, data, tmp_path_factory.mktemp("unbroken")).submit("unbroken", *TWO_NODES)
    assert run.wait("COMPLETED", "FAILED", seconds=120) == "COMPLETED", run.log()
    return run


def test_two_nodes_train_together(unbroken: Run) -> None:
    assert unbroken.status()["state"] == "finished" and unbroken.step() == STEPS
    assert list(unbroken.losses()) == list(range(STEPS))
    first, second = (unbroken.folder / "logs" / f"{unbroken.job}-{rank}.out" for rank in (0, 1))
    assert first.read_text().startswith(f"== rank 0 of 2 on n1, job {unbroken.job}, restart 0, ")
    assert second.read_text().startswith(f"== rank 1 of 2 on n2, job {unbroken.job}, restart 0, ")
    assert "fsdp" in first.read_text()


def test_a_preempted_run_has_the_curve_of_an_unbroken_one(launcher: Launcher, unbroken: Run) -> None:
    run = launcher.submit("preempted", *TWO_NODES)
    run.wait_for(lambda run: len(run.losses()) > 20, 90, "it trains")
    high = launcher.slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    launcher.slurm.wait_state(high, "COMPLETED", seconds=60)
    assert run.wait("COMPLETED", "FAILED", seconds=120) == "COMPLETED", run.log()
    assert [line["ended"] for line in run.attempts("end")] == ["stopped", "finished"]
    stopped_at = run.attempts("end")[0]["step"]
    assert 20 < stopped_at < STEPS, "it was not preempted in the middle"
    assert f"resumed from {run.folder}/checkpoints/step-{stopped_at:08d}" in run.log()
    assert run.losses() == unbroken.losses()


def test_an_upload_that_never_ends_at_a_time_limit(launcher: Launcher) -> None:
    """SLURM's own clock: the run saves, gives the upload its few seconds, and is requeued before the limit."""
    upload = 'checkpoint.upload=[sh,-c,"sleep 100000; echo {path}"]'
    run = launcher.submit(
        "stuck", "steps=1000000", "cluster.time=2", "cluster.signal_lead=60", "guard.stop_margin=5", upload,
        "checkpoint.upload_seconds=5", "checkpoint.minutes=0", "checkpoint.permanent_every=0",
    )  # fmt: skip
    run.wait_for(lambda run: run.attempts("end"), 120, "it ends within its time limit")
    (begin,), (end,) = run.attempts("begin"), run.attempts("end")
    assert (end["ended"], end["status"]) == ("stopped", 0) and end["time"] - begin["time"] < 120, run.log()
    assert end["step"] > 0 and f"step-{end['step']:08d} wait" in run.log()
    waiting = json.loads((run.folder / "uploads.json").read_text())["waiting"]
    assert waiting == [f"step-{end['step']:08d}"]
    run.wait_for(lambda run: launcher.slurm.job(run.job)["Restarts"] == "1", 30, "it is queued again")
    assert not launcher.slurm.workers("sleep 100000")
    launcher.slurm.run("scancel", run.job)


def test_ranks_survive_a_signal_before_their_handlers(launcher: Launcher) -> None:
    """USR2 to the ranks as soon as they live does not kill them; USR2 to the batch script stops them when they hear."""
    run = launcher.submit("deaf", "steps=5")
    launcher.slurm.wait_for(lambda: launcher.slurm.workers("launch.slurm.task"), 30, "the ranks start")
    launcher.slurm.run("scancel", "--signal=USR2", f"{run.job}.0")
    launcher.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.wait_for(lambda run: run.attempts("end"), 60, "the first attempt ends")
    (first,) = run.attempts("end")
    assert (first["ended"], first["status"]) == ("stopped", 0) and first["step"] < 5, run.log()
    assert run.wait("COMPLETED", "FAILED", seconds=90) == "COMPLETED", run.log()
    assert list(run.losses()) == list(range(5))


def test_a_job_runs_the_code_that_was_there_at_submission(launcher: Launcher) -> None:
    """A checkout with an edit that is not committed; while the job waits, the checkout is broken."""
    checkout = launcher.folder / "checkout"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(checkout), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (checkout / ".gitignore").write_text("*.log\n")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    (checkout / "train" / "extra.py").write_text("WORD = 'from the snapshot'\n")
    (checkout / "train" / "noise.log").write_text("ignored by git")
    loop = checkout / "train" / "loop.py"
    edited = "from train.extra import WORD\n\nprint(WORD)\n"
    loop.write_text(loop.read_text().replace("logger = logging", edited + "logger = logging", 1))

    arguments = launcher.arguments("frozen", "steps=2", "cluster.options=[--hold]")
    done = launcher.start_in(checkout, *arguments)
    assert done.returncode == 0, done.stderr
    run = Run(launcher.slurm, launcher.folder / "runs" / "frozen")
    loop.write_text("raise SystemExit('the checkout runs')\n")
    (checkout / "train" / "extra.py").unlink()
    launcher.slurm.run("scontrol", "release", run.job)
    assert run.wait("COMPLETED", "FAILED", seconds=90) == "COMPLETED", run.log()
    assert "from the snapshot" in run.log() and "the checkout runs" not in run.log()

    code = run.folder / "code"
    assert (code / "train" / "extra.py").exists() and not (code / "train" / "noise.log").exists()
    about = json.loads((run.folder / "code.json").read_text())
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert about["commit"] == head and " M train/loop.py" in about["status"] and "?? train/extra.py" in about["status"]
    assert {"python", "torch"} <= about.keys() and about["versions"]["torch"] == about["torch"]
    assert "+print(WORD)" in (run.folder / "code.diff").read_text()
