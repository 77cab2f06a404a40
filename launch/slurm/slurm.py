"""Submits a run to SLURM: a readable batch script in the run's folder, filled in from a template, given to sbatch.

What the script does is in submit.sh.template; what it asks before and after in launch/slurm/job.py; what each rank does
in launch/slurm/task.py. docs/launching.md describes all of it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.durable import write_atomically
from core.errors import EXIT_RETRY, RunError
from core.ranges import bounded
from core.run_dir import RunDir
from launch.attempts import MARK, Attempts
from launch.cluster import ALLOCATOR, ClusterConfig
from launch.slurm.job import NO_ROOM_YET, NOTHING_TO_DO
from launch.slurm.preflight import PreflightConfig
from launch.snapshot import umask
from launch.undo import Before, ctrl_c_at_the_end

TEMPLATE = Path(__file__).with_name("submit.sh.template")
PREFLIGHT = Path(__file__).with_name("preflight.sh.template")
CLEAN = Path(__file__).with_name("clean.sh")
SCRIPT = "submit.sh"
# Variables that change what sbatch and srun do, or that a launched process reads: they belong to the current shell or
# job, not to a new job.
FOREIGN = (
    "SLURM_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "PMI2_", "OMPI_COMM_WORLD_", "MOVA_", "TORCHELASTIC_",
)  # fmt: skip
# But these defaults of a site's or a user's shell apply if the config sets nothing.
DEFAULTS = {
    "SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation", "SBATCH_CONSTRAINT": "constraint",
}  # fmt: skip
ASK_AGAIN = (1.0, 3.0, 6.0)  # seconds before SLURM's queue is queried again: its controller may be restarting
# What sbatch prints when its message may have arrived, but no answer came.
NOT_HEARD = ("Socket timed out on send/recv", "Zero Bytes were transmitted or received", "Message receive failure")
GPU_REQUESTS = ("gres", "gpus-per-node")
WAITS = "waits for room: "  # a comment that begins so, and ends with the run's folder, marks a job that does
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Unclear(RunError):
    """It is unknown whether SLURM accepted a job."""


@dataclass
class SlurmConfig(ClusterConfig):
    """Jobs of a SLURM cluster (conf/cluster/slurm.yaml). The site's default applies to keys that are null or empty.

    nodes: number of nodes
    gpus: GPUs per node
    gpu_type: type of the GPUs
    gpu_request: how GPUs are requested: "gres" or "gpus-per-node"
    processes: processes per node; 0: one per GPU
    cpus: CPUs per process
    memory: memory per node, as for sbatch ("500G")
    time: time limit, as for sbatch ("2-00:00:00")
    partition: partition of the job
    account: account of the job
    qos: quality of service of the job
    constraint: required features of the nodes
    exclude: nodes to avoid
    reservation: reservation that the job uses
    options: more #SBATCH lines, as ["--comment=x"]
    srun: more options for srun
    environment: variables, {NAME: value}
    setup: lines of bash that run first on each node
    container: a command before Python, with its arguments
    python: the interpreter (null: this one)
    signal_lead: seconds before the time limit at which the run is asked to save and stop
    requeue: whether the job asks SLURM to restart it after preemption, the time limit, a lost node or a crash
    max_restarts: maximum number of restarts
    max_failed_restarts: consecutive attempts without a new step after which the job ends
    chain: if requeueing is forbidden, number of jobs that follow one another; those not needed end immediately
    """

    nodes: int = bounded(1, "[1, 100000]")
    gpus: int = bounded(0, "[0, 1024]")
    gpu_type: str | None = None
    gpu_request: str = "gres"
    processes: int = bounded(0, "[0, 4096]")
    cpus: int | None = bounded(None, "[1, inf)")
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
    signal_lead: int = bounded(180, "[0, inf)")
    requeue: bool = True
    max_restarts: int = bounded(200, "[0, inf)")
    max_failed_restarts: int = bounded(3, "[1, inf)")
    chain: int = bounded(1, "[1, 1000]")
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_request not in GPU_REQUESTS:
            raise ValueError(f"cluster.gpu_request {self.gpu_request!r} is not one of {', '.join(GPU_REQUESTS)}")
        if self.gpus and self.processes > self.gpus:
            raise ValueError(
                f"cluster.processes={self.processes} on a node with cluster.gpus={self.gpus}: use one per GPU"
            )
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"cluster.environment: {name!r} is not the name of a variable")
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"cluster.options: {option!r} is not an option of sbatch, such as --comment=text")
        if self.time is not None and (limit := seconds_of(self.time)) is not None and limit <= self.signal_lead:
            raise ValueError(
                f"cluster.time={self.time} is not longer than cluster.signal_lead={self.signal_lead} s: the run would "
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

    @property
    def on_gpus(self) -> bool:
        """Whether each of them will have a GPU."""
        return self.gpus > 0


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as sbatch reads it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None for any other
    text."""
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
        "MAX_FAILED_RESTARTS": str(config.max_failed_restarts),
        "FOLLOWS": f" --follows {shlex.quote(str(follows.root.absolute()))}" if follows else "",
        "NOTHING": str(NOTHING_TO_DO),
        "NO_ROOM": str(NO_ROOM_YET),
        "WAIT": f"{3600 * config.disk_wait_hours:.0f}",
        "WAITS": WAITS,
        "SHORTEST": f"{max(1.0, 60 * config.disk_pause_minutes[0]):.0f}",
        "LONGEST": f"{max(1.0, 60 * config.disk_pause_minutes[1]):.0f}",
        "LOGS": shlex.quote(escape_percent(str(root / "logs"))),
        "SRUN": "".join(f" {shlex.quote(option)}" for option in srun_options(config)),
        "PREFLIGHT": _preflight(config, run),
        "OVERRIDES": " \\\n".join(f"    {shlex.quote(override)}" for override in overrides),
        "AFTER": _after(config),
    }
    return fill(TEMPLATE.read_text(), values)


