"""SLURM's controller dies while a run crashes, on a cluster of its own, which no other test sees afterwards."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import cluster, missing
from tests.slurm.conftest import Launcher


@pytest.fixture
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A launcher before a cluster that lives for one test."""
    if reason := missing():
        pytest.fail(f"no SLURM can be started here: {reason}")
    root = tmp_path_factory.mktemp("controller")
    with cluster(root) as running:
        yield Launcher(running, data, tmp_path_factory.mktemp("alone"))


def test_a_controller_that_dies_while_a_run_crashes(alone: Launcher) -> None:
    """The job ends without anybody to ask for its state or for another attempt: it asks until there is an answer, is
    requeued, and goes on from its last checkpoint."""
    # The controller writes its state some seconds after a change; one that never knew of the start would hold the job.
    run = alone.submit("orphan", "steps=5", "cluster.setup=[sleep 12]", fake="crash-later")
    run.wait_for(lambda run: run.step() >= 1, 60, "it trains")
    alone.slurm.kill_controller()
    run.wait_for(lambda run: run.step() == 3, 30, "it crashes")
    time.sleep(10)  # in which it asks in vain
    assert not run.attempts("end") or run.attempts("end")[-1]["ended"] == "crashed"
    alone.slurm.revive_controller()
    run.wait_for(lambda run: len(run.attempts("begin")) == 2, 150, "it was requeued")
    assert run.wait("COMPLETED", "FAILED", seconds=90) == "COMPLETED", run.log()
    assert [(line["ended"], line["step"]) for line in run.attempts("end")] == [("crashed", 3), ("finished", 5)]
    starts = [line.split() for line in (run.folder / "begun").read_text().splitlines()]
    assert [int(step) for *_, step in starts] == [0, 3], "a step was lost, or done twice"
    assert len({job for _, job, _, _ in starts}) == 1
