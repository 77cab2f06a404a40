"""Nodes that are looked at before training: a bad one is named, excluded and replaced."""

import json
import shlex
from pathlib import Path

from tests.slurm.conftest import FAKE, Launcher, Run

ON = ["cluster.preflight.enabled=true", "cluster.preflight.free_gib=0", "cluster.preflight.seconds=100"]


def bad_node(folder: Path, name: str, what: str) -> str:
    """A container whose preflight does `what` on one node, and which is otherwise the fake trainer."""
    script = folder / "container.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        f'case " $* " in *" examine "*) if [ "$SLURMD_NODENAME" = {name} ]; then {what}; fi;; esac\n'
        f'exec {shlex.quote(str(FAKE))} "$@"\n'
    )
    script.chmod(0o755)
    return f"cluster.container=[{script}]"


def reports(run: Run, job: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in run.folder.glob(f"logs/preflight-{job}-0/*.json")}


def test_a_bad_node_is_named_and_replaced(launcher: Launcher) -> None:
    """One of two nodes cannot write to its disk: the run goes on without it, as another job, and the job that waits for
    the first one waits for the other instead."""
    container = bad_node(launcher.folder, "n2", "ulimit -f 0")
    run = launcher.submit("replaced", *ON, "cluster.nodes=2", "steps=3", container, fake="train")
    behind = launcher.slurm.run(
        "sbatch", "--parsable", f"--dependency=afterok:{run.job}", "--kill-on-invalid-dep=yes", "--output=/dev/null",
        "--wrap=true",
    )  # fmt: skip
    run.wait_for(lambda run: run.attempts("replaced"), 120, "a bad node is found")
    (replaced,) = run.attempts("replaced")
    assert replaced["nodes"] == ["n2"] and (run.folder / "excluded_nodes").read_text() == "n2\n"
    assert "node n2 is excluded: cannot write to" in run.log()
    (other,) = replaced["jobs"]
    run.wait_for(lambda _: f":{other}" in launcher.slurm.job(behind)["Dependency"], 20, "it waits for the other job")
    assert run.wait("COMPLETED", "FAILED", seconds=120, job=other) == "COMPLETED", run.log()
    nodes = launcher.slurm.run("scontrol", "show", "hostnames", launcher.slurm.job(other)["NodeList"]).split()
    assert len(nodes) == 2 and "n2" not in nodes
    assert {name: report["together"] for name, report in reports(run, other).items()} == dict.fromkeys(nodes, "ok")
    assert run.status()["state"] == "finished"
    assert launcher.slurm.wait_state(behind, "COMPLETED", "CANCELLED") == "COMPLETED"


def test_a_fault_of_all_nodes_excludes_none(launcher: Launcher) -> None:
    """More GPUs are said to be there than torch sees, on both nodes: the job tries again, and is given up."""
    run = launcher.submit(
        "all", *ON, "cluster.nodes=2", "cluster.gpus=2", "cluster.max_failed_restarts=1", "steps=3", fake="train"
    )
    assert run.wait("FAILED", seconds=120) == "FAILED"
    assert "all nodes fail, so none is to blame: the node has 0 GPUs, cluster.gpus=2" in run.status()["error"]
    assert not (run.folder / "excluded_nodes").exists() and not run.attempts("replaced")


def test_a_node_without_the_data_is_replaced(launcher: Launcher) -> None:
    """The folder of the dataset is empty on one node, as where a mount is missing."""
    hidden = 'mount -t tmpfs none "$0" && exec "$@"'
    what = f'exec unshare --mount bash -c {shlex.quote(hidden)} {shlex.quote(str(launcher.data))} {FAKE} "$@"'
    container = bad_node(launcher.folder, "n2", what)
    run = launcher.submit("unmounted", *ON, "cluster.nodes=2", "steps=3", container, fake="train")
    run.wait_for(lambda run: run.attempts("replaced"), 120, "the node is found")
    assert (run.folder / "excluded_nodes").read_text() == "n2\n"
    assert f"node n2 is excluded: {launcher.data} has no index" in run.log()
    (other,) = run.attempts("replaced")[0]["jobs"]
    assert run.wait("COMPLETED", "FAILED", seconds=120, job=other) == "COMPLETED", run.log()


def test_a_node_that_does_not_answer(launcher: Launcher) -> None:
    container = bad_node(launcher.folder, "n1", "sleep 1000")
    run = launcher.submit(
        "hung", *ON, "cluster.preflight.seconds=25", "cluster.nodes=2", "steps=3", container, fake="train"
    )
    run.wait_for(lambda run: run.attempts("replaced"), 120, "the hung node is found")
    assert (run.folder / "excluded_nodes").read_text() == "n1\n"
    assert "node n1 is excluded: it did not answer in time" in run.log()
    launcher.slurm.run("scancel", *run.attempts("replaced")[0]["jobs"])
