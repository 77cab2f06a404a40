"""Submits a run to SLURM: a readable batch script in the run's folder, filled in from a template, given to sbatch.

What the script does is in submit.sh.template; what it asks before and after in launch/job.py; what each rank does in
launch/task.py. docs/launching.md tells the whole story.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.attempts import MARK, Attempts
from launch.cluster import ClusterConfig
from launch.job import NOTHING_TO_DO
from launch.preflight import PreflightConfig
from train.errors import EXIT_RETRY, RunError
from train.run_dir import RunDir, write_atomically

TEMPLATE = Path(__file__).with_name("submit.sh.template")
PREFLIGHT = Path(__file__).with_name("preflight.sh.template")
SCRIPT = "submit.sh"
GPU_REQUESTS = ("gres", "gpus-per-node")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class SlurmConfig(ClusterConfig):
    """conf/cluster/slurm.yaml. What is null or empty is not asked for: the site's own default holds.

    `nodes`, and on each `gpus` (of `gpu_type`; asked for as "gres" or "gpus-per-node") and `processes` (0: one a GPU);
    `cpus` of each process; `memory` of each node and `time` as sbatch takes them ("500G", "2-00:00:00").
    `options`: more #SBATCH lines ("--comment=x"); `srun`: more options of srun. `environment`: variables; `setup`:
    lines of bash; `container`: a command before Python, with its arguments; `python`: the interpreter (null: this one).
    `signal_lead`: seconds before the time limit at which the run is asked to save and stop.
    `requeue`: the job asks SLURM to start it again after preemption, the time limit, a lost node or a crash, at most
    `max_restarts` times, and not after `fruitless` attempts in a row that gained no step. `chain`: where requeueing is
    forbidden, so many jobs one after the other; those that are not needed end at once.
    `preflight`: checks of every node before training.
    """

    nodes: int = 1
    gpus: int = 0
    gpu_type: str | None = None
    gpu_request: str = "gres"
    processes: int = 0
    cpus: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    options: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    python: str | None = None
    signal_lead: int = 180
    requeue: bool = True
    max_restarts: int = 200
    fruitless: int = 3
    chain: int = 1
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus", 0), ("processes", 0), ("max_restarts", 0), ("fruitless", 1),
                            ("chain", 1), ("signal_lead", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"cluster.{name} is {getattr(self, name)}; give a whole number from {least} on")
        if self.gpu_request not in GPU_REQUESTS:
            raise ValueError(f"cluster.gpu_request {self.gpu_request!r} is not one of {', '.join(GPU_REQUESTS)}")
        if self.gpus and self.processes > self.gpus:
            raise ValueError(f"cluster.processes={self.processes} on a node of cluster.gpus={self.gpus}: one a GPU")
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"cluster.environment: {name!r} is no name of a variable")
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"cluster.options: {option!r} is no option of sbatch, as --comment=text")
        if self.time is not None and (limit := seconds_of(self.time)) is not None and limit <= self.signal_lead:
            raise ValueError(
                f"cluster.time={self.time} is no longer than cluster.signal_lead={self.signal_lead} s: the run would "
                "be asked to stop as soon as it starts"
            )

    @property
    def per_node(self) -> int:
        """Processes on each node."""
        return self.processes or self.gpus or 1

    @property
    def world(self) -> int:
        """Processes that will run."""
        return self.nodes * self.per_node


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as sbatch reads it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None for other words."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        return None
    days, first, second, third = (int(group) if group else None for group in match.groups())
    assert first is not None
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def render(
    config: SlurmConfig,
    run: RunDir,
    code: Path,
    overrides: Sequence[str],
    started: float,
    follows: RunDir | None = None,
) -> str:
    """The batch script of a run. `overrides`: of conf/train.yaml; `code`: the snapshot that it runs; `started`: when it
    was submitted, seconds since the epoch; `follows`: the run that must be finished before."""
    root = run.root.absolute()
    python = [*config.container, config.python or sys.executable]
    values = {
        "NAME": one_line(root.name),
        "SBATCH": "\n".join(f"#SBATCH {quote_option(option)}" for option in sbatch_options(config, run)),
        "RUN": shlex.quote(str(root)),
        "CODE": shlex.quote(str(code.absolute())),
        "PYTHON": shlex.join(python),
        "MARK": MARK,
        **common_parts(config),
        "STARTED": f"{started:.0f}",
        "MAX_RESTARTS": str(config.max_restarts),
        "FRUITLESS": str(config.fruitless),
        "FOLLOWS": f" --follows {shlex.quote(str(follows.root.absolute()))}" if follows else "",
        "NOTHING": str(NOTHING_TO_DO),
        "LOGS": shlex.quote(escape_percent(str(root / "logs"))),
        "SRUN": "".join(f" {shlex.quote(option)}" for option in srun_options(config)),
        "PREFLIGHT": _preflight(config, run),
        "OVERRIDES": " \\\n".join(f"    {shlex.quote(override)}" for override in overrides),
        "AFTER": _after(config),
    }
    return fill(TEMPLATE.read_text(), values)


def _preflight(config: SlurmConfig, run: RunDir) -> str:
    """The part of the script that looks at the nodes."""
    check = config.preflight
    if not check.enabled:
        return "# No checks of the nodes: cluster.preflight.enabled=false"
    values = {
        "NODES": str(config.nodes),
        "LOGS": shlex.quote(escape_percent(str((run.root / "logs").absolute()))),
        "EXCLUDE": shlex.quote(config.exclude or ""),
        "SECONDS": f"{check.seconds:g}",
        "MOST": str(check.most_excluded),
        "ARGUMENTS": shlex.join(check.arguments(config.gpus)),
        "RETRY": str(EXIT_RETRY),
    }
    return fill(PREFLIGHT.read_text(), values).rstrip()


def fill(template: str, values: dict[str, str]) -> str:
    """The template with every @WORD@ replaced, none of them within a value."""
    for name in (name for name, value in values.items() if not value):
        template = template.replace(f"\n@{name}@\n", "")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], template)


def common_parts(config: SlurmConfig) -> dict[str, str]:
    """ENVIRONMENT and SETUP of a template."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in config.environment.items()]
    return {"ENVIRONMENT": "\n".join(exports), "SETUP": "\n".join(config.setup)}


