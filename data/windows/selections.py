"""Selections of a finished dataset, written from the table of its windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from core.durable import write_atomically
from data.windows.filter import Filter
from data.windows.table import SCORES, External, batches

SELECTION = "selection.yaml"


def _tables(root: Path, external: External | None) -> Iterator[dict[str, np.ndarray]]:
    """All windows with all their scores, some at a time."""
    for table in batches(root / SCORES):
        yield table | (external.rows(table[external.by].tolist()) if external else {})


def write_selection(
    root: Path, part: str, rules: Filter, columns: Sequence[str], external: External | None = None
) -> None:
    """Write root/part/selection.yaml from root/scores.parquet. columns: scores that the index has."""

    def tables() -> Iterator[dict[str, np.ndarray]]:
        for table in _tables(root, external):
            rows = (table["part"] == part) & table["stored"].astype(bool)
            yield {name: values[rows] for name, values in table.items()}

    thresholds = _thresholds(rules, columns, tables())
    down: list[np.ndarray] = []
    for here in tables():
        # An unmeasured score is listed as well, so that the selection doesn't hang on how a reader treats NaN.
        passed = measured = np.ones(len(here["key"]), bool)  # passed: what the thresholds alone keep
        for score, (lowest, highest) in thresholds.items():
            passed = passed & (here[score] >= np.float32(-np.inf if lowest is None else lowest))
            passed = passed & (here[score] <= np.float32(np.inf if highest is None else highest))
            measured = measured & ~np.isnan(here[score])
        taken = ~rules.kept(here, len(passed)) & (passed | ~measured)
        down.append(here["key"][taken].astype("S24"))
    keys = np.sort(np.concatenate(down)) if down else np.zeros(0, "S24")
    write_atomically(root / part / SELECTION, lambda path: _write_rule(path, thresholds, keys))


def _thresholds(
    rules: Filter, columns: Sequence[str], tables: Iterable[dict[str, np.ndarray]]
) -> dict[str, list[float | None]]:
    """Rules that a threshold on a score of the index can express, as [lowest, highest]."""
    found = {score: [0, 0] for score in rules.scores() if score in columns}  # values, and those not measured
    for here in tables:
        for score, counts in found.items():
            counts[0] += len(here[score])
            counts[1] += int(np.isnan(here[score]).sum())
    thresholds: dict[str, list[float | None]] = {}
    for rule in rules.rules:
        (score, (lowest, highest)), *others = [item for term in rule for item in term.items()]
        values, unmeasured = found.get(score, [0, 0])
        if others or values == unmeasured or score in thresholds:  # unmeasured throughout: the index lacks the column
            continue
        if not (unmeasured and rules.config.missing == "keep"):
            thresholds[score] = [lowest if np.isfinite(lowest) else None, highest if np.isfinite(highest) else None]
    return thresholds


def _write_rule(path: Path, thresholds: dict[str, list[float | None]], keys: np.ndarray) -> None:
    """As data.dataset.selection.Rule reads it; line by line, since a YAML library keeps a tree of all keys in
    memory."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("takedown:\n" if len(keys) else "takedown: []\n")
        for start in range(0, len(keys), 1 << 16):
            file.writelines(f"- '{key.decode()}'\n" for key in keys[start : start + (1 << 16)].tolist())
        file.write(yaml.safe_dump({"thresholds": thresholds}, sort_keys=True))
