"""The batch scripts, word for word, and what values of any kind become in them."""

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from core.errors import RunError, UserError
from core.run_dir import RunDir
from launch.compose import SubmitConfig, compose_own
from launch.prepare import check
from launch.prepare import render as render_array
from launch.slurm.preflight import PreflightConfig
from launch.slurm.slurm import SlurmConfig, quote_option, render, seconds_of

GOLDEN = Path(__file__).with_name("submit_golden.sh")
NASTY = """a 'b' "c" $HOME `id` $(id) \\n %j @RUN@ ; rm -rf x & # ünï"""


def config(**changed: object) -> SlurmConfig:
    values = {
        "nodes": 2, "gpus": 8, "gpu_type": "h100", "cpus": 12, "memory": "900G", "time": "1-00:00:00",
        "partition": "batch", "account": "research", "qos": "high", "constraint": "ib&nvme", "exclude": "bad[1-3]",
        "reservation": "week", "options": ["--comment=two words"], "srun": ["--mpi=none"],
        "environment": {"NCCL_SOCKET_IFNAME": "ib0", "WORDS": "it's"}, "setup": ["module purge", "module load cuda"],
        "container": ["apptainer", "exec", "--nv", "my image.sif"], "python": "python3",
        "preflight": PreflightConfig(matmul_tflops=500, bandwidth_gbs=100),
    }  # fmt: skip
    return SlurmConfig(**{**values, **changed})  # type: ignore[arg-type]


def test_the_script_word_for_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change that is meant: look at the difference, then write the new text into the golden file."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me"))
    monkeypatch.setattr(Path, "absolute", lambda self: Path("/home/me") / self)
    overrides = ["run.id=big", "model=mova_360p", "data.path=shards/speech and music"]
    run = RunDir(Path("runs/big"))
    script = render(config(), run, run.root / "code", overrides, 1700000000.25, RunDir(Path("runs/before")))
    assert script == GOLDEN.read_text()


def test_the_scripts_are_bash(tmp_path: Path) -> None:
    variants = [
        config(), config(requeue=False), config(preflight=PreflightConfig(enabled=False)),
        config(environment={}, setup=[], container=[], options=[], srun=[]), SlurmConfig(),
        config(environment={"X": NASTY}, container=[NASTY], python=NASTY),
    ]  # fmt: skip
    for variant in variants:
        script = render(variant, RunDir(tmp_path / "it's a run"), tmp_path / "code", [f"a={NASTY}"], 0.0)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert "@" not in script.replace(NASTY, "").replace("USR2@", "").replace("[@]", "").replace("$@", "").replace(
            "_@}", ""
        ).replace(shlex.quote(NASTY), "").replace(shlex.quote(f"a={NASTY}"), "")


