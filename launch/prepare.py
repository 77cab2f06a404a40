"""Data preparation as a job array: one unit of `mova prepare` per task.

A task that is preempted or loses its node is restarted by SLURM, and a second submission does the missing units. All
files of the array are in `<output>.jobs/`: code/, prepare.sh, logs/.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from core.compose import compose
from core.durable import write_atomically
from core.errors import RunError
from data.errors import DataError
from data.prepare.__main__ import PROGRAM
from data.prepare.curation import FILES_A_UNIT, MOST_UNITS, PrepareConfig
from data.sources.cells import TableLayout
from data.sources.survey import Survey
from launch.compose import SubmitConfig
from launch.slurm import slurm
from launch.slurm.slurm import SlurmConfig
from launch.snapshot import Snapshot

TEMPLATE = slurm.TEMPLATE.with_name("prepare.sh.template")
SCRIPT = "prepare.sh"
MOST_TASKS = MOST_UNITS


def check(overrides: list[str]) -> PrepareConfig:
    """The config that the overrides of conf/prepare.yaml describe. UserError if one is wrong."""
    config = compose(PROGRAM.schema, overrides).typed()
    assert isinstance(config, PrepareConfig)
    if config.unit or config.units:
        raise RunError("the launcher sets unit and units: give launch.units=N")
    return config


def folder(config: PrepareConfig) -> Path:
    """The folder of the array's files."""
    output = Path(config.output)
    return output.with_name(output.name + ".jobs")


def render(cluster: SlurmConfig, config: PrepareConfig, submit: SubmitConfig, code: Path, overrides: list[str]) -> str:
    """The batch script of the array. RunError if there is nothing to prepare."""
    try:
        files = Survey(config.source, TableLayout(config.columns, config.delimiter)).count()
    except DataError as error:
        raise RunError(str(error)) from None
    units = submit.units or min(MOST_TASKS, -(-files // FILES_A_UNIT))
    logs = slurm.escape_percent(str((folder(config) / "logs").absolute()))
    options = [
        f"--job-name=prepare-{Path(config.output).name}",
        f"--chdir={Path.cwd()}",
        f"--output={logs}/%A_%a.out",
        "--open-mode=append",
        f"--array=0-{units - 1}" + (f"%{submit.max_parallel_units}" if submit.max_parallel_units else ""),
        "--nodes=1",
        "--ntasks=1",
        "--requeue" if cluster.requeue else "--no-requeue",
        *slurm.resource_options(cluster),
        *([f"--exclude={cluster.exclude}"] if cluster.exclude else []),
        *cluster.options,
    ]
    if cluster.cpus and not any(override.startswith("workers=") for override in overrides):
        overrides = [*overrides, f"workers={cluster.cpus}"]  # it would take all cores that the node has
    values = {
        "NAME": slurm.one_line(config.output),
        "SBATCH": "\n".join(f"#SBATCH {slurm.quote_option(option)}" for option in options),
        "CODE": shlex.quote(str(code.absolute())),
        "PYTHON": shlex.join([*cluster.container, cluster.python or sys.executable]),
        **slurm.common_parts(cluster),
        "UNITS": str(units),
        "OVERRIDES": " \\\n".join(f"    {shlex.quote(override)}" for override in overrides),
    }
    return slurm.fill(TEMPLATE.read_text(), values)


def submit_array(
    cluster: SlurmConfig, config: PrepareConfig, submit: SubmitConfig, code: Snapshot, overrides: list[str]
) -> None:
    """Submit the array to SLURM, or print what would be submitted."""
    job_folder = folder(config)
    script = render(cluster, config, submit, code.folder(job_folder), overrides)
    if submit.dry_run:
        print(script, end="")
        return
    if submit.test_only:
        print(slurm.sbatch(["--test-only"], script, cluster))
        return
    code.write(job_folder)
    (job_folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomically(job_folder / SCRIPT, script)
    job = slurm.submit_job([], job_folder / SCRIPT, cluster)
    print(f"{config.output}: job array {job}; script {job_folder / SCRIPT}, logs {job_folder / 'logs'}")
