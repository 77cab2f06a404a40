"""A real SLURM on this one machine: munged, slurmctld and several slurmd, all files in one temporary folder.

Everything runs in a PID namespace of its own, whose end takes daemons, steps and jobs with it: nothing is left behind,
whatever a test did. Needs root and the packages of `make test-slurm`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
NODES, CPUS, GPUS = 4, 4, 2
HOLD_OFF = 6  # seconds before a requeued job may start: cred_expire + 1

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
StateSaveLocation={root}/ctl
SlurmctldPidFile={root}/ctl.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=5
KillWait=2
MinJobAge=300
JobRequeue=1
MailProg=/bin/true
PlugStackConfig={root}/etc/plugstack.conf
MpiDefault=none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=10 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks for such a cluster, or ""."""
    lacking = [program for program in PROGRAMS if _program(program) is None]
    if sys.platform != "linux":
        return "it needs Linux"
    if lacking:
        return (
            f"{', '.join(lacking)} not found; on Debian and Ubuntu: "
            "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "it needs root (its daemons and their jobs live in a PID namespace of their own)"
    return ""


class Cluster:
    """A running cluster; `environment` is what its clients need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = [f"n{number}" for number in range(1, NODES + 1)]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(root / "etc" / "slurm.conf"),
        }
        self._configure()
        with open(root / "log" / "out", "w") as out:
            self._process = subprocess.Popen(
                ["unshare", "--fork", "--pid", "--kill-child=KILL", "--mount-proc", "bash", "-c", self._daemons()],
                env={**self.environment, "PATH": _path()}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.wait_for(lambda: len(self.idle()) == NODES, 30, "the nodes are idle")

    def _configure(self) -> None:
        root = self.root
        root.chmod(0o755)
        for name in ("munge", "ctl", "log", "etc", *(f"spool-{name}" for name in self.names)):
            (root / name).mkdir()
        (root / "munge").chmod(0o711)
        key = root / "munge" / "key"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(NODES + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=8000 "
            f"Gres=gpu:{GPUS}"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        values = {"host": host, "port": ports[0], "socket": root / "munge" / "socket", "root": root, "nodes": nodes}
        (root / "etc" / "slurm.conf").write_text(CONF.format(**values))
        (root / "etc" / "plugstack.conf").touch()
        for number in range(GPUS):
            os.mknod(root / f"gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (root / "etc" / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-{GPUS - 1}]\n")

    def _daemons(self) -> str:
        root, munge = self.root, self.root / "munge"
        lines = [
            f"munged --foreground --force --key-file={munge}/key --socket={munge}/socket --pid-file={munge}/pid "
            f"--log-file={root}/log/munged.log --seed-file={munge}/seed &",
            f"until munge -S {munge}/socket -n >/dev/null 2>&1; do sleep 0.05; done",
            f"slurmctld -D -i -f {root}/etc/slurm.conf &",
            *(f"slurmd -D -N {name} -f {root}/etc/slurm.conf &" for name in self.names),
            "wait",
        ]
        return "\n".join(lines)

    def close(self) -> None:
        """End everything that ever ran in the cluster."""
        for child in psutil.Process(self._process.pid).children():
            child.kill()  # the namespace's first process
        self._process.kill()
        self._process.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a client command."""
        done = subprocess.run(
            command, env={**self.environment, "PATH": _path()}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def idle(self) -> set[str]:
        """Names of the nodes that wait for work."""
        return set(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split())

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        said = self.run("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(number)["JobState"]

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """AssertionError when it does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None, f"the cluster died: {(self.root / 'log' / 'out').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.run('squeue', '-a')}"
            time.sleep(0.1)

    def wait_state(self, number: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of the states; returns it."""
        self.wait_for(lambda: self.state(number) in states, seconds, f"job {number} is {' or '.join(states)}")
        return self.state(number)

    def kill_node(self, name: str) -> None:
        """The node's daemon dies at once."""
        self._kill_daemon("slurmd", name)

    def revive_node(self, name: str) -> None:
        """Start its daemon again."""
        self._start_daemon("slurmd", "-D", "-N", name)

    def kill_controller(self) -> None:
        """The controller dies at once; jobs and nodes go on without it."""
        self._kill_daemon("slurmctld")

    def revive_controller(self) -> None:
        """Start the controller again, from the state that it saved."""
        self._start_daemon("slurmctld", "-D", "-i")

    def _kill_daemon(self, program: str, word: str = "") -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # of a job that has just ended
                line = process.cmdline()
                if line[:1] == [program] and (not word or word in line):
                    process.send_signal(signal.SIGKILL)

    def _start_daemon(self, *command: str) -> None:
        """In the cluster's namespace."""
        first = psutil.Process(self._process.pid).children()[0].pid
        subprocess.Popen(
            ["nsenter", f"--target={first}", "--pid", "--mount", *command, "-f", str(self.root / "etc" / "slurm.conf")],
            env={**self.environment, "PATH": _path()}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that run in the cluster."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def workers(self, word: str) -> list[psutil.Process]:
        """Processes of the cluster with a word in their command line, but for the daemons."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if word in " ".join(line) and line[:1] != ["bash", "-c"] and not line[0].startswith("slurm"):
                    found.append(process)
        return found

    def clear(self) -> None:
        """Cancel every job and wait until all nodes are idle."""
        self.run("scancel", "--full", "-u", "root", check=False)
        for name in set(self.names) - self.idle():
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        self.wait_for(lambda: not self.run("squeue", "-h") and len(self.idle()) == NODES, 60, "the cluster is empty")


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """A cluster for as long as the block lasts."""
    running = Cluster(root)
    try:
        yield running
    finally:
        running.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _program(name: str) -> str | None:
    return shutil.which(name, path=_path())
