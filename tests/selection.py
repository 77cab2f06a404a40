"""Which tests run when. `make test-long` (`pytest --long`) has every row of tables of which `make test` takes some
(`chosen`), and the tests that are marked `long`.

`make test-fast` (`pytest --fast`) has those that start no process and cost little.
Whether a test starts processes is read off its code: the names that it uses, and the fixtures and functions of `tests`
that it reaches by them. A test that costs 3 s or more all the same is marked `slow`; `--fast` fails where one without
the mark costs more than LIMIT, so no list has to be kept. `fast` marks the launch of several ranks that is taken.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import pytest

from tests.distributed import run_cases

Key = TypeVar("Key")
Value = TypeVar("Value")
LONG = "MOVA_TEST_LONG"  # variable of the environment, which ranks of a test have too
LIMIT = 8.0  # seconds of processor time, what is set up for a test included
STARTERS = (subprocess, multiprocessing, subprocess.Popen, subprocess.run, run_cases)


def chosen(table: dict[Key, Value], *keys: Key) -> dict[Key, Value]:
    """The rows of a table that run: those of `keys` in `make test`, all in `make test-long`. KeyError where one of them
    is not in the table."""
    return table if LONG in os.environ else {key: table[key] for key in keys}


def is_long(item: pytest.Item) -> bool:
    """Whether `make test-long` runs this test: it is marked, or its file takes some rows of a table."""
    names = vars(item.module) if isinstance(item, pytest.Function) else {}
    return item.get_closest_marker("long") is not None or names.get("chosen") is chosen


def is_fast(item: pytest.Item) -> bool:
    """Whether `make test-fast` runs this test."""
    if item.get_closest_marker("fast"):
        return True
    return item.get_closest_marker("slow") is None and not starts_processes(item)


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test, or a fixture that it takes, reaches something that starts a process."""
    assert isinstance(item, pytest.Function)
    fixtures = [one.func for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
    return any(_reaches(function) for function in (item.function, *fixtures))


@functools.cache
def _reaches(function: Any) -> bool:
    """Whether a function of the tests uses one of STARTERS, itself or through others of the tests."""
    left, seen = [function], set()
    while left:
        one = inspect.unwrap(left.pop())
        if one in seen:
            continue
        seen.add(one)
        for used in _used(one):
            if any(used is starter for starter in STARTERS):
                return True
            if isinstance(used, type) and used.__module__.startswith("tests."):
                left += [value for value in vars(used).values() if isinstance(value, FunctionType)]
            elif isinstance(used, FunctionType) and used.__module__.startswith("tests."):
                left.append(used)
    return False


def _used(function: Any) -> Iterator[Any]:
    """The objects that a function names: globals, what it imports, and attributes of modules among them."""
    if not isinstance(function, FunctionType):
        return
    names = set(_names(function.__code__))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    found += [module for name in names if isinstance(module := {"subprocess": subprocess}.get(name), ModuleType)]
    yield from found
    for module in found:
        if isinstance(module, ModuleType) and module.__name__.startswith("tests."):
            yield from (value for name in names if (value := getattr(module, name, None)) is not None)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def cost() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])
