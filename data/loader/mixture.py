"""Several datasets as one source of batches: weights, buckets in common, and batch sizes by cost."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.dataset.selection import Selection
from data.errors import DataError
from data.loader.caption_mix import CaptionMix, Weight
from data.loader.order import DatasetRows, Order


class Mixture:
    """Selections with their weights. What follows does not depend on the order in which they are given.

    selections, weights: sorted by fingerprint; the weights sum to 1. buckets: every geometry that occurs, once. A
    dataset that is alone keeps its own buckets and its own fingerprint.

    Args:
        selections: parts of datasets, each with samples.
        weights: shares of the samples; None for all of them: by their numbers of samples.

    Raises DataError for weights that are not positive or only partly given, a selection that comes twice or is empty,
    and datasets that can't be mixed (other encoders, another width of text, another empty prompt).
    """

    def __init__(
        self, selections: Sequence[Selection], weights: Sequence[float | Fraction | None] | None = None
    ) -> None:
        given = list(weights) if weights is not None else [None] * len(selections)
        exact = _exact(selections, given)
        pairs = sorted(zip(selections, exact, strict=True), key=lambda pair: pair[0].fingerprint)
        self.selections = [selection for selection, _ in pairs]
        self._shares = "by weight" if any(weight is not None for weight in given) else "by size"
        self.weights = [weight / sum(exact) for _, weight in pairs]
        self._check()
        self.buckets: list[Bucket] = []
        for selection in self.selections:
            self.buckets += [bucket for bucket in selection.index.buckets if bucket not in self.buckets]
        self.fingerprint = self.selections[0].fingerprint
        if len(self.selections) > 1:
            parts = [[s.fingerprint, str(w)] for s, w in zip(self.selections, self.weights, strict=True)]
            self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @classmethod
    def of(cls, index: DatasetIndex) -> Mixture:
        """One whole dataset."""
        return cls([Selection(index)])

    def order(self, batch_sizes: Sequence[int], seed: int, window: int) -> Order:
        """The order of the samples with these batch sizes, one per bucket. DataError as Order."""
        if len(batch_sizes) != len(self.buckets):
            raise DataError(
                f"batch sizes are {list(batch_sizes)}, the data has {len(self.buckets)} buckets "
                f"({'; '.join(map(str, self.buckets))}): give one batch size per bucket"
            )
        sources = [
            DatasetRows(
                selection.fingerprint,
                selection.index.shard_start,
                selection.index.shard_bucket,
                selection.kept,
                weight,
                [self.buckets.index(bucket) for bucket in selection.index.buckets],
            )
            for selection, weight in zip(self.selections, self.weights, strict=True)
        ]
        return Order(sources, batch_sizes, seed, window)

    def captions(self, weights: Mapping[str, Weight], seed: int) -> CaptionMix:
        """Whose captions are read, by weight ({}: each dataset's first). DataError as CaptionMix."""
        return CaptionMix([selection.index for selection in self.selections], weights, seed)

    def texts(self, captions: CaptionMix) -> dict[str, dict[str, str]]:
        """By the selections' fingerprints: the text fingerprint of each captioner that is read."""
        return {s.fingerprint: texts for s, texts in zip(self.selections, captions.texts(), strict=True)}

    def empty_text(self) -> Tensor:
        """The encoded empty prompt [L0, D] bfloat16, the same in all datasets."""
        texts = [selection.index.empty_text() for selection in self.selections]
        for selection, text in zip(self.selections, texts, strict=True):
            if not torch.equal(text.view(torch.int16), texts[0].view(torch.int16)):
                raise DataError(
                    f"datasets {self.selections[0].index.root} and {selection.index.root} have different encodings of "
                    "the empty prompt; encode both with one text encoder"
                )
        return texts[0]

    def describe(self) -> list[dict[str, Any]]:
        """Plain values for the data state, by which a difference can be shown."""
        pairs = zip(self.selections, self.weights, strict=True)
        return [{**s.describe(), "weight": str(weight), "shares": self._shares} for s, weight in pairs]

    def _check(self) -> None:
        first = self.selections[0]
        for before, selection in zip(self.selections, self.selections[1:], strict=False):
            if before.fingerprint == selection.fingerprint:
                root = selection.index.root
                raise DataError(f"dataset {root} comes twice: list it once, with the sum of its weights")
        for selection in self.selections:
            index = selection.index
            if not selection.samples:
                raise DataError(
                    f"nothing of dataset {index.root} is kept: loosen thresholds {dict(selection.rule.thresholds)}"
                )
            if index.text_dim != first.index.text_dim:
                raise DataError(
                    f"text has width {index.text_dim} in {index.root}, {first.index.text_dim} in {first.index.root}: "
                    "encode both with one text encoder"
                )
            for kind in index.encoders.keys() & first.index.encoders.keys():
                if index.encoders[kind] != first.index.encoders[kind]:
                    raise DataError(
                        f"the {kind} encoder is {index.encoders[kind]} in {index.root}, {first.index.encoders[kind]} "
                        f"in {first.index.root}: encode both with one"
                    )


def _exact(selections: Sequence[Selection], given: Sequence[float | Fraction | None]) -> list[Fraction]:
    """Weights as exact fractions: a number means what its decimal form says (0.3 is 3/10)."""
    if not selections:
        raise DataError("there is no dataset to train on: name one")
    if len(given) != len(selections):
        raise DataError(f"{len(given)} weights for {len(selections)} datasets: give one each")
    if all(weight is None for weight in given):
        return [Fraction(max(selection.samples, 1)) for selection in selections]
    exact = []
    for selection, weight in zip(selections, given, strict=True):
        if weight is None:
            raise DataError(f"dataset {selection.index.root} has no weight, others have: give all of them one, or none")
        if not math.isfinite(weight) or weight <= 0:
            root = selection.index.root
            raise DataError(f"weight {weight} of dataset {root}: give a number above 0, or leave it out")
        exact.append(weight if isinstance(weight, Fraction) else Fraction(str(weight)))
    return exact


@dataclass(frozen=True)
class BatchCost:
    """Batch sizes that cost about the same in every bucket.

    A sample of s tokens (video patches of 2 x 2 and latent steps of sound) costs s · (1 + s / attention_tokens): the
    linear layers once, and attention, which at s = attention_tokens costs as much as these. For a tower of width d
    with a feed-forward width f that is 3·d + f: a token's linear layers have 2·(6·d² + 2·d·f) FLOPs (self-attention's
    four projections, two of cross-attention, the feed-forward), its attention 4·s·d. The default is MOVA's video
    expert (d 5120, f 13824).

    A bucket's batch is the largest multiple of `multiple` that costs at most `budget`, and `multiple` at least.
    """

    budget: float
    attention_tokens: float = 29184.0
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("budget", "attention_tokens", "multiple"):
            if not getattr(self, name) > 0:
                raise DataError(f"batch cost: {name} is {getattr(self, name)}; give a number above 0")

    def sample(self, bucket: Bucket) -> float:
        """What one sample costs, in tokens of the linear layers."""
        tokens = bucket.frames * -(-bucket.height // 2) * -(-bucket.width // 2) + bucket.audio_steps
        return tokens * (1 + tokens / self.attention_tokens)

    def size(self, bucket: Bucket) -> int:
        """Samples of a global batch of this bucket."""
        return max(1, int(self.budget / self.sample(bucket)) // self.multiple) * self.multiple


def label(bucket: Bucket) -> str:
    """A bucket's name in a config: its latent geometry, frames x height x width x sound, such as 49x44x80x403."""
    return f"{bucket.frames}x{bucket.height}x{bucket.width}x{bucket.audio_steps}"


def explicit_sizes(buckets: Sequence[Bucket], sizes: Mapping[str, int]) -> list[int]:
    """Batch sizes by label. DataError when a bucket has none."""
    missing = sorted({label(bucket) for bucket in buckets} - set(sizes))
    if missing:
        raise DataError(
            f"no batch size for bucket {', '.join(missing)}; given are {', '.join(sizes)}. Name every bucket of "
            "the data"
        )
    return [sizes[label(bucket)] for bucket in buckets]
