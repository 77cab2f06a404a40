"""Checks the files that a run reads on the node that will read them: datasets, lists of keys, a source of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import RunError
from core.run_dir import RunDir
from data.errors import DataError


def missing_inputs(run: RunDir) -> list[str]:
    """One line for each input of a run, as its config.yaml names them, that this node cannot open. Datasets are opened
    as training opens them, with the sizes of all shards; remote ones, and those of segments that are over, are not."""
    from data.dataset.index import DatasetIndex
    from train.start.config import init_of
    from train.start.sources import open_sources

    try:
        config = run.read_config()
    except OSError as error:
        return [f"{run.config} cannot be read: {error.strerror}"]
    except RunError as error:
        return [str(error)]
    folders, files = _paths(config.get("data") or {}, run.committed_step())
    problems = []
    for folder in folders:
        try:
            DatasetIndex.open(Path(folder)).close()
        except (DataError, OSError) as error:
            problems.append(str(error))
    for file in files:
        try:
            with open(file, "rb") as opened:
                opened.read(1)
        except OSError as error:
            problems.append(f"{file} can't be read: {error.strerror}")
    init = init_of(config)
    if init.given() and run.committed_step() == 0:
        try:
            open_sources(init)
        except (RunError, OSError) as error:
            problems.append(str(error))
    return problems


def _paths(data: dict[str, Any], step: int) -> tuple[list[str], list[str]]:
    """(local dataset folders, files beside them) that a run needs from a step on."""
    segments = data.get("segments") or []
    stages = [data.get("datasets") or [{"path": data.get("path")}], *(each.get("datasets") or [] for each in segments)]
    ends = [each["first_step"] for each in segments]
    needed: list[dict[str, Any]] = [{"path": data.get("valid_path")}]
    for number, stage in enumerate(stages):
        # A segment without datasets goes on with those of the one before.
        later = next((end for end, after in zip(ends[number:], stages[number + 1 :], strict=True) if after), None)
        if later is None or later > step:
            needed += stage
    folders = [one["path"] for one in needed if one.get("path")]
    files = [one[name] for one in needed for name in ("selection", "takedown") if one.get(name)]
    return [path for path in folders if "://" not in path and not path.startswith("pipe:")], files
