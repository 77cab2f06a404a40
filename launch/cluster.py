"""Settings that all kinds of clusters share."""

from __future__ import annotations

from dataclasses import dataclass

from core.ranges import bounded

ALLOCATOR = "expandable_segments:True"  # of PyTorch on GPUs, where the user names nothing else


@dataclass
class ClusterConfig:
    """Where processes run. conf/cluster/ has one file for each kind of cluster.

    disk_wait_hours: how long a run waits while its folder cannot be written (disk full, quota, read-only, moved or not
        mounted) before it is given up
    disk_pause_minutes: the shortest and the longest pause between two checks of that folder
    """

    disk_wait_hours: float = bounded(24.0, "[0, 100000]")
    disk_pause_minutes: list[float] = bounded([1.0, 30.0], "(0, 1000000]")

    def __post_init__(self) -> None:
        pauses = list(self.disk_pause_minutes)
        if len(pauses) != 2 or pauses[0] > pauses[1]:
            raise ValueError(
                f"cluster.disk_pause_minutes is {pauses}; give the shortest and the longest one, as [1,30]"
            )

    @property
    def world(self) -> int:
        """Number of processes."""
        raise NotImplementedError

    @property
    def on_gpus(self) -> bool:
        """Whether each of them has a GPU."""
        raise NotImplementedError
