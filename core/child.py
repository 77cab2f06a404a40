"""Runs a program of this project in a child process: with the same code, and with values passed on unchanged.

    subprocess.run(command("data.prepare", {"source": folder, "output": shards, "holdout": 0.2}), env=environment())

The child imports what this process imports: neither a data.py in the current folder nor another checkout can shadow it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.typed import override

ROOT = Path(__file__).resolve().parent.parent  # the folder of the packages


def arguments(values: Mapping[str, Any]) -> list[str]:
    """key=value for each value, as a user would type it; a path is text."""
    return [override(key, str(value) if isinstance(value, Path) else value) for key, value in values.items()]


def command(module: str, values: Mapping[str, Any] | None = None, more: Sequence[str] = ()) -> list[str]:
    """The command of `python -m module` with these values; `more`: further arguments, as typed."""
    return [sys.executable, "-P", "-m", module, *arguments(values or {}), *more]


def environment(**variables: str) -> dict[str, str]:
    """The environment of such a child: that of this process, with this code first on the path, and these variables."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}


@contextmanager
def environment_kept() -> Iterator[None]:
    """While entered, os.environ may be changed for children that inherit it; afterwards it is as before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
