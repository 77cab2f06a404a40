"""Applies other thresholds to a finished dataset, without decoding: writes selections, the shards stay unchanged.

    mova refilter dir=dataset data/filters=phase2
    mova refilter dir=dataset data/filters=phase1 external=dover.parquet filters.absent=skip

Reads `dir/scores.parquet`, joins scores from elsewhere, and writes `selection.yaml` beside each index: `thresholds`
(score: [lowest, highest]) on scores that the index has, and `takedown`, the keys that these alone would keep.
A window that was filtered out when the dataset was prepared is not in the shards: it is counted, and comes back only by
preparing again with the new filters.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.compose import Schema
from core.program import Call, Program
from core.terminal import escape_letters
from data.errors import DataError
from data.windows.filter import Filter, FilterConfig, rule_name
from data.windows.selections import SELECTION, _tables, write_selection
from data.windows.table import SCORES, External, batches, score_columns


@dataclass
class RefilterConfig:
    """Other thresholds for a finished dataset.

    dir: a dataset of `mova prepare`
    external: Parquet file with further scores, joined by `key` (windows) or `source` (files)
    """

    dir: str = MISSING
    external: str = ""
    filters: FilterConfig = field(default_factory=FilterConfig)


def refilter(config: RefilterConfig) -> dict[str, Any]:
    """Write the selections; returns counts: windows, stored, kept, lost (would pass, not in the shards) and rules."""
    root = Path(config.dir)
    if not (root / SCORES).is_file():
        raise DataError(f"{root / SCORES} is missing; give the folder that data.prepare has written (its output)")
    columns = score_columns(root / SCORES)
    external = _external(config, columns) if config.external else None
    rules = Filter(config.filters, [*columns, *(external.columns if external else ())])
    if rules.skipped:
        print(f"filters skipped, since nothing brings their scores: {', '.join(rules.skipped)}")
    counts: dict[str, Any] = {"windows": 0, "stored": 0, "kept": 0, "lost": 0}
    passed = [0] * len(rules.rules)
    parts: set[str] = set()
    for table in _tables(root, external):
        usable, stored = table["reason"] == "", table["stored"].astype(bool)
        kept = rules.kept(table, len(usable)) & usable
        for name, rows in (("windows", usable), ("stored", stored), ("kept", kept & stored), ("lost", kept & ~stored)):
            counts[name] += int(rows.sum())
        passed = [before + int((rules.passes(rule, table) & stored).sum()) for before, rule in zip(passed, rules.rules)]
        parts.update(table["part"][stored].tolist())
    counts["rules"] = {rule_name(rule): count for rule, count in zip(rules.rules, passed)}
    for part in sorted(parts):
        write_selection(root, part, rules, columns, external)
    return counts


def _external(config: RefilterConfig, columns: Sequence[str]) -> External:
    """The scores from elsewhere. DataError when they don't belong to the dataset."""
    root, external = Path(config.dir), External(config.external)
    if both := sorted(set(external.columns) & set(columns)):
        raise DataError(f"the score {both[0]} is in {root / SCORES} and in {config.external}; rename it there")
    found = windows = 0
    for table in batches(root / SCORES, [external.by]):
        found += int(external.has(table[external.by].tolist()).sum())
        windows += len(table[external.by])
    if found == 0:
        raise DataError(f"no {external.by} of {config.external} occurs in {root / SCORES}: it is of another dataset")
    print(f"{config.external}: joined to {found} of {windows} windows by {external.by}")
    return external


def print_counts(counts: dict[str, Any], root: Path) -> None:
    """Lines for the user."""
    for rule, passed in counts["rules"].items():
        print(f"  {passed} of {counts['stored']} pass {rule}")
    print(
        f"kept: {counts['kept']} of {counts['stored']} samples in the shards; selections: {root}{os.sep}**/{SELECTION}"
    )
    if counts["lost"]:
        print(
            f"{counts['lost']} further windows would pass, but were filtered out when the dataset was made: prepare "
            "it again with these filters, or with filters.drop=false to store all"
        )


def _run(call: Call[RefilterConfig]) -> None:
    print_counts(refilter(call.config), Path(call.config.dir))


PROGRAM = Program(
    "refilter",
    __doc__,
    _run,
    schema=Schema("refilter", RefilterConfig, (("data/filters", None),)),
    before=escape_letters,
)

if __name__ == "__main__":
    PROGRAM.start()
