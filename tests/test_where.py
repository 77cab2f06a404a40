"""What docs/where.md and CONTRIBUTING name is there: files, and the names in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"`([\w/.-]+\.(?:py|yaml|sh|md|template))`(?: \(([^)]*)\))?")
PAGES = ("docs/where.md", "CONTRIBUTING.md")


def rows() -> list[str]:
    lines = (ROOT / "docs/where.md").read_text().splitlines()
    return [
        line for line in lines if line.startswith("| Where") or line.startswith("| What") or line.startswith("| How")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = [path for path, _ in FILE.findall((ROOT / page).read_text()) if "NAME" not in path]
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists() and "/" in path] == []


def test_names_stand_in_the_file_that_is_said_to_have_them() -> None:
    checked = 0
    for path, words in FILE.findall((ROOT / "docs/where.md").read_text()):
        for name in re.findall(r"`(\w+)`", words):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), (path, name)
            checked += 1
    assert checked > 20


def test_every_question_is_answered_by_three_files_at_most() -> None:
    assert len(rows()) == 10
    for row in rows():
        files = {path for path, _ in FILE.findall(row.split(" | ")[2])}
        assert 1 <= len(files) <= 3, row
