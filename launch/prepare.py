"""Data preparation as a job array: one unit of `python -m data.prepare` a task.

A task that is preempted or loses its node is started again by SLURM, and a second submission does the units that are
missing. Everything of the array lies in `<output>.jobs/`: code/, prepare.sh, logs/.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.errors import DataError
from data.prepare import FILES_A_UNIT, MOST_UNITS, PrepareConfig
from data.source import list_sources
from launch import slurm
from launch.compose import SubmitConfig, compose_plain
from launch.slurm import SlurmConfig
from launch.snapshot import Snapshot
from train.errors import RunError
from train.run_dir import write_atomically

TEMPLATE = Path(__file__).with_name("prepare.sh.template")
SCRIPT = "prepare.sh"
MOST_TASKS = MOST_UNITS


def check(overrides: list[str]) -> PrepareConfig:
    """The config that the overrides of conf/prepare.yaml describe. RunError when one is wrong."""
    ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)
    try:
        config = OmegaConf.to_object(compose_plain("prepare", overrides))
    except MissingMandatoryValue as error:
        raise RunError(f"{error.full_key} is missing: give it on the command line, {error.full_key}=...") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RunError(str(error).splitlines()[0]) from None
    assert isinstance(config, PrepareConfig)
    if config.unit or config.units:
        raise RunError("unit and units are the launcher's affair here: give launch.units=N")
    return config


def folder(config: PrepareConfig) -> Path:
    """Where everything of the array lies."""
    output = Path(config.output)
    return output.with_name(output.name + ".jobs")


def render(cluster: SlurmConfig, config: PrepareConfig, submit: SubmitConfig, code: Path, overrides: list[str]) -> str:
    """The batch script of the array. RunError when there is nothing to prepare."""
    try:
        files = len(list_sources(config.source))
    except DataError as error:
        raise RunError(str(error)) from None
    units = submit.units or min(MOST_TASKS, -(-files // FILES_A_UNIT))
    logs = slurm.escape_percent(str((folder(config) / "logs").absolute()))
    options = [
        f"--job-name=prepare-{Path(config.output).name}",
        f"--chdir={Path.cwd()}",
        f"--output={logs}/%A_%a.out",
        "--open-mode=append",
        f"--array=0-{units - 1}" + (f"%{submit.at_once}" if submit.at_once else ""),
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
    """Give the array to SLURM, or show what would be given."""
    place = folder(config)
    script = render(cluster, config, submit, code.folder(place), overrides)
    if submit.dry_run:
        print(script, end="")
        return
    if submit.test_only:
        print(slurm.sbatch(["--test-only"], script))
        return
    code.write(place)
    (place / "logs").mkdir(parents=True, exist_ok=True)
    write_atomically(place / SCRIPT, script)
    job = slurm.sbatch(["--parsable"], place / SCRIPT).split(";")[0]
    print(f"{config.output}: job array {job}; script {place / SCRIPT}, logs {place / 'logs'}")