def _preflight(config: SlurmConfig, run: RunDir) -> str:
    """The part of the script that checks the nodes."""
    check = config.preflight
    if not check.enabled:
        return "# No checks of the nodes: cluster.preflight.enabled=false"
    values = {
        "NODES": str(config.nodes),
        "LOGS": shlex.quote(escape_percent(str((run.root / "logs").absolute()))),
        "EXCLUDE": shlex.quote(config.exclude or ""),
        "SECONDS": f"{check.seconds:g}",
        "MOST": str(check.max_excluded),
        "ARGUMENTS": shlex.join(check.arguments(config.gpus, config.world)),
        "RETRY": str(EXIT_RETRY),
    }
    return fill(PREFLIGHT.read_text(), values).rstrip()


def fill(template: str, values: dict[str, str]) -> str:
    """The template with every @WORD@ replaced, none of them within a value."""
    for name in (name for name, value in values.items() if not value):
        template = template.replace(f"\n@{name}@\n", "")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], template)


def common_parts(config: SlurmConfig) -> dict[str, str]:
    """CLEAN, ENVIRONMENT, SETUP and ALLOCATOR of a template."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in config.environment.items()]
    return {
        "CLEAN": CLEAN.read_text().rstrip(),
        "ENVIRONMENT": "\n".join(exports),
        "SETUP": "\n".join(config.setup),
        "ALLOCATOR": ALLOCATOR,
    }


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
    """Resources that every kind of job requests."""
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
        return f'[ "$status" -ne {EXIT_RETRY} ] || requeue "$job"\nexit "$status"'
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


def sbatch(arguments: Sequence[str], script: Path | str, config: SlurmConfig) -> str:
    """The output of sbatch; `script`: a file, or the text of one. RunError with its message if it refuses."""
    command = ["sbatch", *arguments, *([str(script)] if isinstance(script, Path) else [])]
    try:
        done = subprocess.run(
            command, input=script if isinstance(script, str) else None, env=clean_environment(config),
            capture_output=True, text=True, start_new_session=True,  # Ctrl-C is ours: see ctrl_c_at_the_end
        )  # fmt: skip
    except FileNotFoundError:
        raise RunError("sbatch is not found: cluster=slurm works where SLURM's commands are installed") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        if any(words in said for words in NOT_HEARD):
            raise Unclear(f"sbatch lost the answer of SLURM's controller ({said})")
        raise RunError(f"sbatch refused the job: {said}")
    return (done.stdout + done.stderr if "--test-only" in arguments else done.stdout).strip()


def submit_job(arguments: Sequence[str], script: Path, config: SlurmConfig) -> str:
    """Give a script to SLURM; returns the job's number. Unclear where sbatch ends well and names none: to SLURM, no
    number may mean all jobs of the user."""
    answer = sbatch(["--parsable", *arguments], script.absolute(), config)
    for line in reversed(answer.splitlines()):  # a site's wrapper may print more
        if found := re.fullmatch(r"(\d+)(;\S+)?", line.strip()):
            return found[1]
    raise Unclear(f"sbatch answered {answer!r}, which is no job number")


def _look_for(run: RunDir, script: Path, since: float, unclear: Unclear) -> str:
    """The job of this script that SLURM accepted at `since` or later, though sbatch got no answer. Unclear if the
    queue has none, or does not answer."""
    for wait in (*ASK_AGAIN, None):
        try:
            done = subprocess.run(
                ["squeue", "-h", "--me", f"--name={run.root.name}", "-o", "%i|%V|%o"],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError):
            done = None
        for line in done.stdout.splitlines() if done is not None else ():
            number, submitted, command = line.split("|", 2)
            if command == str(script.absolute()) and _epoch(submitted) >= int(since):
                return number
        if wait is None:
            break
        time.sleep(wait)
    raise _not_known(str(unclear), run, script)


def _not_known(why: str, run: RunDir, script: Path) -> Unclear:
    return Unclear(
        f"{why}: whether it accepted the job is unknown. Check with squeue --me --name={run.root.name}; if it is not "
        f"there, submit it with sbatch {script}"
    )


def _epoch(text: str) -> float:
    """Of a local time as squeue writes it, 2026-01-31T12:00:00."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


