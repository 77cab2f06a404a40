"""What the launcher sets for the ranks where the user has set nothing, what it says where the user has, and what of a
shell's environment never reaches a job."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from launch.local.local import _set_environment
from launch.slurm.slurm import CLEAN, TEMPLATE, SlurmConfig, clean_environment

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
CASES = [
    ({}, "expandable_segments:True", None),
    ({OLD: "backend:cudaMallocAsync"}, "backend:cudaMallocAsync", None),
    ({NEW: "max_split_size_mb:512"}, None, "max_split_size_mb:512"),  # torch would prefer the older name
    ({OLD: ""}, "expandable_segments:True", None),
]


@pytest.mark.parametrize(("given", "old", "new"), CASES)
def test_the_allocator_here(
    given: dict[str, str], old: str | None, new: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "3,5", **given})
    _set_environment(2, tmp_path)
    assert (os.environ.get(OLD), os.environ.get(NEW)) == (old, new)
    said = [f"{name}={value} of the environment holds" for name, value in given.items() if value]
    assert capsys.readouterr().err.splitlines() == [*said, "CUDA_VISIBLE_DEVICES=3,5 of the environment holds"]


@pytest.mark.parametrize(("given", "old", "new"), CASES)
def test_the_allocator_of_a_job(given: dict[str, str], old: str | None, new: str | None) -> None:
    lines = [line for line in TEMPLATE.read_text().splitlines() if "ALLOC_CONF" in line]
    script = re.sub("@ALLOCATOR@", "expandable_segments:True", "\n".join(lines))
    done = subprocess.run(
        ["bash", "-uc", f"{script}\nprintenv {OLD}; printenv {NEW}; true"],
        env={"PATH": os.environ["PATH"], **given}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [value for value in (old, new) if value]
    assert done.stderr == f"allocator: {old or new}\n"


@pytest.mark.parametrize(("ends", "holds"), [("1", False), ("nonsense", False), ("in 15 minutes", True)])
def test_a_deadline_of_a_job_that_is_over_stops_nothing(
    ends: str, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell within an allocation that has ended, say; a deadline that is still to come is the user's."""
    ends = str(time.time() + 900) if ends == "in 15 minutes" else ends
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "MOVA_DEADLINE": ends})
    _set_environment(1, tmp_path)
    assert os.environ.get("MOVA_DEADLINE") == (ends if holds else None)
    assert (
        f"MOVA_DEADLINE={ends} of the environment {'holds' if holds else 'has passed: ignored'}"
        in capsys.readouterr().err
    )


# What changes sbatch, srun or a rank, from the shell or from a job that this shell is in.
POISON = {
    "SBATCH_TIMELIMIT": "5", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXCLUSIVE": "user", "SRUN_NTASKS": "1",
    "SLURM_RESTART_COUNT": "7", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "PMIX_RANK": "3", "PMI_RANK": "3",
    "OMPI_COMM_WORLD_RANK": "3", "MOVA_DEADLINE": "1", "MOVA_ATTEMPT": "2", "TORCHELASTIC_RUN_ID": "x",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
KEPT = {"PATH": os.environ["PATH"], "SLURM_CONF": "/etc/slurm/ours.conf", "HF_HOME": "/models"}


def test_sbatch_is_given_nothing_that_beats_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a shell's account and the like hold where the config is silent."""
    defaults = {"SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "theirs", "SBATCH_QOS": "low"}
    monkeypatch.setattr(os, "environ", {**KEPT, **POISON, **defaults})
    assert clean_environment(SlurmConfig(partition="batch")) == {**KEPT, "SBATCH_ACCOUNT": "mine", "SBATCH_QOS": "low"}


@pytest.mark.parametrize(
    ("what", "stays"), [("true", ("SLURM_CONF", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_NTASKS")),
                        ("as_from_a_new_shell", ("SLURM_CONF",))],
)  # fmt: skip
def test_a_job_clears_what_was_left_and_keeps_what_slurm_gave_it(what: str, stays: tuple[str, ...]) -> None:
    """SLURM's own variables are the job's, but none of a job that it submits in its place."""
    script = f"set -eu\n{CLEAN.read_text()}\n{'' if what == 'true' else what} env -0"
    done = subprocess.run(["bash", "-c", script], env={**KEPT, **POISON, "RANK": "1"}, capture_output=True, check=True)
    seen = {line.split("=")[0] for line in done.stdout.decode().split("\0")}
    assert seen & (POISON.keys() | {"SLURM_CONF", "RANK"}) == set(stays) and "HF_HOME" in seen
