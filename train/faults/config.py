"""Configuration of fault handling, for bad steps and for ranks that hang or lag: the keys `guard.*`."""

from __future__ import annotations

from dataclasses import dataclass

from core.ranges import bounded


@dataclass
class GuardConfig:
    """Handling of bad steps, and of ranks that hang or are slow.

    max_nonfinite: consecutive non-finite steps after which the run ends; none of them is applied
    rewind: instead return to the last checkpoint before them, and continue with the batches after them
    max_rewinds: maximum number of rewinds
    spike_factor: a spike is this many robust deviations above the median of the last steps of its kind (0: no
        detection); steps of the warm-up neither are spikes nor count in the median
    spike_window: number of steps in the median
    skip_spikes: suppress the update of a gradient that is a spike (FSDP2 only)
    timeout_minutes: time after which a collective gives up on its peers
    watchdog_seconds: after this time without a step every rank writes its stacks (logs/stacks-rank*.txt), and ends
        timeout_minutes later
    startup_minutes: the same before the first step
    straggler_every: steps between comparisons of the ranks' speed (0: never)
    straggler_ratio: ranks this many times slower than the median are reported
    stop_margin: how many seconds before a known time limit the run begins to stop, in addition to the time of a save
        and a few steps
    gc_every: steps between two collections of Python's garbage, on all ranks at once (0: whenever Python decides;
        train/faults/garbage.py)
    """

    max_nonfinite: int = bounded(10, "[1, inf)")
    rewind: bool = False
    max_rewinds: int = bounded(3, "[0, inf)")
    spike_factor: float = bounded(20.0, "[0, inf)")
    spike_window: int = bounded(200, "[1, inf)")
    skip_spikes: bool = False
    timeout_minutes: float = bounded(10.0, "(0, 1000000]")
    watchdog_seconds: float = bounded(300.0, "(0, 100000000]")
    startup_minutes: float = bounded(60.0, "(0, 1000000]")
    straggler_every: int = bounded(200, "[0, inf)")
    straggler_ratio: float = bounded(1.5, "(1, inf)")
    stop_margin: float = bounded(60.0, "[0, inf)")
    gc_every: int = bounded(100, "[0, inf)")

    def __post_init__(self) -> None:
        if self.skip_spikes and self.spike_factor == 0:
            raise ValueError("guard.skip_spikes needs guard.spike_factor above 0")