def clean_environment(config: SlurmConfig) -> dict[str, str]:
    """The environment of sbatch, which a job inherits, without what would override the config or belongs to a job."""
    kept = {"SLURM_CONF", *(name for name, option in DEFAULTS.items() if getattr(config, option) is None)}
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not (name.startswith(FOREIGN) or name == "CUDA_VISIBLE_DEVICES")
    }


def defaults_taken(config: SlurmConfig) -> list[str]:
    """A line for every default of the shell that applies, since the config does not set it."""
    return [
        f"cluster.{option} is not given: {name}={os.environ[name]} of the environment holds"
        for name, option in DEFAULTS.items()
        if getattr(config, option) is None and name in os.environ
    ]


def queued(jobs: Sequence[str], run: RunDir) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of those jobs of a run that SLURM still has in its queue, and of one that waits for room,
    which the run's full disk may not have recorded. RunError without squeue."""
    if not jobs:
        return {}
    mark = WAITS + str(run.root.absolute())
    for wait in (*ASK_AGAIN, None):
        try:
            done = subprocess.run(
                ["squeue", "-h", "-a", "-o", "%i|%T|%r|%k"], capture_output=True, text=True, timeout=60, check=True
            )
            break
        except FileNotFoundError:
            raise RunError("squeue is not found: cluster=slurm works where SLURM's commands are installed") from None
        except (subprocess.SubprocessError, OSError) as error:
            if wait is None:
                raise RunError(f"squeue does not answer: {error}") from None
            time.sleep(wait)
    lines = [[*line.split("|", 3), ""][:4] for line in done.stdout.splitlines()]
    return {number: (state, reason) for number, state, reason, says in lines if number in jobs or says == mark}


def check_free(run: RunDir) -> None:
    """RunError when a job of this run is in the queue, or a process trains it."""
    for job, (state, _) in queued(Attempts(run).jobs(), run).items():
        raise RunError(
            f"run {run.root.name!r} has job {job} in the queue ({state}): wait for it, or end it with scancel {job}"
        )
    if (holder := run.holder()) is not None:
        raise RunError(f"run {run.root.name!r} is already being trained by {holder}; wait for it, or stop it")


def submit(config: SlurmConfig, run: RunDir, script: str, after: str | None, write: Callable[[], None]) -> list[str]:
    """Write the run's files and submit its script to SLURM, once per job of the chain. Returns the job numbers.

    after: number of a job that must succeed first; write: fills the run's folder. RunError if sbatch refuses. If no
    job is in the queue afterwards (refused, disk full, Ctrl-C) the folder is restored; if sbatch lost the answer, the
    queue is queried, and the folder is kept.
    """
    new = not run.root.exists()
    with run.lock("launch.lock"):  # two submissions at once: the second one finds the first one's job
        check_free(run)
        return _submit(config, run, script, after, write, new)


def _submit(
    config: SlurmConfig, run: RunDir, script: str, after: str | None, write: Callable[[], None], new: bool
) -> list[str]:
    """As `submit`. new: the folder was not there."""
    attempts, path = Attempts(run), run.root / SCRIPT
    before = Before(run, new, (run.config, path, run.stop_file, attempts.path))
    jobs: list[str] = []
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        write()
        run.stop_file.unlink(missing_ok=True)  # whoever wrote it meant an earlier submission
        write_atomically(path, script)
        path.chmod(0o777 & ~umask())
        attempts.submitted()
        for _ in range(config.chain):
            order = []
            if jobs:
                order = [f"--dependency=afterany:{jobs[-1]}"]
            elif after is not None:
                order = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
            with ctrl_c_at_the_end("sbatch's answer"):
                jobs.append(_give(config, run, path, order))
                attempts.queued(jobs[-1])
    except Unclear:  # the folder stays: a job may be on its way to it
        raise
    except KeyboardInterrupt:
        if jobs and (left := _take_back(jobs, run)):
            raise RunError(
                f"stopped, but job {', '.join(left)} of run {run.root} has begun, or may have: "
                f"scancel {' '.join(left)} ends it"
            ) from None
        before.restore()
        raise
    except BaseException:
        if not jobs:
            before.restore()
        raise
    return jobs


def _give(config: SlurmConfig, run: RunDir, path: Path, order: list[str]) -> str:
    """Submit a script; returns the job's number. Unclear where whether SLURM has it is not known."""
    begin = time.time()
    try:
        return submit_job(order, path, config)
    except Unclear as unclear:
        return _look_for(run, path, begin, unclear)
    except KeyboardInterrupt:  # the second one
        raise _not_known("sbatch was stopped before its answer", run, path) from None


def _take_back(jobs: Sequence[str], run: RunDir) -> list[str]:
    """Cancel those of these jobs that have not begun; returns those that live on, or may."""
    try:
        subprocess.run(["scancel", "--state=PENDING", *jobs], capture_output=True, timeout=60)
        return [job for job in jobs if job in queued(jobs, run)]
    except (RunError, subprocess.SubprocessError, OSError):
        return list(jobs)
