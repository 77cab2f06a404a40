"""From dataset folders to the stream of a rank: selections, mixtures, segments, and the draws made off the training
thread. docs/data-order.md states what the order of samples depends on.

    data.path=shards/train                                             # one dataset
    data.path=null 'data.datasets=[{path: shards/speech, weight: 0.7, thresholds: {dnsmos: [2.5, null]}}, ...]'
    'data.segments=[{first_step: 20000, datasets: [{path: shards/fine}]}]'     # other data from that step on
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from omegaconf import MISSING

from data.batch import Batch
from data.clip import Bucket
from data.errors import DataError
from data.index import DatasetIndex
from data.mixture import BatchCost, Mixture, explicit_sizes
from data.selection import Rule, Selection, read_takedown
from data.share import GroupShare
from data.state import DataState, Segment
from data.stream import Stream
from train.errors import RunError
from train.mesh import Layout
from train.noise import draw
from train.objective import Draws, Objective
from train.workload import Workload

P = TypeVar("P", Batch, Draws)


@dataclass
class DatasetConfig:
    """One dataset, or a part of it. `weight`: its share of the samples (of all datasets or of none; null: by size).

    `thresholds`: {score: [lowest, highest]}, null for no limit; `takedown`: file of keys that are left out, one a line;
    `selection`: file with both, as data.refilter writes it, which `thresholds` and `takedown` narrow further.
    """

    path: str = MISSING
    weight: float | None = None
    thresholds: dict[str, list[float | None]] = field(default_factory=dict)
    takedown: str | None = None
    selection: str | None = None


@dataclass
class SegmentConfig:
    """Other data from a step on. `first_step`: the first step that takes them."""

    first_step: int = MISSING
    datasets: list[DatasetConfig] = field(default_factory=list)


VERIFY = ("none", "crc", "full")


@dataclass
class PlacesConfig:
    """How datasets are read; what is remote comes through a local cache that all processes of a machine share.

    `cache`: its folder (null: in the user's cache folder), `cache_gib`: what the shards in it may take. `verify`: "crc"
    compares checksums, "full" also looks for NaN, "none" trusts the bytes. `timeout`: seconds without a byte after
    which a remote read has failed.
    """

    cache: str | None = None
    cache_gib: float = 200.0
    verify: str = "crc"
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ValueError(f"data.places.verify {self.verify!r} is not one of {', '.join(VERIFY)}")
        if self.cache_gib <= 0 or self.timeout <= 0:
            raise ValueError("data.places.cache_gib and data.places.timeout must be above 0")


@dataclass
class DataConfig:
    """What is trained on: `path` (one dataset) or `datasets`; `segments`: what follows later, in rising order of steps.

    Clips of a global batch: `batch_size` in every bucket; or what costs at most `batch_cost` (see
    data.mixture.BatchCost, with `attention_tokens`, rounded down to a `batch_multiple`); or `batch_sizes`, by bucket
    ("49x44x80x403": latent frames, height, width, sound). `micro_batch`: clips a rank takes at a time. `window`: shards
    among which clips are shuffled; `valid_path`: held-out dataset (null: no validation). `workers`: threads that read
    ahead (0: none).
    """

    path: str | None = MISSING
    datasets: list[DatasetConfig] = field(default_factory=list)
    segments: list[SegmentConfig] = field(default_factory=list)
    valid_path: str | None = None
    batch_size: int = 8
    batch_cost: float | None = None
    attention_tokens: float = 29184.0
    batch_multiple: int = 1
    batch_sizes: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 1
    window: int = 16
    captioner: str | None = None
    prefetch: int = 2
    workers: int = 1
    quarantine_budget: float = 0.001
    places: PlacesConfig = field(default_factory=PlacesConfig)

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
            raise ValueError(f"data.segments begin at steps {steps[1:]}: their first steps must rise, from 1 on")
        if empty := [segment.first_step for segment in self.segments if not segment.datasets]:
            raise ValueError(f"data.segments: the one from step {empty[0]} has no datasets")

    def sizes(self, buckets: list[Bucket]) -> list[int]:
        """Clips of a global batch, per bucket. DataError where a bucket has no size."""
        if self.batch_sizes:
            return explicit_sizes(buckets, self.batch_sizes)
        if self.batch_cost is not None:
            cost = BatchCost(self.batch_cost, self.attention_tokens, self.batch_multiple)
            return [cost.size(bucket) for bucket in buckets]
        return [self.batch_size] * len(buckets)


@dataclass
class Prepared:
    """One micro-batch with what chance decided for it."""

    batch: Batch
    draws: Draws

    def page_locked(self, device: torch.device) -> Prepared:
        """The same, for a GPU in page-locked memory: copies from any other may make the host wait for the device."""
        if device.type != "cuda":
            return self
        with torch.cuda.device(device):  # a thread begins on the first one, whatever the rank's is
            return Prepared(_page_locked(self.batch), _page_locked(self.draws))


@dataclass(frozen=True)
class Part:
    """A segment as the config states it, opened where that was possible."""

    first_step: int
    mixture: Mixture | None
    error: DataError | RunError | None  # why it could not be opened
    stated: list[dict[str, Any]]  # what the config alone says of its datasets (empty where a file of it is gone)


def open_dataset(path: str, text_dim: int, places: PlacesConfig) -> DatasetIndex:
    """Open a dataset for a model. RunError when its text embeddings have another width than the model reads."""
    index = DatasetIndex.open(
        path if _is_address(path) else Path(path),
        cache=places.cache,
        cache_bytes=round(places.cache_gib * 2**30),
        verify=cast(Literal["none", "crc", "full"], places.verify),
        timeout=places.timeout,
    )
    if index.text_dim != text_dim:
        raise RunError(
            f"dataset {path} has text embeddings of width {index.text_dim}, the model reads {text_dim}; "
            f"prepare the data with text_dim={text_dim} or choose a model with text_dim {index.text_dim}"
        )
    return index


def open_data(config: DataConfig, text_dim: int) -> list[Part]:
    """Open all segments of the config for a model.

    Raises DataError or RunError when the last one can't be opened. The errors of earlier ones wait: a run that is past
    them does not need their data any more.
    """
    datasets = config.datasets or [DatasetConfig(path=str(config.path))]
    stages = [SegmentConfig(0, datasets), *config.segments]
    parts = [_open_part(stage, text_dim, config.places) for stage in stages]
    if parts[-1].error is not None:
        raise parts[-1].error
    return parts


def close_data(parts: list[Part]) -> None:
    """Close the files that are held open."""
    for part in parts:
        for selection in part.mixture.selections if part.mixture is not None else []:
            selection.index.close()


def describe_data(parts: list[Part]) -> str:
    """One line for the log: folders (with their shares), and the steps from which they serve."""
    lines = []
    for part in parts:
        if part.mixture is None:
            lines.append(f"from step {part.first_step} what is not there any more")
            continue
        shares = zip(part.mixture.selections, part.mixture.weights, strict=True)
        named = " + ".join(f"{s.index.root}" + (f" ({float(w):.1%})" if w != 1 else "") for s, w in shares)
        lines.append(f"from step {part.first_step} {named}" if len(parts) > 1 else named)
    return "; ".join(lines)


def epoch_samples(parts: list[Part]) -> int:
    """Samples of one pass through all that the last segment of the data selects."""
    mixture = parts[-1].mixture
    assert mixture is not None
    return sum(selection.samples for selection in mixture.selections)


def largest_workload(parts: list[Part], config: DataConfig, layout: Layout) -> Workload:
    """The workload of the bucket with the most video in any segment of the data, at this config's batch sizes."""
    found: list[Workload] = []
    for part in parts:
        if part.mixture is None:
            continue
        buckets = part.mixture.buckets
        for bucket, size in zip(buckets, config.sizes(buckets), strict=True):
            slots = -(-size // layout.dp_world)  # clips of this rank in a step
            clips = min(config.micro_batch, slots)
            grid = (bucket.frames, bucket.height, bucket.width)
            found.append(Workload(clips, grid, bucket.audio_steps, -(-slots // clips)))
    return max(found, key=lambda w: (w.clips * math.prod(w.grid), w.micro_batches))


def start_state(parts: list[Part], config: DataConfig, seed: int) -> DataState:
    """The data state of a new run (that of a resumed one replaces it, and `open_stream` compares)."""
    segments = []
    for part in parts:
        fingerprint = part.mixture.fingerprint if part.mixture is not None else ""
        segments.append(Segment(part.first_step, fingerprint, [], seed, config.window))
    return DataState(segments)


def open_stream(
    parts: list[Part],
    state: DataState,
    config: DataConfig,
    layout: Layout,
    objective: Objective,
    seed: int,
    text_length: int,
) -> Stream[Prepared]:
    """The stream of this rank from the state's position on; timesteps and noise come with each micro-batch.

    All ranks call it. DataError, with the difference, when the config's data is not what the state has followed.
    """
    state.follow(plan(parts, state, config, seed))
    return Stream(
        [part.mixture for part in parts if part.mixture is not None],
        state,
        dp_rank=layout.dp_rank,
        dp_world=layout.dp_world,
        micro_batch=config.micro_batch,
        text_length=text_length,
        transform=lambda batch: Prepared(batch, draw(batch, objective, seed)).page_locked(layout.device),
        captioner=config.captioner,
        prefetch=config.prefetch,
        workers=config.workers,
        quarantine_budget=config.quarantine_budget,
        share=_share(layout),
    )


def plan(parts: list[Part], state: DataState, config: DataConfig, seed: int) -> list[Segment]:
    """The segments that the config asks for, seen from the state's position.

    Segments that ended before it are stated, not opened. Raises the error of a later one that could not be opened.
    """
    segments: list[Segment] = []
    before: Mixture | None = None  # of the segment before, where it was needed
    for number, part in enumerate(parts):
        ended = number + 1 < len(parts) and parts[number + 1].first_step < state.position
        recorded = state.segments[number] if number < len(state.segments) else None
        if before is not None:
            last = segments[-1]
            order = before.order(last.batch_sizes, last.seed, last.window)
            first_sample = last.first_sample + order.first_sample(part.first_step - last.first_step)
        else:
            first_sample = recorded.first_sample if recorded is not None else 0
        if ended:
            segments.append(Segment(part.first_step, "", [], seed, config.window, first_sample, part.stated))
            continue
        if part.mixture is None:
            assert part.error is not None
            raise part.error
        before = part.mixture
        sizes = config.sizes(before.buckets)
        described = before.describe()
        segments.append(
            Segment(part.first_step, before.fingerprint, sizes, seed, config.window, first_sample, described)
        )
    return segments


def _page_locked(part: P) -> P:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    locked: dict[str, Any] = {name: v.pin_memory() for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(part, **locked)


def _open_part(stage: SegmentConfig, text_dim: int, places: PlacesConfig) -> Part:
    stated: list[dict[str, Any]] = []
    try:
        rules = [_rule(dataset) for dataset in stage.datasets]
        stated = _stated(stage.datasets, rules)
        selections = [
            Selection(open_dataset(dataset.path, text_dim, places), rule)
            for dataset, rule in zip(stage.datasets, rules, strict=True)
        ]
        return Part(stage.first_step, Mixture(selections, [d.weight for d in stage.datasets]), None, stated)
    except (DataError, RunError) as error:
        return Part(stage.first_step, None, error, stated)


def _rule(dataset: DatasetConfig) -> Rule:
    rule = Rule() if dataset.selection is None else Rule.read(dataset.selection)
    takedown = [] if dataset.takedown is None else read_takedown(dataset.takedown)
    return rule.narrowed(dataset.thresholds, takedown)


def _stated(datasets: list[DatasetConfig], rules: list[Rule]) -> list[dict[str, Any]]:
    stated = [rule.describe() for rule in rules]
    weights = [Fraction(str(dataset.weight)) for dataset in datasets if dataset.weight is not None]
    if len(weights) == len(datasets) and sum(weights) > 0:
        for values, weight in zip(stated, weights, strict=True):
            values["weight"] = str(weight / sum(weights))
    shares = "by weight" if weights else "by size"
    return [{**values, "shares": shares} for values in stated]


def _is_address(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def _share(layout: Layout) -> GroupShare | None:
    """A group of its own for each sequence-parallel group, whose ranks are neighbours."""
    size = layout.sequence.size
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        group = dist.new_group(list(range(first, first + size)), backend="gloo")
        if dist.get_rank() in range(first, first + size):
            mine = group
    assert mine is not None
    return GroupShare(mine)
