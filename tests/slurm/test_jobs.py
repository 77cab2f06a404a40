"""What the scheduler does to a run, on a real SLURM; a shell script plays the trainer (fake.sh)."""

import time
from pathlib import Path
from unittest import mock

from tests.slurm.conftest import Launcher, Run


def begun(run: Run) -> list[list[str]]:
    """One entry a start of the trainer: (time, job, restart, step found)."""
    path = run.folder / "begun"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def ends(run: Run) -> list[str]:
    return [line["ended"] for line in run.attempts("end")]


def test_what_each_task_gets(launcher: Launcher) -> None:
    """Two nodes with two (fake) GPUs each: every task sees all GPUs of its node, and the CPUs that were asked for."""
    run = launcher.submit(
        "tasks", "cluster.nodes=2", "cluster.gpus=2", "cluster.cpus=2", "steps=1",
        "~cluster.environment.OMP_NUM_THREADS", fake="train",
    )  # fmt: skip
    assert run.wait("COMPLETED", "FAILED") == "COMPLETED", run.log()
    lines = sorted(path.read_text().splitlines()[0] for path in run.folder.glob(f"logs/{run.job}-*.out"))
    assert lines == [
        f"rank {rank} on {node}, gpus 0,1, restart 0, omp 2" for rank, node in enumerate(("n1", "n1", "n2", "n2"))
    ]
    assert run.status()["state"] == "finished"


def test_time_limit_saves_and_goes_on(launcher: Launcher) -> None:
    """The signal before the limit (sent by hand): the run stops, the job requeues itself, nothing is done twice."""
    run = launcher.submit("limit", "steps=60", fake="train")
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    launcher.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.wait_for(lambda run: len(begun(run)) == 2, 30, "it goes on")
    assert run.wait("COMPLETED", "FAILED", seconds=40) == "COMPLETED", run.log()
    assert ends(run) == ["stopped", "finished"]
    first, second = begun(run)
    assert (first[2], second[2]) == ("0", "1") and int(second[3]) >= 3
    assert f"job {run.job}, restart 1" in run.log(), "the log of the first attempt is kept, the second one is added"
    assert f"job {run.job}, restart 0" in run.log()


def test_a_true_time_limit(launcher: Launcher) -> None:
    """SLURM's own clock: a limit of a minute, and the signal some time before."""
    run = launcher.submit("clock", "steps=100000", "cluster.time=1", "cluster.signal_lead=50", fake="train")
    run.wait_for(lambda run: ends(run) == ["stopped"], 90, "it was stopped")
    run.wait_for(lambda run: launcher.slurm.job(run.job)["Restarts"] == "1", 30, "it is queued again")
    launcher.slurm.run("scancel", run.job)


