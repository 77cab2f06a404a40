"""Checks every node of a job before training: disk, torch, devices, their speed, the run's input files, and a small
all-reduce over all nodes.

    srun --ntasks-per-node=1 python -m launch.slurm.preflight examine runs/try1 --job 12 --restart 0 ...   (on every
    node) python -m launch.slurm.preflight judge runs/try1 --job 12 --restart 0 n1 n2 ...                         (once)

Each node writes logs/preflight-<job>-<restart>/<node>.json. A node without a report, or with a problem, is
bad; it is added to `excluded_nodes` in the run's folder, which later jobs of the run avoid.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from core.durable import write_atomically
from core.errors import EXIT_FAILED, EXIT_RETRY, RunError, end_process, restarted
from core.ranges import bounded
from core.run_dir import RunDir
from launch.slurm.inputs import missing_inputs
from launch.slurm.memory import memory_shortage
from train.parallel.descriptors import descriptors_needed, most_descriptors

NO_BLAME = 4
PROBE_BYTES = 1 << 20
REDUCED = 1 << 24  # float32 numbers of the timed all-reduce: 64 MiB


@dataclass
class PreflightConfig:
    """Checks of every node before training. A limit of 0 is not measured.

    enabled: whether nodes are checked
    seconds: a node that has not answered after this time is bad
    free_gib: minimum free space in the run's folder
    matmul_tflops: minimum rate of every GPU in bfloat16 (of the CPU, float32, without GPUs)
    bandwidth_gbs: minimum bandwidth of an all-reduce between the nodes, GB/s
    max_excluded: maximum number of nodes that a run may exclude
    """

    enabled: bool = True
    seconds: float = bounded(300.0, "(0, 100000000]")
    free_gib: float = bounded(1.0, "[0, inf)")
    matmul_tflops: float = bounded(0.0, "[0, inf)")
    bandwidth_gbs: float = bounded(0.0, "[0, inf)")
    max_excluded: int = bounded(8, "[0, inf)")

    def arguments(self, gpus: int, world: int) -> list[str]:
        """For `examine`."""
        names = ("seconds", "free_gib", "matmul_tflops", "bandwidth_gbs")
        return [
            f"--gpus={gpus}",
            f"--world={world}",
            *(f"--{name.replace('_', '-')}={getattr(self, name):g}" for name in names),
        ]


def reports(run: RunDir, job: str, restart: int) -> Path:
    """Folder of the nodes' reports."""
    return run.logs / f"preflight-{job}-{restart}"


def examine(config: PreflightConfig, gpus: int, world: int, folder: Path) -> list[str]:
    """The problems of this node alone, as text. `world`: ranks of the run."""
    problems = []
    if (most := most_descriptors()) < (needed := descriptors_needed(world)):
        problems.append(
            f"a process may open {most} files (ulimit -Hn), a rank of a run of {world} needs up to {needed}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.environ.get('SLURMD_NODENAME', os.getpid())}"
        with open(probe, "wb") as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        free = shutil.disk_usage(folder).free / 2**30
        if free < config.free_gib:
            problems.append(f"{folder} has {free:.1f} GiB free, less than cluster.preflight.free_gib={config.free_gib}")
    except OSError as error:
        problems.append(f"cannot write to {folder}: {error.strerror}")
    try:
        import torch
    except Exception as error:
        return [*problems, f"torch cannot be imported: {error}"]
    if gpus and torch.cuda.device_count() != gpus:
        return [*problems, f"the node has {torch.cuda.device_count()} GPUs, cluster.gpus={gpus}"]
    if config.matmul_tflops:
        for device in [f"cuda:{number}" for number in range(gpus)] or ["cpu"]:
            try:
                rate = matmul_rate(device) / 1e12
            except RuntimeError as error:
                problems.append(f"{device} fails to compute: {str(error).splitlines()[0]}")
                continue
            if rate < config.matmul_tflops:
                problems.append(
                    f"{device} multiplies at {rate:.3g} TFLOP/s, less than "
                    f"cluster.preflight.matmul_tflops={config.matmul_tflops:g}"
                )
    return problems


def matmul_rate(device: str) -> float:
    """Best FLOP/s of a matrix product on a device, in bfloat16 on a GPU, in float32 on a CPU."""
    import torch

    on_gpu = device != "cpu"
    size = 8192 if on_gpu else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def reduce_together(config: PreflightConfig, healthy: bool, deadline: float) -> str:
    """One all-reduce over all nodes. Returns "ok", or what failed; "skipped" if a node has a problem of its own.

    deadline: of time.monotonic().
    """
    import torch
    import torch.distributed as dist

    from launch.slurm.task import open_store, set_ranks

    environment = dict(os.environ)
    set_ranks(environment)
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    os.environ.update({name: value for name, value in environment.items() if name.endswith("_SOCKET_IFNAME")})

    def left() -> timedelta:
        return timedelta(seconds=max(1.0, deadline - time.monotonic()))

    try:
        held = open_store(address, port) if rank == 0 else None
        store = dist.TCPStore(address, port, world, is_master=False, timeout=left())
        store.set(f"node/{rank}", str(int(healthy)))
        names = [f"node/{number}" for number in range(world)]
        store.wait(names, left())
        if any(store.get(name) != b"1" for name in names):
            verdict = "skipped"
        else:
            device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("reduce", store), rank=rank,
                world_size=world, timeout=left(),
            )  # fmt: skip
            verdict = _reduce(config, device, world)
            dist.destroy_process_group()
        store.set(f"left/{rank}", "1")
        if rank == 0:
            store.wait([f"left/{number}" for number in range(world)], left())
        del held
        return verdict
    except (RuntimeError, RunError) as error:
        return f"failed: {str(error).splitlines()[0]}"