def test_nasty_values_reach_the_commands_as_they_are(tmp_path: Path) -> None:
    """The script runs here, with stand-ins for SLURM's commands and a container that prints what it is given."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "scontrol").write_text("#!/bin/sh\necho 'NodeName=n1 NodeAddr=10.0.0.1 Port=1'\n")
    (stand_ins / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    (stand_ins / "srun").write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >"$SEEN/srun"\n'
        'printf "%s\\0" "$NASTY" "$PYTHONPATH" "$MASTER_ADDR" >"$SEEN/env"\n'
    )
    (stand_ins / "fake image").write_text("#!/bin/bash\nexit 0\n")
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    root = tmp_path / "it's $HOME"
    root.mkdir()
    (root / "config.yaml").touch()
    variant = config(
        environment={"NASTY": NASTY}, container=[str(stand_ins / "fake image"), NASTY], python="py thon", requeue=False,
        preflight=PreflightConfig(enabled=False), setup=[], srun=[],
    )  # fmt: skip
    script = render(variant, RunDir(root), root / "code", [f"x={NASTY}"], 0.0)
    environment = {
        "PATH": f"{stand_ins}:{os.environ['PATH']}", "SEEN": str(tmp_path), "SLURM_JOB_ID": "12", "HOME": "/wrong",
        "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "srun").read_text().split("\0")[:-1]
    assert words[-5:] == [NASTY, "py thon", "-m", "launch.slurm.task", f"x={NASTY}"]
    assert f"--output={root}/logs/%j-%t.out" in words
    assert (tmp_path / "env").read_text().split("\0")[:-1] == [NASTY, str(root / "code"), "10.0.0.1"]


@pytest.mark.parametrize("option", ["--comment=a\nb", "--comment=a\rb"])
def test_an_option_that_cannot_be_written_is_refused(option: str) -> None:
    with pytest.raises(RunError, match="line break"):
        quote_option(option)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"gpus": 2, "processes": 4}, "one per GPU"),
        ({"gpu_request": "shards"}, "gres, gpus-per-node"),
        ({"environment": {"A-B": "x"}}, "'A-B' is not the name of a variable"),
        ({"options": ["comment=x"]}, "not an option of sbatch"),
        ({"time": "2", "signal_lead": 120}, "not longer than cluster.signal_lead=120"),
    ],
)
def test_impossible_values_are_refused(changed: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SlurmConfig(**changed)


def test_only_what_is_given_is_asked_for(tmp_path: Path) -> None:
    lines = render(SlurmConfig(), RunDir(tmp_path / "x"), tmp_path, [], 0.0).splitlines()
    names = [line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert names == ["--job-name", "--chdir", "--output", "--open-mode", "--nodes", "--ntasks-per-node", "--signal",
                     "--requeue"]  # fmt: skip


def test_excluded_nodes_stay_excluded(tmp_path: Path) -> None:
    (tmp_path / "excluded_nodes").write_text("n7\nn9\n")
    assert "#SBATCH --exclude=n1,n7,n9\n" in render(SlurmConfig(exclude="n1"), RunDir(tmp_path), tmp_path, [], 0.0)


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-1:30", 91800),
        ("1-00:00:10", 86410),
        ("x", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_gpus_can_be_asked_for_in_both_ways() -> None:
    for request, line in (("gres", "--gres=gpu:h100:8"), ("gpus-per-node", "--gpus-per-node=h100:8")):
        assert f"#SBATCH {line}\n" in render(config(gpu_request=request), RunDir(Path("x")), Path("c"), [], 0.0)


def test_keys_of_a_cluster_are_checked() -> None:
    with pytest.raises(UserError, match="did you mean cluster.partition"):
        compose_own(["cluster=slurm", "cluster.partitoin=x"])
    own = compose_own(["cluster=slurm", "cluster.nodes=4", "cluster.gpus=8", "cluster.preflight.seconds=5"])
    assert isinstance(own.cluster, SlurmConfig) and own.cluster.world == 32 and own.cluster.preflight.seconds == 5


def test_the_script_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for number in range(70):
        (tmp_path / "raw" / f"{number}.mp4").touch()
    overrides = ["source=raw", "output=out/set", "frames=17"]
    script = render_array(
        config(setup=[], environment={}),
        check(overrides),
        SubmitConfig(max_parallel_units=2),
        tmp_path / "code",
        overrides,
    )
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --array=0-2%2\n" in script, "one unit for 32 files"
    assert 'unit="$SLURM_ARRAY_TASK_ID/3"' in script and "    frames=17 \\\n" in script
    assert "workers=12" in script, "the cores of the task, not of the node"
    for wrong, told in ((["source=raw"], "output is missing"), (["unit=0/3"], "launch.units"), (["sorce=x"], "source")):
        with pytest.raises(UserError, match=told):
            check([*overrides[:1], *wrong] if "missing" in told else [*overrides, *wrong])


@pytest.mark.parametrize(
    "waited, begins, status",
    [(None, "now+60", 0), (0, "now+60", 0), (300, "now+300", 0), (7000, "now+1800", 0), (90000, None, 1)],
)
def test_a_job_without_room_is_followed_by_one_that_begins_later(
    tmp_path: Path, waited: int | None, begins: str | None, status: int
) -> None:
    """The script runs here; the run's folder is away. The next job is told since when it waits, those that wait for
    this one wait for that one, and after a day it is given up."""
    stand_ins, now = tmp_path / "bin", int(time.time())
    stand_ins.mkdir()
    for name, words in {
        "scontrol": '[ "$1" = update ] && echo "$@" >>"$SEEN/updates" || echo "JobId=12 Restarts=0 ExcNodeList=n7 x"',
        "squeue": 'case "$*" in *%E*) echo "13 afterok:12(unfulfilled)" ;; *) echo RUNNING ;; esac',
        "sbatch": 'printf "%s\\n" "$@" >"$SEEN/sbatch"; env >"$SEEN/environment"; echo 14',
    }.items():  # fmt: skip
        (stand_ins / name).write_text(f"#!/bin/bash\n{words}\n")
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    config = SlurmConfig(preflight=PreflightConfig(enabled=False), python="false")
    script = tmp_path / "slurm_script"
    script.write_text(render(config, RunDir(tmp_path / "away"), tmp_path / "away" / "code", [], 0.0))
    environment = os.environ | {
        "PATH": f"{stand_ins}:{os.environ['PATH']}", "SEEN": str(tmp_path), "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n1", "MOVA_DEADLINE": "5",
    }  # fmt: skip
    given = [] if waited is None else [str(now - waited)]
    done = subprocess.run(["bash", str(script), *given], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    if begins is None:
        assert not (tmp_path / "sbatch").exists() and "given up: not writable for 9000" in done.stderr
        return
    *options, own, since = (tmp_path / "sbatch").read_text().split("\n")[:-1]
    first, seconds = begins.split("+")
    begin = next(option for option in options if option.startswith(f"--begin={first}+")).split("+")[1]
    assert int(seconds) <= int(begin) <= int(seconds) + 5
    assert "--exclude=n7" in options and own == str(script)
    assert f"--comment=waits for room: {tmp_path / 'away'}" in options
    assert 0 <= int(since) - (now - (waited or 0)) <= 5
    assert (tmp_path / "updates").read_text() == "update JobId=13 Dependency=afterok:14\n"
    assert "SLURM_JOB_ID" not in (tmp_path / "environment").read_text()
