"""The data state in a checkpoint: the sample orders followed, the next step, and the samples found damaged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypedDict

from data.batch import Batch
from data.clip import clip_seconds
from data.errors import DataError


class Quarantined(TypedDict):
    """A damaged sample, at the step at which it was consumed.

    found: "read" when its bytes were wrong, so that it had weight 0 in that step (it is looked at again in the next
    pass, when its shard may have been restored); "step" when the step itself found it: from then on it has weight 0.
    """

    key: str
    shard: str
    reason: str
    step: int
    found: str


@dataclass
class Segment:
    """From `first_step` on, the run follows the order that these arguments fix (see `data.loader.order.Order`).

    fingerprint: of the mixture of datasets (see `data.loader.mixture.Mixture`); `sources` describes it, so that a
    difference can be shown. `first_sample` is the number of samples of all earlier segments: sample numbers, and with
    them the noise, stay unique over a change of data even when the earlier dataset is gone. `order_step`: the step of
    its own order that it begins with; above 0 where it goes on in the order of the segment before, with other captions.

    captioners: share of each, as exact fractions that sum to 1 ({}: each dataset's first). texts: fingerprint of the
    text of each captioner that is read, by selection ({}: not known).
    """

    first_step: int
    fingerprint: str
    batch_sizes: list[int]
    seed: int
    window: int
    first_sample: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    order_step: int = 0
    captioners: dict[str, str] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)

    def differences(self, other: Segment) -> list[str]:
        """Lines "what: here -> there" for all that makes two segments different orders.

        What the other one does not know (an empty fingerprint, no batch sizes or texts, no or incomplete sources) is
        no difference.
        """
        lines = []
        if self.sources and other.sources and self.fingerprint != other.fingerprint:
            known = {name for source in other.sources for name in source}
            here = [{name: value for name, value in source.items() if name in known} for source in self.sources]
            lines = _source_differences(here, other.sources)
        if other.fingerprint and self.fingerprint != other.fingerprint and not lines:
            lines.append(f"fingerprint: {self.fingerprint} -> {other.fingerprint}")
        for name in ("first_step", "batch_sizes", "seed", "window", "order_step"):
            unknown = name == "batch_sizes" and not other.batch_sizes
            if getattr(self, name) != getattr(other, name) and not unknown:
                lines.append(f"{name}: {getattr(self, name)} -> {getattr(other, name)}")
        if self.captioners != other.captioners:
            lines.append(f"captioners: {_mix(self.captioners)} -> {_mix(other.captioners)}")
        else:
            lines += self.text_differences(other.texts)
        return lines

    def text_differences(self, texts: dict[str, dict[str, str]]) -> list[str]:
        """A line for each captioner whose text is another one in the same selection, where both are known."""
        lines = []
        for selection in sorted(self.texts.keys() & texts.keys()):
            before, after = self.texts[selection], texts[selection]
            lines += [
                f"text of captioner {name} in {selection[:12]}: {before.get(name, 'none')} -> {after.get(name, 'none')}"
                for name in _differing(before, after)
            ]
        return lines


@dataclass
class DataState:
    """Segments in the order of their first steps (the first from 0), the next step, and the quarantine.

    empty_captions: samples so far that no captioner of their segment had a caption for.
    """

    segments: list[Segment]
    position: int = 0
    quarantine: list[Quarantined] = field(default_factory=list)
    empty_captions: int = 0

    def __post_init__(self) -> None:
        firsts = [segment.first_step for segment in self.segments]
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in zip(firsts, firsts[1:], strict=False)):
            raise DataError(f"data segments start at steps {firsts}: they must start at 0 and ascend")
        if self.position < 0:
            raise DataError(f"the data position is {self.position}: it counts steps from 0")

    @classmethod
    def start(cls, fingerprint: str, batch_sizes: list[int], seed: int, window: int) -> DataState:
        """The state of a new run with one segment."""
        return cls([Segment(0, fingerprint, list(batch_sizes), seed, window)])

    def segment(self, step: int | None = None) -> Segment:
        """The segment of `step` (default: of the position)."""
        step = self.position if step is None else step
        return [segment for segment in self.segments if segment.first_step <= step][-1]

    def check(self, fingerprint: str, step: int | None = None, sources: list[dict[str, Any]] | None = None) -> None:
        """DataError when data with this fingerprint is not what `step` (default: position) needs.

        sources: the description of that data, to show the difference.
        """
        segment = self.segment(step)
        if segment.fingerprint == fingerprint:
            return
        lines = _source_differences(segment.sources, sources or [])
        raise DataError(
            f"this is not the dataset of this run: its fingerprint is {fingerprint}, the run follows "
            f"{segment.fingerprint} since step {segment.first_step}. Point the run at the dataset that it started "
            f"with, request the change as a new segment (data.segments, from step {self.position} on or later), or "
            "start a new run on this one" + "".join(f"\n  {line}" for line in lines)
        )

    def check_texts(self, texts: dict[str, dict[str, str]], step: int | None = None) -> None:
        """DataError when these text fingerprints, by selection, are not those that `step` (default: position) needs."""
        segment = self.segment(step)
        if lines := segment.text_differences(texts):
            raise DataError(
                f"the captions are not those that the run follows since step {segment.first_step}. Restore them, or "
                f"request the change as a new segment (data.segments, from step {self.position} on or later)"
                + "".join(f"\n  {line}" for line in lines)
            )

    def follow(self, planned: list[Segment]) -> None:
        """Go on by these segments from the position on; what lies before it must be what the run has done.

        Segments that ended before the position may come without a fingerprint (""), because their data need not be
        there any more; they are compared by what is given of them. What was recorded stays, with its `first_sample`;
        in new segments that must be right. DataError, which shows the difference, where the past would become another
        one.
        """
        DataState(planned)  # starts at 0 and ascends
        past = [segment for segment in self.segments if segment.first_step < self.position]
        if not past:  # a new run
            self.segments = list(planned)
            return
        lines = []
        for number, segment in enumerate(past):
            if number >= len(planned):
                lines.append(f"segment {number}, from step {segment.first_step}: recorded, and now missing")
                continue
            there = planned[number]
            lines += [f"segment {number}, {line}" for line in segment.differences(there)]
        for there in planned[len(past) :]:
            if there.first_step < self.position:
                lines.append(f"a segment from step {there.first_step}, which lies before {self.position}: new")
        if lines:
            raise DataError(
                f"the data of the past {self.position} steps can't be changed (recorded -> now):\n"
                + "\n".join(f"  {line}" for line in lines)
                + f"\nUndo it, or ask for it as a new segment (data.segments) from step {self.position} on or later"
            )
        for segment, there in zip(past, planned, strict=False):
            segment.texts = segment.texts or there.texts  # of a run that did not record them: from now on
        later = planned[len(past) :]
        self.segments = past + later

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
    def from_json(cls, saved: dict[str, Any], captioner: str | None = None) -> DataState:
        """The inverse of `to_json`; DataError when the saved state does not fit this version.

        captioner: the only one that was read, where the state was saved before segments recorded their captioners.
        """
        mix = {} if captioner is None else {captioner: "1"}
        try:
            return cls(
                segments=[Segment(**({"captioners": mix} | segment)) for segment in saved["segments"]],
                position=int(saved["position"]),
                empty_captions=int(saved.get("empty_captions", 0)),
                quarantine=[
                    Quarantined(
                        key=e["key"],
                        shard=e["shard"],
                        reason=e["reason"],
                        step=int(e["step"]),
                        found=e.get("found", "read"),
                    )
                    for e in saved["quarantine"]
                ],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the saved data state cannot be read ({error!r}): {saved}") from error


def _mix(captioners: dict[str, str]) -> str:
    return ", ".join(f"{name} {share}" for name, share in captioners.items()) or "each dataset's first"


def _source_differences(recorded: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Lines "source n, what: recorded -> now". Sources are matched by what they share; listing order doesn't count."""
    left, lines = list(now), []
    for number, before in enumerate(recorded):
        # The likeliest counterpart: the one with the fewest fields that differ.
        after = min(left, key=lambda other: len(_differing(before, other)), default=None)
        if after is None:
            lines.append(f"source {number}, {before}: recorded, and now missing")
            continue
        left.remove(after)
        lines += [
            f"source {number}, {name}: {before.get(name)} -> {after.get(name)}" for name in _differing(before, after)
        ]
    if recorded:
        lines += [f"a source that was not recorded: {after}" for after in left]
    return lines


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


class Seen(NamedTuple):
    """How much a run has trained on so far. Belongs to the checkpoint."""

    samples: int = 0
    seconds: float = 0.0  # of clips

    def after(self, batch: Batch) -> Seen:
        """With the global batch of which `batch` is a part."""
        count = round(batch.total_weight)
        return Seen(self.samples + count, self.seconds + count * clip_seconds(batch.bucket))
