"""What a checkpoint holds of the data: the orders that are followed, the next step, and the samples found damaged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from data.errors import DataError


class Quarantined(TypedDict):
    """A damaged sample, at the step at which it was consumed with weight 0."""

    key: str
    shard: str
    reason: str
    step: int


@dataclass
class Segment:
    """From `first_step` on, the run follows the order that these arguments fix (see `data.order.Order`).

    `first_sample` is the number of samples of all earlier segments: sample numbers, and with them the noise, stay
    unique over a change of data even when the earlier dataset is gone.
    """

    first_step: int
    fingerprint: str
    batch_sizes: list[int]
    seed: int
    window: int
    first_sample: int = 0


@dataclass
class DataState:
    """Segments in the order of their first steps (the first from 0), the next step, and the quarantine."""

    segments: list[Segment]
    position: int = 0
    quarantine: list[Quarantined] = field(default_factory=list)

    def __post_init__(self) -> None:
        firsts = [segment.first_step for segment in self.segments]
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in zip(firsts, firsts[1:], strict=False)):
            raise DataError(f"data segments start at steps {firsts}: they must start at 0 and ascend")
        if self.position < 0:
            raise DataError(f"the data position is {self.position}: it counts steps from 0")

    @classmethod
    def start(cls, fingerprint: str, batch_sizes: list[int], seed: int, window: int) -> DataState:
        """The state of a new run."""
        return cls([Segment(0, fingerprint, list(batch_sizes), seed, window)])

    def segment(self, step: int | None = None) -> Segment:
        """The segment of `step` (default: of the position)."""
        step = self.position if step is None else step
        return [segment for segment in self.segments if segment.first_step <= step][-1]

    def check(self, fingerprint: str, step: int | None = None) -> None:
        """DataError when the dataset with this fingerprint is not the one that `step` (default: position) needs."""
        segment = self.segment(step)
        if segment.fingerprint != fingerprint:
            raise DataError(
                f"the dataset is not the one of this run: its fingerprint is {fingerprint}, the run follows "
                f"{segment.fingerprint} since step {segment.first_step}. Point the run at the dataset that it started "
                "with, or start a new run on this one"
            )

    def absorb(self, quarantine: list[Quarantined]) -> None:
        """Add what other ranks found (each sees only its own samples); a known entry is not added twice."""
        known = {(entry["step"], entry["key"]) for entry in self.quarantine}
        for entry in quarantine:
            if (entry["step"], entry["key"]) not in known:
                known.add((entry["step"], entry["key"]))
                self.quarantine.append(entry)
        self.quarantine.sort(key=lambda entry: (entry["step"], entry["key"]))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and integers."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> DataState:
        """The inverse of `to_json`; DataError when the saved state does not fit this version."""
        try:
            return cls(
                segments=[Segment(**segment) for segment in saved["segments"]],
                position=int(saved["position"]),
                quarantine=[
                    Quarantined(key=e["key"], shard=e["shard"], reason=e["reason"], step=int(e["step"]))
                    for e in saved["quarantine"]
                ],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the saved data state cannot be read ({error!r}): {saved}") from error
