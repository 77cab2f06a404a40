"""Builds the sample stream of a rank from dataset folders: selections, mixtures, segments, and random draws made off
the training thread. docs/data-order.md states what the order of samples depends on.

    data.path=shards/train                                             # one dataset
    data.path=null 'data.datasets=[{path: shards/speech, weight: 0.7, thresholds: {dnsmos: [2.5, null]}}, ...]'
    'data.segments=[{first_step: 20000, datasets: [{path: shards/fine}]}]'     # other data from that step on
    'data.captioners={qwen: 0.7, short: 0.3}'                          # sources of captions, by weight
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import torch.distributed as dist

from core.errors import RunError
from data.batch import Batch
from data.dataset.index import DatasetIndex
from data.dataset.selection import Rule, Selection, read_takedown
from data.errors import DataError
from data.loader.caption_mix import describe_mix, exact_weights
from data.loader.mixture import Mixture
from data.loader.share import GroupShare
from data.loader.state import DataState, Segment
from data.loader.stream import Stream
from train.data_config import DataConfig, DatasetConfig, SegmentConfig, StorageConfig
from train.objective.noise import Prepared, draw
from train.objective.objective import Objective
from train.parallel.mesh import Layout, group_timeout
from train.parallel.workload import Workload


@dataclass(frozen=True)
class OpenedSegment:
    """A configured segment, opened if that was possible."""

    first_step: int
    mixture: Mixture | None
    error: DataError | RunError | None  # why it could not be opened
    stated: list[dict[str, Any]]  # what the config alone says of its datasets (empty where a file of it is gone)
    captioners: dict[str, str] = field(default_factory=dict)  # shares, as exact fractions
    continues: bool = False  # goes on in the order of the part before


def open_dataset(path: str, text_dim: int, storage: StorageConfig) -> DatasetIndex:
    """Open a dataset for a model. RunError if its text embeddings do not have the width that the model reads."""
    index = DatasetIndex.open(
        path if _is_address(path) else Path(path),
        cache=storage.cache,
        cache_bytes=round(storage.cache_gib * 2**30),
        verify=cast(Literal["none", "crc", "full"], storage.verify),
        timeout=storage.timeout,
    )
    if index.text_dim != text_dim:
        raise RunError(
            f"dataset {path} has text embeddings of width {index.text_dim}, the model reads {text_dim}; "
            f"prepare the data with text_dim={text_dim} or choose a model with text_dim {index.text_dim}"
        )
    return index


def open_data(config: DataConfig, text_dim: int) -> list[OpenedSegment]:
    """Open all segments of the config for a model.

    Raises DataError or RunError if the last one cannot be opened. The errors of earlier ones are deferred: a run that
    is past them no longer needs their data.
    """
    datasets = config.datasets or [DatasetConfig(path=str(config.path))]
    parts: list[OpenedSegment] = []
    for stage in [SegmentConfig(0, datasets), *config.segments]:
        mix = describe_mix(exact_weights(config.captioners if stage.captioners is None else stage.captioners))
        before = parts[-1] if parts else None
        part = replace(before, continues=True) if before and not stage.datasets else _open_part(stage, text_dim, config)
        parts.append(_with_captions(replace(part, first_step=stage.first_step, captioners=mix)))
    if parts[-1].error is not None:
        raise parts[-1].error
    return parts


def close_data(parts: list[OpenedSegment]) -> None:
    """Close the open files."""
    for part in parts:
        for selection in part.mixture.selections if part.mixture is not None else []:
            selection.index.close()


def describe_data(parts: list[OpenedSegment]) -> str:
    """One line for the log: folders (with their shares), and the steps from which they are used."""
    lines = []
    for part in parts:
        if part.mixture is None:
            lines.append(f"from step {part.first_step} data that is no longer there")
            continue
        shares = zip(part.mixture.selections, part.mixture.weights, strict=True)
        named = " + ".join(f"{s.index.root}" + (f" ({float(w):.1%})" if w != 1 else "") for s, w in shares)
        if part.captioners:
            mix = (f"{name} ({float(Fraction(share)):.1%})" for name, share in part.captioners.items())
            named += f", captions by {' + '.join(mix)}"
        lines.append(f"from step {part.first_step} {named}" if len(parts) > 1 else named)
    return "; ".join(lines)


def epoch_samples(parts: list[OpenedSegment]) -> int:
    """Samples in one pass through everything that the last segment of the data selects."""
    mixture = parts[-1].mixture
    assert mixture is not None
    return sum(selection.samples for selection in mixture.selections)


def largest_workload(parts: list[OpenedSegment], config: DataConfig, layout: Layout) -> Workload:
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


def start_state(parts: list[OpenedSegment], config: DataConfig, seed: int) -> DataState:
    """The data state of a new run (in a resumed one, the checkpoint's replaces it, and `open_stream` compares)."""
    segments = []
    for part in parts:
        fingerprint = part.mixture.fingerprint if part.mixture is not None else ""
        segments.append(
            Segment(part.first_step, fingerprint, [], seed, config.shuffle_shards, captioners=part.captioners)
        )
    return DataState(segments)


def open_stream(
    parts: list[OpenedSegment],
    state: DataState,
    config: DataConfig,
    layout: Layout,
    objective: Objective,
    seed: int,
    text_length: int,
) -> Stream[Prepared]:
    """The stream of this rank from the state's position on; timesteps and noise come with each micro-batch.

    All ranks call it. DataError, with the difference, if the config's data is not the data that the state has followed.
    """
    state.follow(plan(parts, state, config, seed))
    return Stream(
        [part.mixture for part in parts if part.mixture is not None],
        state,
        dp_rank=layout.dp_rank,
        dp_world=layout.dp_world,
        micro_batch=config.micro_batch,
        text_length=text_length,
        transform=lambda batch: _prepared(batch, objective, seed).page_locked(layout.device),
        prefetch=config.prefetch,
        workers=config.reader_threads,
        quarantine_budget=config.quarantine_budget,
        share=_share(layout),
    )


def plan(parts: list[OpenedSegment], state: DataState, config: DataConfig, seed: int) -> list[Segment]:
    """The segments that the config asks for, seen from the state's position.

    Segments that ended before it are described, not opened. Raises the error of a later one that could not be opened.
    """
    segments: list[Segment] = []
    before: Mixture | None = None  # of the segment before, where it was needed
    ends = [*(part.first_step for part in parts[1:]), math.inf]
    for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
        segment = Segment(
            part.first_step, "", [], seed, config.shuffle_shards, sources=part.stated, captioners=part.captioners
        )
        segments.append(segment)
        if part.continues:
            segment.order_step = segments[-2].order_step + segment.first_step - segments[-2].first_step
        if before is not None:
            segment.first_sample = _samples_before(segment, segments[-2], before)
        elif number < len(state.segments):
            segment.first_sample = state.segments[number].first_sample
        if end < state.position:
            continue
        if part.mixture is None:
            assert part.error is not None
            raise part.error
        before = part.mixture
        segment.fingerprint, segment.sources = before.fingerprint, before.describe()
        segment.batch_sizes = config.sizes(before.buckets)
        if end > state.position:  # else its captions are not read again: they may have become others
            segment.texts = before.texts(before.captions(part.captioners, seed))
    return segments


def _samples_before(segment: Segment, last: Segment, mixture: Mixture) -> int:
    """Number of a segment's first sample; `mixture` is that of the segment before, `last`."""
    order = mixture.order(last.batch_sizes, last.seed, last.window)
    end = last.order_step + segment.first_step - last.first_step
    return last.first_sample + order.first_sample(end) - order.first_sample(last.order_step)


def _prepared(batch: Batch, objective: Objective, seed: int) -> Prepared:
    batch = objective.alone(batch)
    return Prepared(batch, draw(batch, objective, seed))


def _open_part(stage: SegmentConfig, text_dim: int, config: DataConfig) -> OpenedSegment:
    stated: list[dict[str, Any]] = []
    try:
        rules = [_rule(dataset) for dataset in stage.datasets]
        stated = _stated(stage.datasets, rules)
        selections = [
            Selection(open_dataset(dataset.path, text_dim, config.storage), rule)
            for dataset, rule in zip(stage.datasets, rules, strict=True)
        ]
        mixture = Mixture(selections, [d.weight for d in stage.datasets])
        return OpenedSegment(stage.first_step, mixture, None, stated)
    except (DataError, RunError) as error:
        return OpenedSegment(stage.first_step, None, error, stated)


def _with_captions(part: OpenedSegment) -> OpenedSegment:
    """The part itself, or the error if its datasets lack its captions."""
    try:
        if part.mixture is not None:
            part.mixture.captions(part.captioners, seed=0)
    except DataError as error:
        return replace(part, mixture=None, error=error)
    return part


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
    """A sharing group for each sequence-parallel group, whose ranks are neighbours."""
    size = layout.sequence.size
    if size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), size):
        timeout = group_timeout(dist.distributed_c10d._get_default_group())
        group = dist.new_group(list(range(first, first + size)), timeout, backend="gloo")
        if dist.get_rank() in range(first, first + size):
            mine = group
    assert mine is not None
    return GroupShare(mine)
