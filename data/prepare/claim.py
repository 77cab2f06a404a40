"""The folder of unfinished work of data.prepare: held by one process, or shared by those that do single units."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.locks import lock_now
from data.errors import DataError
from data.prepare.unit import UNITS
from data.sources.table import NAME as SOURCES

MARKER = ".unfinished"  # only a folder that holds it is deleted
SOURCES_LOCK = ".sources.lock"  # held by the process that makes the table of sources
KEPT = {MARKER, SOURCES, SOURCES_LOCK}


def differences(found: dict[str, Any], settings: dict[str, Any]) -> str:
    """Both values of every setting that differs, for a message."""
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    return "; ".join(
        "the source files differ" if name == "source" else f"{name}: {found.get(name)}, now {settings.get(name)}"
        for name in names
    )


@contextlib.contextmanager
def claim(partial: Path, shared: bool, program: str = "data.prepare") -> Iterator[None]:
    """Hold the folder of unfinished work, for this process or (shared) for all that do single units.

    DataError when another process holds the folder, or when it is somebody's data. A folder that is left without
    anything in it is removed.
    """
    if partial.is_dir() and any(partial.iterdir()) and not (partial / MARKER).is_file():
        raise DataError(f"{partial} exists and is not unfinished work of {program}; move it elsewhere")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / MARKER, "a") as marker:
        if not lock_now(marker, shared):
            raise DataError(f"another {program} is writing {partial}; wait or choose another output")
        try:
            yield
        finally:
            if (
                not shared
                and partial.is_dir()
                and {entry.name for entry in partial.iterdir()} <= {MARKER, SOURCES_LOCK}
            ):
                shutil.rmtree(partial)


def begin(partial: Path, settings: dict[str, Any], shared: bool) -> None:
    """Make a folder that is held ready for work with these settings.

    Work with other settings is thrown away, but for the table of sources. DataError when others (shared) may be at it.
    """
    path = partial / "settings.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is not None and found != settings and shared:
        raise DataError(
            f"{partial} was begun with other settings ({differences(found, settings)}); use the same for all "
            "units, or delete it"
        )
    begun = bool({entry.name for entry in partial.iterdir()} - KEPT)
    if begun and found != settings and not shared:
        print(f"{partial} is unfinished work with other settings: starting over")
        _clear(partial)
    elif begun and not shared:
        print(f"{partial} is unfinished work of a run that was stopped: resuming it")
    (partial / UNITS).mkdir(exist_ok=True)
    if found != settings:
        content = json.dumps(settings)
        temporary = partial / f".settings.{os.getpid()}"  # units that start together write the same
        temporary.write_text(content)
        os.replace(temporary, path)


def _clear(partial: Path) -> None:
    """Delete everything but the marker, which holds the lock, and the table of sources."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in KEPT:
            entry.unlink()