def sbatch_options(config: SlurmConfig, run: RunDir) -> list[str]:
    """Options of the job, unquoted."""
    logs = escape_percent(str((run.root / "logs").absolute()))
    bad = run.root / "excluded_nodes"
    exclude = [config.exclude or "", *(bad.read_text().split() if bad.exists() else [])]
    options = [
        f"--job-name={run.root.name}",
        f"--chdir={Path.cwd()}",
        f"--output={logs}/%j.out",
        "--open-mode=append",
        f"--nodes={config.nodes}",
        f"--ntasks-per-node={config.per_node}",
        f"--signal=B:USR2@{config.signal_lead}",
        "--requeue" if config.requeue else "--no-requeue",
    ]
    return options + resource_options(config) + _given({"exclude": ",".join(filter(None, exclude))}) + config.options


def resource_options(config: SlurmConfig) -> list[str]:
    """What every kind of job asks for."""
    gpus = f"{config.gpu_type}:{config.gpus}" if config.gpu_type else str(config.gpus)
    asked = {
        "gres": f"gpu:{gpus}" if config.gpus and config.gpu_request == "gres" else None,
        "gpus-per-node": gpus if config.gpus and config.gpu_request == "gpus-per-node" else None,
        "cpus-per-task": config.cpus,
        "mem": config.memory,
        **{name: getattr(config, name) for name in (
            "time", "partition", "account", "qos", "constraint", "reservation")},
    }  # fmt: skip
    return _given(asked)


