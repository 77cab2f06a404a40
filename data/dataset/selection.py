"""A part of a dataset, chosen by score thresholds and a takedown list, without rewriting a shard.

A rule can stand in a file (`mova refilter` writes one):

    thresholds: {dnsmos: [2.5, null], silence: [null, 0.8]}     # lowest and highest value that is kept, null: no limit
    takedown: [0a1b2c..., ...]                                  # keys that must never be read again
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.dataset.columns import hash_keys
from data.dataset.index import DatasetIndex
from data.errors import DataError, MissingData

CHUNK = 1 << 17  # rows that are looked at in one go: small enough for the cache

Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class Rule:
    """What is kept: samples whose scores lie within all thresholds (both ends included) and whose key is not listed.

    A sample whose score was not measured (NaN) does not lie within a threshold of that score.
    """

    thresholds: Mapping[str, Limits] = field(default_factory=dict)
    takedown: frozenset[str] = frozenset()

    @classmethod
    def of(cls, thresholds: Mapping[str, Sequence[float | None]], takedown: Sequence[str] = ()) -> Rule:
        """From plain values. DataError for limits that are no pair or that nothing can satisfy."""
        pairs: dict[str, Limits] = {}
        for name, limits in thresholds.items():
            try:
                low, high = (None if limit is None else float(limit) for limit in limits)
            except (TypeError, ValueError):
                raise DataError(f"threshold {name}: {limits!r} is not a pair [lowest, highest]") from None
            if any(limit is not None and math.isnan(limit) for limit in (low, high)):
                raise DataError(f"threshold {name}: {limits!r} holds NaN; write null for no limit")
            if low is not None and high is not None and low > high:
                raise DataError(f"threshold {name}: nothing lies between {low} and {high}; exchange them")
            pairs[str(name)] = (low, high)
        return cls(pairs, frozenset(map(str, takedown)))

    @classmethod
    def read(cls, path: Path | str) -> Rule:
        """The rule in a YAML file. DataError when it is missing or something else."""
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; a takedown list may be long
            content = yaml.load(Path(path).read_text(), loader)
        except OSError as error:
            raise MissingData(f"selection {path} can't be read: {error}") from error
        except (ValueError, yaml.YAMLError) as error:
            raise DataError(f"selection {path} can't be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or set(content) - {"thresholds", "takedown"}:
            raise DataError(f"selection {path} must hold `thresholds` and `takedown` and nothing else")
        thresholds, takedown = content.get("thresholds") or {}, content.get("takedown") or []
        if not isinstance(thresholds, dict) or not isinstance(takedown, list):
            raise DataError(f"selection {path}: thresholds map scores to [lowest, highest], takedown is a list of keys")
        if numbers := [key for key in takedown if not isinstance(key, str)]:
            raise DataError(f"selection {path}: the takedown key {numbers[0]!r} is not text; put it in quotes")
        try:
            return cls.of(thresholds, takedown)
        except DataError as error:
            raise DataError(f"selection {path}: {error}") from None

    def narrowed(self, thresholds: Mapping[str, Sequence[float | None]], takedown: Sequence[str]) -> Rule:
        """This rule with these thresholds (in place of those of the same name) and more keys taken down."""
        more = Rule.of(thresholds, takedown)
        return Rule({**self.thresholds, **more.thresholds}, self.takedown | more.takedown)

    def describe(self) -> dict[str, Any]:
        """Plain values that tell rules apart: thresholds, the number of keys taken down, and a hash of these."""
        keys = hashlib.sha256("\n".join(sorted(self.takedown)).encode()).hexdigest()[:12]
        return {
            "thresholds": {name: list(limits) for name, limits in sorted(self.thresholds.items())},
            "takedown": f"{len(self.takedown)} keys {keys}" if self.takedown else "none",
        }


def read_takedown(path: Path | str) -> list[str]:
    """Keys of a text file, one a line; blank lines and what follows `#` don't count. DataError when unreadable."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise MissingData(f"takedown list {path} can't be read: {error}") from error
    except ValueError as error:
        raise DataError(f"takedown list {path} can't be read: {error}") from error
    return [key for line in lines if (key := line.partition("#")[0].strip())]


class Selection:
    """The rows of a dataset that a rule keeps.

    fingerprint: of dataset, rule and rows; that of the dataset itself when the rule is empty. kept: [rows] bool, or
    None for all. samples: how many are kept.
    """

    def __init__(self, index: DatasetIndex, rule: Rule | None = None) -> None:
        """DataError when a threshold names a score that the dataset does not have."""
        self.index, self.rule = index, Rule() if rule is None else rule
        self.kept: np.ndarray | None = None
        self.samples = len(index)
        self.fingerprint = index.fingerprint
        if self.rule == Rule():
            return
        self.kept = np.ones(len(index), dtype=bool)
        for name, limits in self.rule.thresholds.items():
            self._apply(name, limits)
        self._take_down(self.rule.takedown)
        self.samples = int(np.count_nonzero(self.kept))
        # The rows are part of it: scores may be written anew while thresholds and shards stay.
        rows = hashlib.sha256(np.packbits(self.kept).tobytes()).hexdigest()
        thresholds = [[name, *limits] for name, limits in sorted(self.rule.thresholds.items())]
        parts = [index.fingerprint, thresholds, sorted(self.rule.takedown), rows]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values for the data state, by which a difference can be shown."""
        return {"dataset": self.index.fingerprint, "samples": self.samples, **self.rule.describe()}

    def _apply(self, name: str, limits: Limits) -> None:
        column = self.index.columns.get(f"score-{name}")
        if column is None:
            known = sorted(column[6:] for column in self.index.columns if column.startswith("score-"))
            raise DataError(
                f"threshold {name}: dataset {self.index.root} has no such score; it has {', '.join(known) or 'none'}"
            )
        assert self.kept is not None
        low, high = limits
        for start, values in chunks(column):
            kept = ~np.isnan(values)
            if low is not None:
                kept &= values >= np.float32(low)
            if high is not None:
                kept &= values <= np.float32(high)
            self.kept[start : start + len(values)] &= kept

    def _take_down(self, keys: frozenset[str]) -> None:
        assert self.kept is not None
        width = self.index.columns["key"].dtype.itemsize
        wanted = np.array(sorted(key.encode() for key in keys if len(key.encode()) <= width), dtype=f"S{width}")
        if not len(wanted):
            return
        table = np.zeros(1 << 20, dtype=bool)  # a coarse sieve first: the key column of a large dataset has gigabytes
        table[_sieve(wanted)] = True
        for start, column in chunks(self.index.columns["key"]):
            candidates = np.flatnonzero(table[_sieve(column)])
            found = candidates[np.isin(column[candidates], wanted)]
            self.kept[start + found] = False


def _sieve(keys: np.ndarray) -> np.ndarray:
    """[n] 20-bit hash of keys [n]."""
    return (hash_keys(keys) >> np.uint64(44)).astype(np.int64)


def chunks(column: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values) over a column. A mapped one is read, not mapped: its pages would stay in this process."""
    mapped = column if isinstance(column, np.memmap) else column.base  # an index holds plain views of mapped arrays
    if not isinstance(mapped, np.memmap) or mapped.filename is None or mapped.shape != column.shape:
        for start in range(0, len(column), CHUNK):
            yield start, np.asarray(column[start : start + CHUNK])
        return
    with open(mapped.filename, "rb") as file:
        file.seek(mapped.offset)
        for start in range(0, len(column), CHUNK):
            yield start, np.fromfile(file, dtype=column.dtype, count=min(CHUNK, len(column) - start))
