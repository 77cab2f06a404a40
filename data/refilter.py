"""Other thresholds on a finished dataset, without decoding anything: writes selections, leaves the shards alone.

    python -m data.refilter dir=dataset data/filters=phase2
    python -m data.refilter dir=dataset data/filters=phase1 external=dover.parquet filters.absent=skip

Reads `dir/scores.parquet`, joins scores from elsewhere, and writes `selection.yaml` beside each index: `thresholds`
(score: [lowest, highest]) on scores that the index has, and `takedown`, the keys that these alone would keep.
A window that was filtered out when the dataset was prepared is not in the shards: it is counted, and comes back only by
preparing again with the new filters.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from data.errors import DataError
from data.filter import Filter, FilterConfig, rule_name
from data.shards import write_atomically
from data.table import SCORES, External, read_columns, score_columns

SELECTION = "selection.yaml"


@dataclass
class RefilterConfig:
    """Settings of the program."""

    dir: str = MISSING  # a dataset of data.prepare
    external: str = ""  # Parquet file with further scores, joined by `key` (windows) or `source` (files)
    filters: FilterConfig = field(default_factory=FilterConfig)


def refilter(config: RefilterConfig) -> dict[str, Any]:
    """Write the selections; returns counts: windows, stored, kept, lost (would pass, not in the shards) and rules."""
    root = Path(config.dir)
    if not (root / SCORES).is_file():
        raise DataError(f"{root / SCORES} is missing; give the folder that data.prepare has written (its output)")
    columns = score_columns(root / SCORES)
    table = read_columns(root / SCORES)
    if config.external:
        external = External(config.external)
        if both := sorted(set(external.columns) & set(columns)):
            raise DataError(f"the score {both[0]} is in {root / SCORES} and in {config.external}; rename it there")
        table |= external.rows(table[external.by].tolist())
        columns_now = [*columns, *external.columns]
        found = int(external.has(table[external.by].tolist()).sum())
        if found == 0:
            raise DataError(
                f"no {external.by} of {config.external} occurs in {root / SCORES}: it is of another dataset"
            )
        print(f"{config.external}: joined to {found} of {len(table['key'])} windows by {external.by}")
    else:
        columns_now = list(columns)
    rules = Filter(config.filters, columns_now)
    if rules.skipped:
        print(f"filters skipped, since nothing brings their scores: {', '.join(rules.skipped)}")
    usable, stored = table["reason"] == "", table["stored"].astype(bool)
    kept = rules.kept(table, len(usable)) & usable
    counts: dict[str, Any] = {
        "windows": int(usable.sum()),
        "stored": int(stored.sum()),
        "kept": int((kept & stored).sum()),
        "lost": int((kept & ~stored).sum()),
        "rules": {rule_name(rule): int((rules.passes(rule, table) & stored).sum()) for rule in rules.rules},
    }
    for part in sorted(set(table["part"][stored].tolist())):
        select(root / part, rules, columns, table, part)
    return counts


def write_selection(root: Path, part: str, rules: Filter, columns: Sequence[str]) -> None:
    """Write the selection of one part of a dataset whose scores.parquet is complete."""
    select(root / part, rules, columns, read_columns(root / SCORES), part)


def select(folder: Path, rules: Filter, columns: Sequence[str], table: dict[str, np.ndarray], part: str) -> None:
    """Write folder/selection.yaml. columns: scores that the index has; table: all windows, as in scores.parquet."""
    rows = (table["part"] == part) & table["stored"].astype(bool)
    here = {name: values[rows] for name, values in table.items()}
    thresholds: dict[str, list[float | None]] = {}
    passed = np.ones(int(rows.sum()), bool)  # what the thresholds alone keep, an unmeasured score failing
    for rule in rules.rules:
        (score, (lowest, highest)), *others = [item for term in rule for item in term.items()]
        unmeasured = bool(np.isnan(here[score]).any())
        unknown = score not in columns or bool(np.isnan(here[score]).all())  # the index has no such column
        if others or unknown or score in thresholds or (unmeasured and rules.config.missing == "keep"):
            continue
        thresholds[score] = [lowest if np.isfinite(lowest) else None, highest if np.isfinite(highest) else None]
        passed &= (here[score] >= np.float32(lowest)) & (here[score] <= np.float32(highest))
    kept = rules.kept(here, len(passed))
    # an unmeasured score is listed as well, so that the selection doesn't hang on how a reader treats NaN
    measured = np.ones(len(passed), bool)
    for score in thresholds:
        measured &= ~np.isnan(here[score])
    takedown = sorted(here["key"][~kept & (passed | ~measured)].tolist())
    content = yaml.safe_dump({"thresholds": thresholds, "takedown": takedown}, sort_keys=True)
    write_atomically(folder / SELECTION, lambda path: path.write_text(content, encoding="utf-8"))


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


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="refilter_schema", node=RefilterConfig)
    _run()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="refilter")
def _run(cfg: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(cfg)
        print_counts(refilter(config), Path(config.dir))
    except MissingMandatoryValue as error:
        print(f"error: {error.full_key} is not given: python -m data.refilter dir=DATASET", file=sys.stderr)
        sys.exit(1)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
