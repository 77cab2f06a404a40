"""A job that generates clips from a run's checkpoints beside its training: `mova watch` on one node of the cluster.

    mova launch cluster=slurm ... watch.enabled=true 'watch.keys=["every=5000", "clips=4"]'

It begins when the run's first job does, and ends when the run has finished and its last checkpoint is sampled.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.child import command, environment
from core.durable import write_atomically
from core.errors import RunError
from core.ranges import bounded
from core.run_dir import RunDir
from launch.slurm import slurm
from launch.slurm.slurm import SlurmConfig
from launch.snapshot import umask

TEMPLATE = Path(__file__).with_name("watch.sh.template")
SCRIPT = "watch.sh"


@dataclass
class WatchJobConfig:
    """A job that generates clips from the checkpoints, beside the training job.

    enabled: whether to submit it
    gpus: GPUs of its node, with a process for each; they share the tokens of a clip (none if cluster.gpus is 0)
    memory: memory of its node, as for sbatch (null: the site's default)
    time: its time limit, as for sbatch (null: cluster.time)
    keys: arguments of `mova watch`, as ["every=5000", "clips=4"]
    """

    enabled: bool = False
    gpus: int = bounded(1, "[0, inf)")
    memory: str | None = None
    time: str | None = None
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in self.keys:
            if "=" not in key or key.startswith(("-", "run=")):
                raise ValueError(f"watch.keys: {key!r} is not a key=value of mova watch")


def check(config: WatchJobConfig) -> None:
    """RunError for a key that `mova watch` does not have, before anything is submitted."""
    asked = command("tools.watch", more=["--cfg", "job", "run=x", *config.keys])
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"watch.keys: {done.stderr.strip().removeprefix('error: ')}")


def render(config: WatchJobConfig, cluster: SlurmConfig, run: RunDir, code: Path) -> str:
    """The batch script. `code`: the snapshot that it runs."""
    gpus = config.gpus if cluster.gpus else 0
    node = replace(cluster, nodes=1, gpus=gpus, processes=0, memory=config.memory, time=config.time or cluster.time)
    logs = slurm.escape_percent(str((run.root / "logs").absolute()))
    options = [
        f"--job-name={run.root.name}-watch",
        f"--chdir={Path.cwd()}",
        f"--output={logs}/watch-%j.out",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks=1",
        f"--signal=B:USR2@{cluster.signal_lead}",
        "--requeue" if cluster.requeue else "--no-requeue",
        *slurm.resource_options(node),
        *([f"--exclude={cluster.exclude}"] if cluster.exclude else []),
        *cluster.options,
    ]
    program, keys = "tools.watch", [str(run.root.absolute()), *config.keys]
    if gpus > 1:
        program = f"torch.distributed.run --standalone --nproc-per-node={gpus} -m tools.watch"
        keys.append(f"parallel.ulysses={gpus}")
    values = {
        "NAME": slurm.one_line(run.root.name),
        "SBATCH": "\n".join(f"#SBATCH {slurm.quote_option(option)}" for option in options),
        "CODE": shlex.quote(str(code.absolute())),
        "PYTHON": shlex.join([*cluster.container, cluster.python or sys.executable]),
        **slurm.common_parts(cluster),
        "PROGRAM": program,
        "OVERRIDES": " \\\n".join(f"    {shlex.quote(key)}" for key in keys),
    }
    return slurm.fill(TEMPLATE.read_text(), values)


def submit(cluster: SlurmConfig, script: str, run: RunDir, beside: str) -> str:
    """Give it to SLURM; `beside`: the run's first job, with which it begins. Returns the job's number."""
    path = run.root / SCRIPT
    write_atomically(path, script)
    path.chmod(0o777 & ~umask())
    order = [f"--dependency=after:{beside}", "--kill-on-invalid-dep=yes"]
    return slurm.submit_job(order, path, cluster)
