"""The tables of the documents are those that the code gives, and what they are made from is complete."""

import ast
import re
from pathlib import Path

import pytest

from bench import tables
from core.errors import UserError
from core.keys import walk
from train.checkpoint.resume import MAY_CHANGE
from train.config import TrainConfig
from train.monitor.names import known_names

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"(train|perf|data|valid)/[a-z_.]+")


def test_no_page_is_stale() -> None:
    assert tables.stale() == [], "write them anew: make tables"


def test_a_changed_meaning_makes_its_pages_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAY_CHANGE, "monitor", "never")
    assert tables.stale() == ["docs/configuration.md"]


def test_a_table_that_nobody_makes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- table of all: make tables -->\n<!-- end of table -->\n".replace("of all", "nothing"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(UserError, match="unknown table nothing"):
        tables.pages()


def test_every_table_stands_in_a_page() -> None:
    there = {name for page in tables.pages().values() for _, name, _ in tables.TABLE.findall(page)}
    assert there == set(tables.TABLES)


def test_what_may_change_on_resume_exists() -> None:
    keys = [key.path for key in walk(TrainConfig)]
    assert [one for one in MAY_CHANGE if not any(key == one or key.startswith(f"{one}.") for key in keys)] == []


def written_names() -> list[str]:
    """Patterns of the metric names in the sources of train/, as they are written there."""
    found = []
    for path in sorted((ROOT / "train").rglob("*.py")):
        if path.name == "names.py":
            continue
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found += [re.escape(node.value)] if NAME.fullmatch(node.value) else []
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if isinstance(parts[0], str) and re.match(r"(train|perf|data|valid)/", parts[0]):
                    found.append("".join(".+" if part is None else re.escape(str(part)) for part in parts))
    return found


def test_every_metric_in_the_sources_is_in_the_list_and_the_other_way_round() -> None:
    written, known = written_names(), known_names()
    assert len(written) > 30
    assert [one for one in written if not any(re.fullmatch(one, name) for name in known)] == []
    assert [name for name in known if not any(re.fullmatch(one, name) for one in written)] == []