def test_preemption_by_a_higher_job(launcher: Launcher) -> None:
    run = launcher.submit("preempted", "cluster.nodes=2", "steps=40", fake="train")
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    high = launcher.slurm.run(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    started = time.monotonic()
    launcher.slurm.wait_state(high, "RUNNING", "COMPLETED", seconds=40)
    assert time.monotonic() - started < 19, "it made room at once, before the grace time of 20 s was over"
    assert ends(run) == ["stopped"]
    launcher.slurm.wait_state(high, "COMPLETED")
    assert run.wait("COMPLETED", "FAILED", seconds=60) == "COMPLETED", run.log()
    assert ends(run) == ["stopped", "finished"]


def test_a_lost_node(launcher: Launcher) -> None:
    """The daemon of a node dies: SLURM requeues the job, which goes on elsewhere from its last checkpoint."""
    run = launcher.submit("lost", "cluster.nodes=2", "steps=100000", fake="train")
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    launcher.slurm.kill_node("n2")
    try:
        run.wait_for(lambda run: len(begun(run)) == 2, 100, "it trains elsewhere")
        assert "n2" not in launcher.slurm.run("scontrol", "show", "hostnames", launcher.slurm.job(run.job)["NodeList"])
        assert int(begun(run)[1][3]) >= 3
        beginnings = run.attempts("begin")
        assert len(beginnings) == 2 and beginnings[1]["step"] >= 3
    finally:
        launcher.slurm.run("scancel", run.job)
        launcher.slurm.revive_node("n2")


def test_a_crash_loop_ends(launcher: Launcher) -> None:
    run = launcher.submit("loop", "steps=9", "cluster.max_failed_restarts=2", fake="crash")
    assert run.wait("FAILED", seconds=60) == "FAILED"
    assert len(begun(run)) == 2
    assert "2 attempts in a row gained no step" in run.status()["error"] and run.status()["state"] == "failed"


def test_restarts_have_a_limit(launcher: Launcher) -> None:
    """Each attempt gains three steps and crashes: no crash loop, but the limit holds."""
    run = launcher.submit("often", "steps=1000", "cluster.max_restarts=1", fake="crash-later")
    assert run.wait("FAILED", seconds=60) == "FAILED"
    assert [entry[3] for entry in begun(run)] == ["0", "3"]
    assert "restarted 1 times" in run.status()["error"]


def test_what_a_restart_does_not_cure_is_not_restarted(launcher: Launcher) -> None:
    run = launcher.submit("refused", "steps=9", fake="refuse")
    assert run.wait("FAILED", "PENDING", seconds=30) in ("FAILED", "PENDING")
    assert run.wait("FAILED", seconds=30) == "FAILED"
    assert ends(run) == ["refused"] and launcher.slurm.job(run.job)["Restarts"] == "0"


def test_scancel_leaves_nothing(launcher: Launcher) -> None:
    run = launcher.submit("cancelled", "cluster.nodes=2", "steps=100000", fake="train")
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    word = str(run.folder)
    assert launcher.slurm.workers(word)
    launcher.slurm.run("scancel", run.job)
    assert run.wait("CANCELLED", seconds=20) == "CANCELLED"
    launcher.slurm.wait_for(lambda: not launcher.slurm.workers(word), 20, "its processes are gone")
    time.sleep(8)  # longer than the hold-off of a requeued job
    assert run.wait("CANCELLED", seconds=1) == "CANCELLED"
    assert launcher.slurm.job(run.job)["Restarts"] == "0" and len(begun(run)) == 1


def test_the_stop_file_ends_it_for_good(launcher: Launcher) -> None:
    run = launcher.submit("asked", "steps=100000", fake="train")
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    (run.folder / "stop").touch()
    assert run.wait("COMPLETED", "FAILED", "PENDING") == "COMPLETED"
    assert ends(run) == ["stopped"] and launcher.slurm.job(run.job)["Restarts"] == "0"
    step = run.step()
    again = launcher.submit("asked", f"steps={step + 3}", fake="train")
    assert again.wait("COMPLETED", "FAILED") == "COMPLETED"
    assert again.step() == step + 3 and ends(again)[-1] == "finished"


def test_a_chain_where_requeueing_is_forbidden(launcher: Launcher) -> None:
    """Three jobs: the first is stopped by its time limit, the second finishes, the third has nothing to do."""
    run = launcher.submit("chain", "steps=20", "cluster.requeue=false", "cluster.chain=3", fake="train")
    assert len(run.jobs) == 3
    first, second, third = run.jobs
    run.wait_for(lambda run: run.step() >= 3, 30, "it trains")
    launcher.slurm.run("scancel", "--batch", "--signal=USR2", first)
    assert run.wait("COMPLETED", seconds=60, job=third) == "COMPLETED"
    assert run.step() == 20 and [entry[1] for entry in begun(run)] == [first, second]
    assert "nothing to do" in (run.folder / "logs" / f"{third}.out").read_text()
    assert launcher.slurm.job(first)["Restarts"] == "0"


def test_an_early_signal_is_not_lost(launcher: Launcher) -> None:
    """It comes before there is any trainer: the attempt ends at once, and the next one trains."""
    gate = launcher.folder / "gate"
    run = launcher.submit("early", "steps=3", f"cluster.setup=['touch {gate}; sleep 2']", fake="train")
    launcher.slurm.wait_for(gate.exists, 30, "the job has begun")
    launcher.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.wait_for(lambda run: ends(run) == ["stopped"], 30, "it stops")
    assert begun(run) == []
    assert run.wait("COMPLETED", "FAILED", seconds=40) == "COMPLETED", run.log()
    assert ends(run) == ["stopped", "finished"] and not (run.folder / "stop").exists()


def test_the_stop_file_of_a_signal_is_stale_for_the_next_attempt_only(launcher: Launcher) -> None:
    run = launcher.submit("deaf", "steps=30", fake="train")
    run.wait_for(lambda run: begun(run), 30, "it begins")
    launcher.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.wait_for(lambda run: ends(run) == ["stopped"], 30, "it stops")
    assert (run.folder / "stop").read_text().split() == ["signal", run.job, "0"]
    run.wait_for(lambda run: len(begun(run)) == 2, 30, "it goes on")
    assert run.wait("COMPLETED", "FAILED", seconds=40) == "COMPLETED", run.log()


def test_one_job_of_a_run_at_a_time(launcher: Launcher) -> None:
    run = launcher.submit("once", "steps=100000", fake="train")
    done = launcher.start(*launcher.arguments("once", "steps=100000", fake="train"))
    assert done.returncode == 1 and f"has job {run.job} in the queue" in done.stderr
    launcher.slurm.run("scancel", run.job)


def test_another_config_is_refused_before_anything_is_submitted(launcher: Launcher) -> None:
    run = launcher.submit("same", "steps=2", fake="train")
    assert run.wait("COMPLETED") == "COMPLETED"
    refused = launcher.start(*launcher.arguments("same", "steps=2", "seed=1", fake="train"))
    assert refused.returncode == 1 and "seed: 0 -> 1" in refused.stderr
    assert len(run.attempts("queued")) == 1
    longer = launcher.submit("same", "steps=4", fake="train")  # a key that may change
    assert longer.wait("COMPLETED") == "COMPLETED" and longer.step() == 4


def test_asking_without_submitting(launcher: Launcher) -> None:
    asked = launcher.start(*launcher.arguments("never", "cluster.nodes=2", "launch.test_only=true"))
    assert asked.returncode == 0 and "to start at" in asked.stdout and "n[1-2]" in asked.stdout
    refused = launcher.start(*launcher.arguments("never", "cluster.nodes=99", "launch.test_only=true"))
    assert refused.returncode == 1 and "sbatch refused the job" in refused.stderr
    assert not (launcher.folder / "runs").exists() and launcher.slurm.run("squeue", "-h") == ""


def test_nasty_values_arrive_as_they_are(launcher: Launcher, tmp_path: Path) -> None:
    """Names with spaces, quotes, dollars and percents: in folders, variables, overrides and options."""
    nasty = tmp_path / 'it\'s a "run" $HOME `id` 100%j'
    nasty.mkdir()
    value = """a 'b' "c" $HOME `id` \\n %j @RUN@"""
    comment = 'it\'s "x" $HOME `id`'
    done = launcher.start(
        *launcher.arguments(
            "nasty", f"run.root={nasty}", "steps=2",
            f"+cluster.environment.NASTY={value}",
            f"cluster.options=[{hydra_quote('--comment=' + comment)}]",
            f"cluster.setup=[{hydra_quote('printenv NASTY > ' + str(tmp_path / 'seen'))}]",
            fake="crash",
        )
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Run(launcher.slurm, nasty / "nasty")
    run.wait_for(lambda run: run.attempts("end"), 30, "it ran")
    assert (tmp_path / "seen").read_text() == value + "\n"
    assert (nasty / "nasty" / "logs" / f"{run.job}.out").exists()
    assert (nasty / "nasty" / "logs" / f"{run.job}-0.out").exists()
    assert comment in launcher.slurm.run("squeue", "-h", "-a", "-j", run.job, "-o", "%k")
    launcher.slurm.run("scancel", run.job)


def test_the_config_wins_over_the_environment(launcher: Launcher) -> None:
    """What a login shell or a dead job left: another limit and partition, no requeue, another job's variables."""
    poison = {
        "SBATCH_TIMELIMIT": "5", "SBATCH_PARTITION": "high", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXCLUSIVE": "user",
        "SBATCH_ARRAY_INX": "0-3", "SRUN_NTASKS": "1", "SLURM_RESTART_COUNT": "7", "SLURM_NTASKS": "1",
        "PMIX_RANK": "3", "SLURM_JOB_ID": "999", "CUDA_VISIBLE_DEVICES": "", "MOVA_DEADLINE": "1",
        "MOVA_STARTED": "9999999999", "MOVA_CODE": "/nowhere", "RANK": "5", "WORLD_SIZE": "64",
        "MASTER_ADDR": "203.0.113.1",
    }  # fmt: skip
    with mock.patch.dict(launcher.slurm.environment, poison):
        run = launcher.submit(
            "poisoned", "cluster.time=30", "cluster.partition=main", "cluster.gpus=2",
            f"cluster.setup=[{hydra_quote('printenv > ' + str(launcher.folder / 'seen'))}]", "steps=3", fake="train",
        )  # fmt: skip
        job = launcher.slurm.job(run.job)
        assert (job["TimeLimit"], job["Partition"], job["Requeue"]) == ("00:30:00", "main", "1")
    assert run.wait("COMPLETED", "FAILED") == "COMPLETED", run.log()
    seen = dict(line.split("=", 1) for line in (launcher.folder / "seen").read_text().splitlines() if "=" in line)
    assert seen["SLURM_RESTART_COUNT"] == "0" and seen["SLURM_JOB_ID"] == run.job
    left = {"SBATCH_TIMELIMIT", "SRUN_NTASKS", "PMIX_RANK", "MOVA_DEADLINE", "RANK", "WORLD_SIZE"} & seen.keys()
    assert not left
    first = (run.folder / "logs" / f"{run.job}-0.out").read_text()
    node = launcher.slurm.job(run.job)["NodeList"]  # of a job that waits there is none
    assert first.startswith(f"rank 0 on {node}, gpus 0,1, restart 0")


def test_a_default_of_the_shell_holds_where_the_config_says_nothing(launcher: Launcher) -> None:
    with mock.patch.dict(launcher.slurm.environment, {"SBATCH_PARTITION": "high"}):
        done = launcher.start(*launcher.arguments("default", "steps=1", fake="train"))
    assert done.returncode == 0, done.stderr
    assert "cluster.partition is not given: SBATCH_PARTITION=high of the environment holds" in done.stdout
    run = Run(launcher.slurm, launcher.folder / "runs" / "default")
    assert launcher.slurm.job(run.job)["Partition"] == "high"
    assert run.wait("COMPLETED", "FAILED") == "COMPLETED", run.log()


def hydra_quote(text: str) -> str:
    """A value in Hydra's grammar."""
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