def srun_options(config: SlurmConfig) -> list[str]:
    """Options of the step that trains. srun does not inherit the CPUs of a task from the job."""
    return _given({"cpus-per-task": config.cpus}) + config.srun


def _given(options: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value not in (None, "")]


def _after(config: SlurmConfig) -> str:
    if config.requeue:
        return (
            f'[ "$status" -ne {EXIT_RETRY} ] || exec scontrol requeue "$job" '
            '# it kills this script: nothing may follow\nexit "$status"'
        )
    return 'exit "$status" # the next job of the chain, if any, goes on'


def quote_option(option: str) -> str:
    """An option as sbatch reads it in a script. RunError when it cannot be written there."""
    if "\n" in option or "\r" in option:
        raise RunError(f"{option!r} holds a line break, which a batch script's options cannot")
    name, equals, value = option.partition("=")
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+=\[\]&|*!-]*", value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'


def one_line(text: str) -> str:
    """Text for a comment."""
    return " ".join(text.split())


def escape_percent(path: str) -> str:
    """A path in which sbatch and srun see no pattern."""
    if "\\" in path:
        raise RunError(f"{path}: sbatch cannot write its logs below a folder with a backslash in its name")
    return path.replace("%", "%%")


def sbatch(arguments: Sequence[str], script: Path | str) -> str:
    """What sbatch prints; `script`: a file, or the text of one. RunError with its own words when it refuses."""
    # Variables of a job that we may be in ourselves are not the new job's.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    command = ["sbatch", *arguments, *([str(script)] if isinstance(script, Path) else [])]
    try:
        done = subprocess.run(
            command, input=script if isinstance(script, str) else None, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise RunError("sbatch is not found: cluster=slurm works where SLURM's commands are installed") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise RunError(f"sbatch refused the job: {said}")
    return (done.stdout + done.stderr if "--test-only" in arguments else done.stdout).strip()


def queued(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of those jobs that SLURM still has in its queue. RunError without squeue."""
    if not jobs:
        return {}
    try:
        done = subprocess.run(
            ["squeue", "-h", "-a", "-o", "%i|%T|%r"], capture_output=True, text=True, timeout=60, check=True
        )
    except FileNotFoundError:
        raise RunError("squeue is not found: cluster=slurm works where SLURM's commands are installed") from None
    except (subprocess.SubprocessError, OSError) as error:
        raise RunError(f"squeue does not answer: {error}") from None
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {number: (state, reason) for number, state, reason in lines if number in jobs}


def check_free(run: RunDir) -> None:
    """RunError when a job of this run is in the queue, or a process trains it."""
    for job, (state, _) in queued(Attempts(run).jobs()).items():
        raise RunError(
            f"run {run.root.name!r} has job {job} in the queue ({state}): wait for it, or end it with scancel {job}"
        )
    if (holder := run.holder()) is not None:
        raise RunError(f"run {run.root.name!r} is being trained already, by {holder}; wait for it, or stop it")


def submit(config: SlurmConfig, run: RunDir, script: str, after: str | None = None) -> list[str]:
    """Write the script and give it to SLURM, as often as the chain is long. Returns the jobs' numbers.

    after: number of a job that must have ended well before. RunError when sbatch refuses. Call check_free before.
    """
    attempts = Attempts(run)
    run.logs.mkdir(parents=True, exist_ok=True)
    run.stop_file.unlink(missing_ok=True)  # whoever wrote it meant an earlier submission
    path = run.root / SCRIPT
    write_atomically(path, script)
    path.chmod(0o755)
    jobs: list[str] = []
    attempts.submitted()
    for _ in range(config.chain):
        order = []
        if jobs:
            order = [f"--dependency=afterany:{jobs[-1]}"]
        elif after is not None:
            order = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        jobs.append(sbatch(["--parsable", *order], path.absolute()).split(";")[0])
        attempts.queued(jobs[-1])
    return jobs
