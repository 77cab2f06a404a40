"""Numbers that a config cannot have are refused by one rule, before a process starts."""

import dataclasses
import importlib
import math
import pkgutil
import re
import subprocess
import sys
import threading
import typing
from datetime import timedelta
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core.ranges import METADATA, Interval, OutOfRange, bounded, to_object, within

PACKAGES = ("core", "model", "data", "train", "launch", "tools")
# No user writes these: programs make them of their own configs.
FREE = {("MonitorConfig", "progress_seconds")}  # a time that nobody waits for
INTERNAL = {"data.prepare.unit.UnitConfig", "data.prepare.pipeline.PipelineConfig", "data.sync.learned.NetworkConfig"}


def configs() -> list[type]:
    """All dataclasses of the programs' configs."""
    found: dict[str, type] = {}
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(folder, f"{package}."):
            if not module.name.startswith("tools.bench"):
                for kind in vars(importlib.import_module(module.name)).values():
                    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__.endswith("Config"):
                        found[f"{kind.__module__}.{kind.__name__}"] = kind
    return [kind for name, kind in sorted(found.items()) if name not in INTERNAL]


def numeric(hint: object) -> bool:
    """Whether a type holds numbers that are given by hand."""
    return hint in (int, float) or any(map(numeric, typing.get_args(hint)))


def numbers() -> list[tuple[type, dataclasses.Field]]:
    return [
        (kind, one)
        for kind in configs()
        for one in dataclasses.fields(kind)
        if numeric(typing.get_type_hints(kind)[one.name])
    ]


def test_every_number_of_every_config_declares_its_range() -> None:
    assert len(numbers()) > 150
    missing = [
        f"{kind.__module__}.{kind.__name__}.{one.name}" for kind, one in numbers() if METADATA not in one.metadata
    ]
    assert not missing, f"declare a range with core.ranges.bounded: {missing}"


def test_defaults_lie_in_their_ranges() -> None:
    for kind, one in numbers():
        default = one.default if one.default is not dataclasses.MISSING else None
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        values = default if isinstance(default, list) else [default]
        for value in values:
            if isinstance(value, int | float):
                assert value in one.metadata[METADATA], (kind, one.name, value)


def outside(interval: Interval, whole: bool) -> list[float]:
    """Values just outside of a range, and those that pass comparisons."""
    values: list[float] = [] if whole else [math.nan, math.inf, -math.inf]
    for bound, is_open, sign in ((interval.low, interval.low_open, -1), (interval.high, interval.high_open, 1)):
        if math.isfinite(bound):
            just = sign if whole else sign * 1e-6 * max(1, abs(bound))
            values += [bound if is_open else bound + just, bound + sign * 10 * max(1, abs(bound))]
    return [value for value in values if value != interval.also]


@pytest.mark.parametrize("kind", configs(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_values_outside_of_a_range_are_refused_by_name(kind: type) -> None:
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if not numeric(hints[one.name]):
            continue
        whole = "float" not in str(hints[one.name])
        for value in outside(one.metadata[METADATA], whole):
            config = OmegaConf.structured(kind)
            shape = str(hints[one.name])
            given = {"name": value} if "dict[" in shape else [value] if "list[" in shape else value
            if shape.startswith("dict[str, list"):
                given = {"name": [value]}
            OmegaConf.set_struct(config, False)
            OmegaConf.set_readonly(config, False)  # a frozen dataclass
            config[one.name] = given
            with pytest.raises(OutOfRange, match=rf"^{one.name}\S* is .*; it must be "):
                to_object(config)


@dataclasses.dataclass
class Inner:
    share: float = bounded(0.5, "[0, 1]")


@dataclasses.dataclass
class Outer:
    count: int = bounded(3, "[1, inf)", also=-1)
    rates: list[float] = bounded([0.9, 0.95], "[0, 1)")
    limit: float | None = bounded(None, "(0, inf)")
    inner: Inner = dataclasses.field(default_factory=Inner)
    several: list[Inner] = dataclasses.field(default_factory=list)
    free: dict[str, typing.Any] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("count=0", "count is 0; it must be 1 or more, or -1"),
        ("rates=[0.5,1.0]", "rates[1] is 1.0; it must be 0 or more and below 1"),
        ("limit=0", "limit is 0.0; it must be above 0"),
        ("limit=.nan", "limit is nan; it must be above 0"),
        ("inner.share=-0.1", "inner.share is -0.1; it must be from 0 to 1"),
        ("several=[{share: 2}]", "several[0].share is 2.0; it must be from 0 to 1"),
        ("free={a: [1, .inf]}", "free.a[1] is inf; it must be a finite number"),
        ("count=9223372036854775808", "count is 9223372036854775808; it must fit into 64 bits"),
    ],
)
def test_the_message_names_key_value_and_range(given: str, message: str) -> None:
    config = OmegaConf.merge(OmegaConf.structured(Outer), OmegaConf.from_dotlist([given]))
    with pytest.raises(OutOfRange) as caught:
        to_object(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "kind, name", [(kind, one.name) for kind, one in numbers() if re.search("minutes|seconds|hours|timeout$", one.name)]
)
def test_the_longest_time_fits_into_what_waits_that_long(kind: type, name: str) -> None:
    """A user who writes 1e30 for "never" meets one line, not an OverflowError of a thread, a timer or a time-out."""
    unit = 3600 if "hours" in name else 60 if "minutes" in name else 1
    high = next(one for one in dataclasses.fields(kind) if one.name == name).metadata[METADATA].high
    if math.isinf(high):
        assert (kind.__name__, name) in FREE, "give it an upper bound"
        return
    timedelta(seconds=3 * unit * high)
    assert 3 * unit * high < threading.TIMEOUT_MAX


def test_what_lies_within_passes() -> None:
    given = ["count=-1", "rates=[0.0]", "limit=null", "inner.share=1", "free={a: [1, text]}"]
    config = to_object(OmegaConf.merge(OmegaConf.structured(Outer), OmegaConf.from_dotlist(given)))
    assert config == Outer(count=-1, rates=[0.0], inner=Inner(1.0), free={"a": [1, "text"]})


def test_a_default_list_is_not_shared() -> None:
    Outer().rates.append(0.1)
    assert Outer().rates == [0.9, 0.95]


@pytest.mark.parametrize("text", ["0, 1", "[0;1]", "[0, 1"])
def test_a_range_that_does_not_parse_is_a_bug(text: str) -> None:
    with pytest.raises(ValueError, match="not an interval"):
        within(text)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (("launch", "run.id=x", "data.path=/nowhere", "validation.samples=0"), "validation.samples is 0; it must"),
        (("train", "run.id=x", "data.path=/nowhere", "model.video.num_heads=0"), "model.video.num_heads is 0; it"),
        (("data.synthesize", "output=x", "clips=4", "fps=nan"), "fps is nan; it must be above 0"),
    ],
)  # fmt: skip
def test_programs_say_it_in_one_line_and_start_nothing(program: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}") and not list(tmp_path.iterdir())
