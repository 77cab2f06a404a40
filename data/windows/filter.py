"""Filters windows by thresholds on scores and alternatives of them. The paper's are in conf/data/filters."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.errors import DataError

Bounds = tuple[float, float]  # lowest and highest value that passes, both included
Term = dict[str, Bounds]  # all of them must pass
Rule = list[Term]  # one of them must pass


@dataclass
class FilterConfig:
    """The filters of windows; a score passes if lowest <= score <= highest (null: no bound).

    thresholds: {score: [lowest, highest]}; null switches one off
    alternatives: each a list of {score: [lowest, highest], ...}, of which one must pass with all of its scores
    missing: a window whose score could not be measured: reject or keep
    absent: for a threshold on a score that is neither computed nor in a table: error, or skip it
    drop: leave what fails out of the shards; false: encode all, thresholds go to selection.yaml
    """

    thresholds: dict[str, Any] = field(default_factory=dict)
    alternatives: list[Any] = field(default_factory=list)
    missing: str = "reject"
    absent: str = "error"
    drop: bool = True


class Filter:
    """A set of rules, each with a name: `silence_ratio <= 0.8`, or `imagebind >= 0.2 or desync <= 0.5`.

    skipped: scores of rules that were left out, since nothing brings them (absent=skip).
    """

    name, version = "filter", 1

    def __init__(self, config: FilterConfig, available: Iterable[str]):
        """available: columns of scores that there will be. DataError for a rule that can't be met or makes no sense."""
        if config.missing not in ("reject", "keep"):
            raise DataError(f"filters.missing={config.missing} must be reject or keep")
        if config.absent not in ("error", "skip"):
            raise DataError(f"filters.absent={config.absent} must be error or skip")
        self.config = config
        rules: list[Rule] = [[{score: bounds}] for score, bounds in _bounds(config.thresholds).items()]
        for group in config.alternatives or []:
            if not isinstance(group, list | tuple) or not all(isinstance(term, Mapping) for term in group):
                raise DataError(f"filters.alternatives: {group} must be a list of {{score: [lowest, highest]}}")
            rules.append([term for one in group if (term := _bounds(one))])
        there = set(available)
        self.skipped = sorted({score for rule in rules for term in rule for score in term if score not in there})
        if self.skipped and config.absent == "error":
            rule = next(rule for rule in rules if any(score not in there for term in rule for score in term))
            unknown = [score for term in rule for score in term if score not in there]
            raise DataError(
                f"the filter `{rule_name(rule)}` needs the score {', '.join(unknown)}, which nothing brings: compute "
                "it (scores=[...]), bring it as a column of the manifest or of external=TABLE.parquet, switch it off "
                f"(filters.thresholds.{unknown[0]}=null), or skip all such filters (filters.absent=skip)"
            )
        known = [[term for term in rule if all(score in there for score in term)] for rule in rules]
        self.rules = [rule for rule in known if rule]

    def failures(self, scores: Mapping[str, float], pending: Collection[str] = ()) -> list[str]:
        """Names of the rules that a window fails, in their order.

        pending: scores that nobody has tried to measure; the rules that look at one of them are left out.
        """
        table = {score: np.array([scores.get(score, math.nan)], np.float32) for score in self.scores()}
        settled = [rule for rule in self.rules if not any(score in pending for term in rule for score in term)]
        return [rule_name(rule) for rule in settled if not self.passes(rule, table)[0]]

    def scores(self) -> set[str]:
        """The scores that the rules look at."""
        return {score for rule in self.rules for term in rule for score in term}

    def passes(self, rule: Rule, table: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [n]: which of n windows pass one rule; table: {score: float32 [n]}, NaN = not measured.

        Bounds are compared in float32, as the scores are stored. An alternative that could not be measured is no reason
        to keep: with missing=keep a window passes unmeasured only where none of the rule's scores was measured.
        """
        passed = measured = np.zeros(1, bool)
        for term in rule:
            fine = np.ones(1, bool)
            for score, (lowest, highest) in term.items():
                values = np.asarray(table[score], np.float32)
                fine = fine & (values >= np.float32(lowest)) & (values <= np.float32(highest))
                measured = measured | ~np.isnan(values)
            passed = passed | fine
        return passed | ~measured if self.config.missing == "keep" else passed

    def kept(self, table: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """bool [count]: which windows pass all rules."""
        kept = np.ones(count, bool)
        for rule in self.rules:
            kept &= self.passes(rule, table)
        return kept


def rule_name(rule: Rule) -> str:
    """As a person would write it."""
    terms = [" and ".join(_term(score, *bounds) for score, bounds in term.items()) for term in rule]
    return " or ".join(f"({term})" if " and " in term and len(terms) > 1 else term for term in terms)


def _term(score: str, lowest: float, highest: float) -> str:
    if lowest > -math.inf and highest < math.inf:
        return f"{lowest:g} <= {score} <= {highest:g}"
    return f"{score} >= {lowest:g}" if lowest > -math.inf else f"{score} <= {highest:g}"


def _bounds(values: Mapping[str, Any]) -> dict[str, Bounds]:
    found: dict[str, Bounds] = {}
    for score, pair in (values or {}).items():
        if pair is None:
            continue
        numbers = [None, None] if not isinstance(pair, list | tuple) else list(pair)
        if len(numbers) != 2 or all(number is None for number in numbers) or not all(map(_is_bound, numbers)):
            raise DataError(f"threshold {score}: {pair} must be [lowest, highest], one of them may be null")
        lowest, highest = numbers
        found[score] = (-math.inf if lowest is None else float(lowest), math.inf if highest is None else float(highest))
        if found[score][0] > found[score][1]:
            raise DataError(f"threshold {score}: {pair} lets nothing pass; the first number must be the lower one")
    return found


def _is_bound(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value))
