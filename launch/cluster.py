"""What every place to run has in common."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ClusterConfig:
    """The group `cluster` of conf/launch.yaml; conf/cluster/ has one file a kind."""

    @property
    def world(self) -> int:
        """Processes that will run."""
        raise NotImplementedError
