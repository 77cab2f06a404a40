"""A job beside a run's own that makes clips of its checkpoints: `python -m tools.watch` on one node of the cluster.

    python -m launch cluster=slurm ... watch.enabled=true 'watch.keys=["every=5000", "clips=4"]'

It begins when the run's first job does, and ends when the run has finished and its last checkpoint is sampled.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch import slurm
from launch.slurm import SlurmConfig
from train.errors import RunError
from train.run_dir import RunDir, write_atomically

TEMPLATE = Path(__file__).with_name("watch.sh.template")
SCRIPT = "watch.sh"


@dataclass
class WatchJobConfig:
    """`enabled`: submit it. `gpus` of its node, a process each that shares a clip's tokens (none where cluster.gpus is
    0); `memory` and `time` as sbatch takes them (null: the site's default; cluster.time). `keys`: of conf/watch.yaml.
    """

    enabled: bool = False
    gpus: int = 1
    memory: str | None = None
    time: str | None = None
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ValueError(f"watch.gpus is {self.gpus}; give 0 or more")
        for key in self.keys:
            if "=" not in key or key.startswith(("-", "run=")):
                raise ValueError(f"watch.keys: {key!r} is no key=value of conf/watch.yaml")


def check(config: WatchJobConfig) -> None:
    """RunError for a key that conf/watch.yaml does not have: before anything is submitted."""
    command = [sys.executable, "-P", "-m", "tools.watch", "--cfg", "job", "run=x", *config.keys]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split("\nSet the environment variable")[0].split())
        raise RunError(f"watch.keys: {said}")


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


def submit(script: str, run: RunDir, beside: str) -> str:
    """Give it to SLURM; `beside`: the run's first job, with which it begins. Returns the job's number."""
    path = run.root / SCRIPT
    write_atomically(path, script)
    path.chmod(0o755)
    order = [f"--dependency=after:{beside}", "--kill-on-invalid-dep=yes"]
    return slurm.sbatch(["--parsable", *order], path.absolute()).split(";")[0]