def _reduce(config: PreflightConfig, device: Any, world: int) -> str:
    import torch
    import torch.distributed as dist

    ones = torch.ones(REDUCED if config.bandwidth_gbs else 1024, device=device)
    dist.all_reduce(ones)
    if ones[0].item() != world or ones[-1].item() != world:
        return f"failed: {world} ones summed to {ones[0].item()}"
    if not config.bandwidth_gbs or world == 1:
        return "ok"
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        dist.all_reduce(ones)
        ones[0].item()
        best = min(best, time.perf_counter() - begin)
    rate = 2 * (world - 1) / world * ones.numel() * 4 / best / 1e9
    if rate < config.bandwidth_gbs:
        return f"failed: {rate:.3g} GB/s, less than cluster.preflight.bandwidth_gbs={config.bandwidth_gbs:g}"
    return "ok"


def look(config: PreflightConfig, run: RunDir, job: str, restart: int, gpus: int, world: int) -> int:
    """Run all checks of this node and write its report. Returns the exit status."""
    began = time.monotonic()
    node = os.environ["SLURMD_NODENAME"]
    folder = reports(run, job, restart)
    problems = examine(config, gpus, world, folder)
    missing: list[str] = []
    with contextlib.suppress(ImportError):  # of torch, which is among the problems then
        missing = missing_inputs(run)
        problems += memory_shortage(run, gpus) if gpus else []
    problems += missing
    report: dict[str, Any] = {"node": node, "problems": problems, "missing": missing, "together": "not reached"}
    with contextlib.suppress(OSError):  # then its problem is that it cannot write: the log tells
        _write(folder, report)
    # A bad node takes part too, to tell the others that they need not wait.
    report["together"] = reduce_together(config, not problems, began + 0.8 * config.seconds)
    with contextlib.suppress(OSError):
        _write(folder, report)
    words = "; ".join(report["problems"]) or "no problem of its own"
    print(f"node {node}: {words}; all nodes together: {report['together']} ({time.monotonic() - began:.1f} s)")
    return int(bool(report["problems"]) or report["together"] != "ok")


def judge(run: RunDir, job: str, restart: int, nodes: list[str], exclude: str, most: int) -> int:
    """Find the bad nodes, after `look` failed on one of them. Adds them to `excluded_nodes`, prints all that a job must
    avoid, and returns 0; or NO_BLAME if no node is to blame, with the reason in status.json."""
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        try:
            found[node] = json.loads((reports(run, job, restart) / f"{node}.json").read_text())
        except (OSError, ValueError):
            found[node] = {"problems": [_last_words(run, job, node)], "together": ""}
    bad = {node: "; ".join(report["problems"]) for node, report in found.items() if report["problems"]}
    path = run.root / "excluded_nodes"
    earlier = path.read_text().split() if path.exists() else []
    reason, status = "", EXIT_RETRY
    if not bad:
        reason = "; ".join(
            f"{node}: {report['together']}" for node, report in found.items() if report["together"] != "ok"
        )
        reason = f"the all-reduce over all nodes fails ({reason})"
    elif len(bad) == len(nodes) > 1:
        reason = f"all nodes fail, so none is to blame: {next(iter(bad.values()))}"
        if not restarted() and all(report.get("missing") for report in found.values()):
            status = EXIT_FAILED  # as when somebody names data that is not there
    elif len(earlier) + len(bad) > most:
        reason = f"{len(earlier)} nodes are already excluded (cluster.preflight.max_excluded={most}), and {bad} fail"
    if reason:
        print(f"preflight: {reason}", file=sys.stderr)
        run.write_status("failed", error=f"preflight: {reason}", exit_status=status, step=run.committed_step())
        return NO_BLAME
    for node, problem in bad.items():
        print(f"preflight: node {node} is excluded: {problem}", file=sys.stderr)
    listed = [*earlier, *(node for node in bad if node not in earlier)]
    write_atomically(path, "\n".join(listed) + "\n")
    print(",".join(filter(None, [exclude, *listed])))
    return 0


def _last_words(run: RunDir, job: str, node: str) -> str:
    """The output of a node that could not write a report."""
    log = run.logs / f"{job}-preflight.out"
    for line in log.read_text().splitlines()[::-1] if log.exists() else ():
        if line.startswith(f"node {node}: "):
            return line.removeprefix(f"node {node}: ").partition("; all nodes together")[0]
    return "it did not answer in time"


def _write(folder: Path, report: dict[str, Any]) -> None:
    write_atomically(folder / f"{report['node']}.json", json.dumps(report) + "\n")


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.preflight", description="Called by submit.sh.")
    parser.add_argument("what", choices=("examine", "judge"))
    parser.add_argument("run", type=Path)
    parser.add_argument("nodes", nargs="*")
    parser.add_argument("--job", required=True)
    parser.add_argument("--restart", type=int, required=True)
    parser.add_argument("--exclude", default="")
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    for name in ("seconds", "free-gib", "matmul-tflops", "bandwidth-gbs"):
        parser.add_argument(f"--{name}", type=float, default=60.0 if name == "seconds" else 0.0)
    given = parser.parse_intermixed_args(arguments)
    run = RunDir(given.run)
    if given.what == "judge":
        return judge(run, given.job, given.restart, given.nodes, given.exclude, given.most)
    config = PreflightConfig(True, given.seconds, given.free_gib, given.matmul_tflops, given.bandwidth_gbs)
    return look(config, run, given.job, given.restart, given.gpus, given.world)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
