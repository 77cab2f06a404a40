"""The shape of the code: imports run one way, without a cycle; folders, functions and names stay small and single."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from bench.code import PACKAGES, Tree, cycles, files_by_folder
from tests.conftest import LONG

ROOT = Path(__file__).parents[1]
# What a package may import beside itself and core.
BELOW = {
    "core": set(),
    "model": set(),
    "data": set(),
    "train": {"model", "data"},
    "launch": {"model", "data", "train"},
    "tools": {"model", "data", "train", "launch"},
    "bench": {"model", "data", "train", "launch", "tools"},
}
MOST_FILES = 16
MOST_LINES = 80  # of a function
MOST_BRANCHES = 15  # McCabe's complexity of a function


TREE = Tree(ROOT)


def test_no_cycle_between_modules() -> None:
    assert cycles(TREE.imports) == []


def test_no_cycle_between_packages() -> None:
    assert cycles(TREE.package_imports) == []


def test_imports_run_one_way() -> None:
    wrong = [name for name, tree in TREE.modules.items() for node in ast.walk(tree) if getattr(node, "level", 0)]
    for name, others in TREE.imports.items():
        package = name.split(".")[0]
        allowed = BELOW[package] | {package, "core"}
        wrong += [f"{name} imports {other}" for other in sorted(others) if other.split(".")[0] not in allowed]
    assert wrong == []


def test_folders_are_small() -> None:
    folders = TREE.folders() | files_by_folder(ROOT, ["tests"])
    assert {folder: files for folder, files in folders.items() if files > MOST_FILES} == {}


def test_files_that_are_run_first_are_there() -> None:
    assert set(LONG) - {path.stem for path in (ROOT / "tests").rglob("test_*.py")} == set()


def test_functions_fit_a_screen() -> None:
    assert {name: lines for name, lines in TREE.functions().items() if lines > MOST_LINES} == {}


def test_functions_have_few_branches() -> None:
    assert {name: height for name, height in TREE.complexity().items() if height > MOST_BRANCHES} == {}


def test_class_names_mean_one_thing() -> None:
    assert {name: where for name, where in TREE.classes().items() if len(where) > 1} == {}


def test_every_file_asks_for_the_same_python() -> None:
    """setup.py states it; what cannot read it there says the same."""
    least = re.findall(r'python_requires=">=(3\.\d+)"', (ROOT / "setup.py").read_text())
    assert len(least) == 1
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["mypy"]["python_version"] == least[0]
    assert settings["ruff"]["target-version"] == f"py{least[0].replace('.', '')}"
    assert set(re.findall(r"Python (3\.\d+)", (ROOT / "README.md").read_text())) == set(least)
    made = subprocess.run(
        ["make", "--dry-run", "-B", "environment", "PYTHON=python0"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"python0 is older than Python {least[0]}" in made.stdout


def test_an_installation_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """Sub-packages, templates, configs and pages: setup.py names no file, so a new folder must be found by itself."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {
        str(path.relative_to(ROOT))
        for package in ("conf", *(name for name in PACKAGES if name != "bench"))
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert built == kept
