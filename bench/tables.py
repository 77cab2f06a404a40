"""The tables of the documents that follow from the code.

    make tables                  # python -m bench.tables: writes every table anew, in place

A page has a table between `<!-- table NAME: make tables -->` and `<!-- end of table -->`. What stands there comes from
the docstrings of the config dataclasses, the comments in conf/, the list of metrics (train/monitor/names.py) and the
list of what may change on resume (train/checkpoint/resume.py). tests/bench/test_tables.py fails where a page is stale.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import yaml

from core.compose import PACKAGE, Schema, choices_by_group
from core.errors import UserError
from core.help import composed_defaults, default_of, meanings, summary
from core.keys import Key, hints, walk, words
from launch.compose import SCHEMA as LAUNCH
from launch.compose import LaunchConfig
from tools.mova import PROGRAMS, first_line, load
from train.checkpoint.resume import MAY_CHANGE
from train.config import SCHEMA as TRAIN
from train.config import TrainConfig
from train.monitor.names import METRICS, VALUES

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
TABLE = re.compile(r"(<!-- table ([\w -]+): make tables -->\n).*?(<!-- end of table -->)", re.DOTALL)
FURTHER = {  # pages that tell more about a group of keys
    "init": "weights.md",
    "objective": "parts.md#balance-of-modalities",
    "parallel": "parallelism.md",
    "optim": "parts.md",
    "ema": "monitoring.md#averaged-weights",
    "checkpoint": "recovery.md",
    "guard": "recovery.md",
    "monitor": "monitoring.md",
    "inspect": "monitoring.md#profiles",
    "cluster": "launching.md",
    "watch": "watching.md",
}
UNTYPED = {  # groups whose files set keys of the others
    "data": "datasets and their weights, for `data.datasets`",
    "experiment": "a whole setting that overrides values of the other groups (see below); several as `[one,another]`",
}


def pages() -> dict[Path, str]:
    """Every page that has tables, as it should be. UserError for a table that nothing here makes."""
    found = {}
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            if TABLE.search(text):
                found[path] = TABLE.sub(partial(_filled, path), text)
    return found


def _filled(path: Path, match: re.Match[str]) -> str:
    begin, name, end = match.groups()
    if name not in TABLES:
        raise UserError(f"{path}: unknown table {name}; known are {', '.join(TABLES)}")
    return begin + "\n".join(TABLES[name]()) + "\n" + end


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = [[cell.replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in rows]
    cells = [head, ["---"] * len(head), *escaped]
    return [f"| {' | '.join(row)} |".replace("  |", " |") for row in cells]


def groups() -> list[str]:
    """The groups of training, whose files are chosen by name."""
    kinds = hints(TrainConfig)
    rows = []
    for group, choices in _choices(TRAIN).items():
        kind = kinds[group] if dataclasses.is_dataclass(kinds.get(group)) and group != "data" else None
        rows.append((f"`{group}`", _listed(choices), _about(group, kind), _place(kind) if kind else ""))
    return table(("group", "choices", "what it holds", "dataclass"), rows)


def prefixes() -> list[str]:
    """The keys of training that belong to no group, by their prefix."""
    grouped = set(_choices(TRAIN)) - {"data"}
    rows = []
    for name, kind in hints(TrainConfig).items():
        if name in grouped:
            continue
        if not dataclasses.is_dataclass(kind):
            rows.append((f"`{name}`", meanings(TrainConfig)[name], _place(TrainConfig)))
            continue
        assert isinstance(kind, type)
        keys = ", ".join(f"`{key}`" for key in hints(kind))
        rows.append((f"`{name}.`", f"{_about(name, kind)} {keys}", _place(kind)))
    return table(("key, or prefix", "what it holds", "dataclass"), rows)


def launch_keys() -> list[str]:
    """What `mova launch` takes beside the keys of training."""
    choices = _choices(LAUNCH)
    rows = []
    for name, kind in hints(LaunchConfig).items():
        variants = LAUNCH.variants.get(name, {})
        nested = dataclasses.is_dataclass(kind)
        about = _about(name, kind) if nested else meanings(LaunchConfig)[name]
        places = [_place(one) for one in variants.values()] or [_place(kind if nested else LaunchConfig)]
        rows.append((f"`{name}{'.' if nested else ''}`", _listed(choices.get(name, [])), about, ", ".join(places)))
    return table(("key, or prefix", "choices", "what it holds", "dataclass"), rows)


def programs() -> list[str]:
    """Every program of `mova`, and where its keys are declared."""
    rows = []
    for name, module in PROGRAMS.items():
        schema = load(module).schema
        rows.append((f"`mova {name}`", first_line(module), _place(schema.type) if schema is not None else ""))
    return table(("program", "what it does", "keys"), rows)


def all_keys() -> list[str]:
    """Every key of training and launching: type, default, meaning."""
    lines: list[str] = []
    for schema in (TRAIN, LAUNCH):
        values = composed_defaults(schema)
        for title, found in itertools.groupby(walk(schema.type, schema.variants), _section):
            keys = list(found)
            rows = [_row(key, values) for key in keys]
            head = [f"## {title or f'Of `mova {schema.name}` itself'}", "", summary(keys[0].owner) if title else "", ""]
            lines += [*head[: 4 if title else 2], *table(("key", "type", "default", "meaning"), rows), ""]
    return lines[:-1]


def _section(key: Key) -> str:
    above = key.path.rpartition(".")[0]
    return f"`{above}` (`{above}={key.variant}`)" if key.variant else above and f"`{above}`"


def models() -> list[str]:
    """The files of conf/model."""
    return table(("model", "what it is"), [(f"`{name}`", _comment("model", name)) for name in _files("model")])


def experiments() -> list[str]:
    """The files of conf/experiment that are whole settings."""
    rows = [(f"`{one}`", _comment("experiment", one)) for one in _files("experiment") if one not in _stages()]
    return table(("experiment", "what it is"), rows)


def stages() -> list[str]:
    """The files of conf/experiment that choose which parts learn."""
    rows = [
        (f"`{name}`", f"`optim.train=[{','.join(parts)}]`", _comment("experiment", name))
        for name, parts in _stages().items()
    ]
    return table(("preset", "what learns", "what it is for"), rows)


def metrics() -> list[str]:
    """Every metric of a run."""
    rows = [(", ".join(f"`{name}`" for name in one.names), one.meaning, one.when) for one in METRICS]
    shown = "; ".join(f"`{word}`: {_listed(values)}" for word, values in VALUES.items())
    return [
        *table(("name", "what", "when"), rows),
        "",
        f"Words in braces stand for each of their values: {shown}.",
    ]


def resume() -> list[str]:
    """The keys that may change when a run resumes, and those that may not."""
    rows = [(f"`{key}{'.' if _is_prefix(key) else ''}`", note or "freely") for key, note in MAY_CHANGE.items()]
    free = tuple(MAY_CHANGE)
    fixed: dict[str, list[str]] = {}
    for key in walk(TrainConfig):
        if not any(key.path == one or key.path.startswith(f"{one}.") for one in free):
            fixed.setdefault(key.path.partition(".")[0], []).append(key.path)
    told = []
    for name, keys in fixed.items():
        whole = len(keys) == sum(key.path.startswith(f"{name}.") for key in walk(TrainConfig))
        told += [f"all of `{name}.`"] if whole else [f"`{key}`" for key in keys]
    return [*table(("key", "may change"), rows), "", f"Fixed for a run: {', '.join(told)}."]


TABLES: dict[str, Callable[[], list[str]]] = {
    "groups": groups,
    "prefixes": prefixes,
    "launch keys": launch_keys,
    "programs": programs,
    "all keys": all_keys,
    "models": models,
    "experiments": experiments,
    "stages": stages,
    "metrics": metrics,
    "resume": resume,
}


def _row(key: Key, values: Any) -> tuple[str, ...]:
    default = default_of(key, values)
    shown = "required" if default is None else f"`{default}`"
    return f"`{key.path}`", words(key.type), shown, meanings(key.owner).get(key.name, "")


def _choices(schema: Schema) -> dict[str, list[str]]:
    schema.register()
    with hydra.initialize_config_module(PACKAGE, version_base=None):
        return choices_by_group(schema)


def _about(name: str, kind: Any) -> str:
    """The first sentences of a dataclass, with the page that tells more."""
    if kind is None:
        return UNTYPED[name]
    said = summary(kind)
    return f"{said} ([more]({FURTHER[name]}))" if name in FURTHER else said


def _place(kind: Any) -> str:
    return f"`{kind.__name__}` in `{kind.__module__.replace('.', '/')}.py`"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _files(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / PACKAGE / group).glob("*.yaml"))


def _comment(group: str, name: str) -> str:
    """The comment on top of a file of conf/."""
    lines = []
    for line in (ROOT / PACKAGE / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines += [] if line.startswith("# @package") else [line.removeprefix("#").strip()]
    return " ".join(lines)


def _stages() -> dict[str, list[str]]:
    """{experiment: parts that learn} of those that say so."""
    found = {}
    for name in _files("experiment"):
        content = yaml.safe_load((ROOT / PACKAGE / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
        if train := content.get("optim", {}).get("train"):
            found[name] = train
    return found


def _is_prefix(key: str) -> bool:
    return any(one.path.startswith(f"{key}.") for one in walk(TrainConfig))


def stale() -> list[str]:
    """Pages whose tables are not what the code gives."""
    return [str(path.relative_to(ROOT)) for path, text in pages().items() if path.read_text(encoding="utf-8") != text]


def main() -> None:
    """Write every page that is stale."""
    for name in stale():
        path = ROOT / name
        path.write_text(pages()[path], encoding="utf-8")
        print(f"{name}: tables written")


if __name__ == "__main__":
    main()
