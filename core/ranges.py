"""The range of every number that a user can set in a config, and the rule that checks them all.

    @dataclass
    class OptimConfig:
        lr_tower: float = bounded(1e-5, "[0, inf)")
        betas: list[float] = bounded([0.9, 0.95], "[0, 1)")     # of every number in it
        warmup: int = 1000                                      # tests/core/test_ranges.py fails: it declares no range

    config = to_object(composed)    # OutOfRange: optim.betas[1] is 1.5; it must be 0 or more and below 1

Null is always allowed where the type allows it. NaN and infinity never are: they pass comparisons that they should not.
Nor is a whole number that does not fit into 64 bits. Times end at a million minutes: system calls take no more.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf

from core.errors import UserError

METADATA = "range"
LARGEST = 2**63 - 1

T = TypeVar("T")


class OutOfRange(UserError, ValueError):
    """A number that a config cannot have; the message names key, value and range."""


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`; `also`: one further number with a special meaning."""

    low: float
    high: float
    low_open: bool
    high_open: bool
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return (above and below) or value == self.also  # an infinite bound is open, and NaN is in no order

    def __str__(self) -> str:
        low, high = str(self.low), str(self.high)
        if not math.isinf(self.high) and not math.isinf(self.low) and self.low_open == self.high_open:
            words = f"{'between' if self.low_open else 'from'} {low} {'and' if self.low_open else 'to'} {high}"
        else:
            parts = [] if math.isinf(self.low) else [f"above {low}" if self.low_open else f"{low} or more"]
            parts += [] if math.isinf(self.high) else [f"below {high}" if self.high_open else f"at most {high}"]
            words = " and ".join(parts) or "a finite number"
        return words if self.also is None else f"{words}, or {self.also:g}"


def within(interval: str, also: float | None = None) -> dict[str, Interval]:
    """Metadata of a dataclass field whose numbers lie in an interval, written as "[0, 1)" or "(0, inf)"."""
    match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval)
    if not match:
        raise ValueError(f"{interval!r} is not an interval such as [0, 1) or (0, inf)")
    # Whole numbers stay whole: a float cannot tell the largest seed from the next number.
    low, high = (int(text) if re.fullmatch(r"-?\d+", text) else float(text) for text in match.group(2, 3))
    return {METADATA: Interval(low, high, match[1] == "(", match[4] == ")", also)}


def bounded(default: T, interval: str, also: float | None = None) -> T:
    """A dataclass field with a default (copied for each object) whose numbers must lie in an interval."""
    if isinstance(default, list | dict):
        made: Any = field(default_factory=lambda: copy.copy(default), metadata=within(interval, also))
    else:
        made = field(default=default, metadata=within(interval, also))
    result: T = made
    return result


def seed_field(default: int = 0) -> int:
    """A dataclass field for the seed of random numbers."""
    return bounded(default, f"[0, {LARGEST}]")


def to_object(config: DictConfig) -> Any:
    """The dataclass that a composed config describes. OutOfRange for a number outside its range; for other mistakes the
    errors of OmegaConf and of the dataclass."""
    refuse_out_of_range(config)
    return OmegaConf.to_object(config)


def refuse_out_of_range(config: DictConfig, key: str = "") -> None:
    """OutOfRange for the first number of a composed config that lies outside its field's range, or that is not finite
    if the field declares none."""
    kind = OmegaConf.get_type(config)
    declared = {one.name: one.metadata.get(METADATA) for one in fields(kind)} if is_dataclass(kind) else {}
    for name in config:
        if not OmegaConf.is_missing(config, name):
            _check(config[name], declared.get(str(name)), f"{key}.{name!s}" if key else str(name))


def _check(value: Any, interval: Interval | None, key: str) -> None:
    if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
        refuse_out_of_range(value, key)
    elif isinstance(value, DictConfig):
        for name in value:
            _check(value[name], interval, f"{key}.{name!s}")
    elif isinstance(value, ListConfig):
        for number, item in enumerate(value):
            _check(item, interval, f"{key}[{number}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if interval is not None and value not in interval:
            raise OutOfRange(f"{key} is {value}; it must be {interval}")
        if not math.isfinite(value):
            raise OutOfRange(f"{key} is {value}; it must be a finite number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise OutOfRange(f"{key} is {value}; it must fit into 64 bits")
