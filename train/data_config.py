"""The training data of a run as configured (train/dataloader.py opens it)."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.ranges import bounded
from data.clip import Bucket
from data.loader.mixture import BatchCost, explicit_sizes


@dataclass
class DatasetConfig:
    """One dataset, or a part of it.

    path: its folder or address
    weight: its share of the samples (given for all datasets or for none; null: by size)
    thresholds: {score: [lowest, highest]} of the samples to keep; null for no limit
    takedown: file of keys to leave out, one per line
    selection: file with both, as `mova refilter` writes it, which thresholds and takedown narrow further
    """

    path: str = MISSING
    weight: float | None = bounded(None, "(0, inf)")
    thresholds: dict[str, list[float | None]] = bounded({}, "(-inf, inf)")
    takedown: str | None = None
    selection: str | None = None


@dataclass
class SegmentConfig:
    """Other data, or other captions, from a step on.

    first_step: the first step that uses them
    datasets: the data from there on; may be omitted if captioners are given: the samples then stay the same
    captioners: sources of captions, by weight (null: as before)
    """

    first_step: int = bounded(MISSING, "[0, inf)")
    datasets: list[DatasetConfig] = field(default_factory=list)
    captioners: dict[str, float] | None = bounded(None, "(0, inf)")


VERIFY = ("none", "crc", "full")


@dataclass
class StorageConfig:
    """How datasets are read. Remote data goes through a local cache that all processes of a machine share.

    cache: folder of the cache (null: in the user's cache folder)
    cache_gib: GiB that the shards in it may occupy
    verify: "crc" compares checksums, "full" also looks for NaN, "none" trusts the bytes
    timeout: seconds after which a remote read that gets no byte, or fewer than 10,000 per second, fails
        (docs/remote.md)
    """

    cache: str | None = None
    cache_gib: float = bounded(200.0, "(0, inf)")
    verify: str = "crc"
    timeout: float = bounded(60.0, "(0, 100000000]")

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ValueError(f"data.storage.verify {self.verify!r} is not one of {', '.join(VERIFY)}")


@dataclass
class DataConfig:
    """The training data and its batches. Clips of a global batch: batch_size, batch_cost or batch_sizes.

    path: the dataset's folder or address; null if `datasets` are given
    datasets: several datasets by weight, each {path, weight, thresholds, takedown, selection}
    segments: other data from later steps on, each {first_step, datasets, captioners}, in rising order of steps
    valid_path: held-out dataset (null: no validation)
    batch_size: clips of a global batch, the same in every bucket
    batch_cost: highest cost of the clips of a global batch, instead of batch_size (data.loader.mixture.BatchCost)
    attention_tokens: number of tokens above which attention costs more than the other layers, for batch_cost
    batch_multiple: batches by batch_cost are rounded down to a multiple of it
    batch_sizes: clips of a global batch by bucket, {49x44x80x403: 8} (latent frames, height, width, sound), instead of
        both
    micro_batch: clips that a rank processes at a time
    shuffle_shards: number of shards among which clips are shuffled
    captioners: sources of captions, by weight ({}: the first of each dataset)
    prefetch: number of batches that are read ahead
    reader_threads: threads that read ahead (0: none)
    ignore_encoders: allow latents of other encoders than those of the checkpoint, of the starting weights or of another
        segment
    quarantine_budget: share of damaged samples at which the run ends
    """

    path: str | None = MISSING
    datasets: list[DatasetConfig] = field(default_factory=list)
    segments: list[SegmentConfig] = field(default_factory=list)
    valid_path: str | None = None
    batch_size: int = bounded(8, "[1, inf)")
    batch_cost: float | None = bounded(None, "(0, inf)")
    attention_tokens: float = bounded(29184.0, "(0, inf)")
    batch_multiple: int = bounded(1, "[1, inf)")
    batch_sizes: dict[str, int] = bounded({}, "[1, inf)")
    micro_batch: int = bounded(1, "[1, inf)")
    shuffle_shards: int = bounded(16, "[1, inf)")
    captioners: dict[str, float] = bounded({}, "(0, inf)")
    prefetch: int = bounded(2, "[0, inf)")
    reader_threads: int = bounded(1, "[0, inf)")
    ignore_encoders: bool = False
    quarantine_budget: float = bounded(0.001, "[0, 1]")
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.path is None and not self.datasets:
            raise ValueError("data.path is null and data.datasets is empty: give one of them")
        if self.path not in (None, MISSING) and self.datasets:
            raise ValueError(
                f"data.path={self.path} and data.datasets are both given: set data.path=null to mix datasets"
            )
        if self.batch_cost is not None and self.batch_sizes:
            raise ValueError("data.batch_cost and data.batch_sizes are both given: choose one")
        steps = [0, *(segment.first_step for segment in self.segments)]
        if any(before >= after for before, after in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"data.segments begin at steps {steps[1:]}: their first steps must increase, from 1 on")
        if empty := [s.first_step for s in self.segments if not s.datasets and s.captioners is None]:
            raise ValueError(f"data.segments: the one from step {empty[0]} has neither datasets nor captioners")

    def sizes(self, buckets: list[Bucket]) -> list[int]:
        """Clips of a global batch, per bucket. DataError if a bucket has no size."""
        if self.batch_sizes:
            return explicit_sizes(buckets, self.batch_sizes)
        if self.batch_cost is not None:
            cost = BatchCost(self.batch_cost, self.attention_tokens, self.batch_multiple)
            return [cost.size(bucket) for bucket in buckets]
        return [self.batch_size] * len(buckets)
