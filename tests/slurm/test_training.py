"""Real training on two nodes of a real SLURM."""

from tests.slurm.conftest import Launcher


def test_two_nodes_train_together(launcher: Launcher) -> None:
    run = launcher.submit("two", "cluster.nodes=2", "cluster.processes=2", "steps=6", "checkpoint.every=3")
    state = run.wait("COMPLETED", "FAILED", seconds=120)
    assert state == "COMPLETED", run.log()
    assert run.status()["state"] == "finished" and run.step() == 6
    assert sorted(run.losses()) == list(range(6))
