"""One task of a SLURM step as one rank: `srun python -m launch.slurm.task run.id=x` is `mova train run.id=x` with the
variables of torch set from SLURM's.

Rank 0 holds the store in which the ranks meet. Within one node it listens on the loopback only; with several it must be
reached from them and listens on the address that SLURM knows the first node by (MASTER_ADDR of the batch script).
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
import time

from torch.distributed import TCPStore

from core.errors import EXIT_RETRY, RunError
from launch.rendezvous import LOOPBACK, bind, hold_store
from launch.snapshot import check_runs_from
from launch.worker import follow_parent
from train.faults.garbage import importing


def set_ranks(environment: dict[str, str]) -> None:
    """Fill in torch's variables from SLURM's, in place."""
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(int(environment["SLURM_NTASKS"]) // int(environment["SLURM_NNODES"]))
    if environment["SLURM_NNODES"] == "1":
        environment["MASTER_ADDR"] = LOOPBACK
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # ranks join a store and open none
    environment["TORCHELASTIC_RESTART_COUNT"] = environment.get("SLURM_RESTART_COUNT", "0")


def open_store(address: str, port: int) -> TCPStore:
    """The store of the run, in this process. RunError when the port is taken."""
    try:
        listener = bind(address, port)
    except OSError as error:
        raise RunError(f"rank 0 cannot listen on {address}:{port}: {error.strerror}", retry=True) from None
    return hold_store(listener, address)


def main() -> None:
    """The program: never returns an exit status other than that of training."""
    follow_parent(os.getppid())
    environment: dict[str, str] = dict(os.environ)
    set_ranks(environment)
    os.environ.update(environment)
    rank, restart = environment["RANK"], environment["TORCHELASTIC_RESTART_COUNT"]
    print(
        f"== rank {rank} of {environment['WORLD_SIZE']} on {environment.get('SLURMD_NODENAME', socket.gethostname())}, "
        f"job {environment['SLURM_JOB_ID']}, restart {restart}, {time.strftime('%Y-%m-%d %H:%M:%S')}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    try:
        check_runs_from(environment["MOVA_CODE"])
        store = None
        if rank == "0":
            store = open_store(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_RETRY if error.retry else 1)
    with importing():
        importlib.import_module("train.loop")
    runpy.run_module("train", run_name="__main__", alter_sys=True)
    del store  # it lives as long as the training


if __name__ == "__main__":
    main()
