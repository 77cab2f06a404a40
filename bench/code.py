"""Measures of the code: size, folders, functions, names, cycles; before and now.

    python -m bench.code                   # writes bench/results/code.md; wants git, for the commit before

The commit before is the last one before the packages were ordered by purpose; both are measured by this program. Key:
before.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from tools.bench.record import commit

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "model", "data", "train", "launch", "tools", "bench")
BEFORE = "fe71bb1"
OUTPUT = "bench/results/code.md"


class Tree:
    """The Python files of the packages below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources: dict[str, str] = {}  # by dotted name; a package has the name of its folder
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*.py")):
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                self.sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")

    @cached_property
    def modules(self) -> dict[str, ast.Module]:
        """Every module, parsed."""
        return {name: ast.parse(text) for name, text in self.sources.items()}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> modules of the project that it imports, those within its functions and for annotations too."""
        found: dict[str, set[str]] = {}
        for name, tree in self.modules.items():
            seen: set[str] = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    seen.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    for alias in node.names:
                        whole = f"{node.module}.{alias.name}"
                        seen.add(whole if whole in self.modules else node.module)
            found[name] = {one for one in seen if one in self.modules and one != name}
        return found

    @cached_property
    def package_imports(self) -> dict[str, set[str]]:
        """The same of packages: a sub-package, or a module on top of a package by itself."""
        graph: dict[str, set[str]] = defaultdict(set)
        for name, others in self.imports.items():
            graph[self._unit_of(name)] |= {self._unit_of(other) for other in others} - {self._unit_of(name)}
        return dict(graph)

    def _unit_of(self, module: str) -> str:
        folder = ".".join(module.split(".")[:2])
        return folder if any(name.startswith(folder + ".") for name in self.modules) else module

    def folders(self) -> dict[str, int]:
        """Files of every folder that holds Python files, those that are no Python too."""
        return files_by_folder(self.root, PACKAGES)

    def functions(self) -> dict[str, int]:
        """Lines of every function."""
        found = {}
        for name, tree in self.modules.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    found[f"{name}.{node.name}, line {node.lineno}"] = node.end_lineno - node.lineno + 1
        return found

    def classes(self) -> dict[str, list[str]]:
        """The modules in which a public class of each name stands."""
        where: dict[str, list[str]] = defaultdict(list)
        for name, tree in self.modules.items():
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    where[node.name].append(name)
        return where

    def lines(self, *, shipped: bool) -> int:
        """Lines of what is installed without the measurements, or of the measurements."""
        bench = re.compile(r"bench(\.|$)|tools\.bench(\.|$)")
        return sum(text.count("\n") for name, text in self.sources.items() if shipped != bool(bench.match(name)))

    def complexity(self) -> Counter[str]:
        """McCabe's number of every function that branches, as ruff counts it."""
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "C901", "--no-cache", "--exit-zero"]
        command += ["--config", "lint.mccabe.max-complexity=1", "--output-format", "json", *PACKAGES]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        found: Counter[str] = Counter()
        for one in json.loads(done.stdout):
            match = re.match(r"`(\w+)` is too complex \((\d+)", one["message"])
            assert match is not None, one["message"]
            place = Path(one["filename"]).resolve().relative_to(self.root.resolve())
            found[f"{match[1]} in {place}, line {one['location']['row']}"] = int(match[2])
        return found


def files_by_folder(root: Path, packages: Iterable[str]) -> dict[str, int]:
    """Files of every folder of these packages that holds Python files, those that are no Python too."""
    found = {}
    for package in packages:
        top = root / package
        for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
            files = [path.name for path in folder.glob("*") if path.is_file() and path.suffix != ".pyc"]
            if any(name.endswith(".py") for name in files):
                found[str(folder.relative_to(root))] = len(files)
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def measures(root: Path) -> dict[str, str]:
    """{measure: value} of a tree."""
    tree = Tree(root)
    folders, functions, complexity = tree.folders(), tree.functions(), tree.complexity()
    twice = [name for name, where in tree.classes().items() if len(where) > 1]
    largest, longest = max(folders, key=lambda one: folders[one]), max(functions, key=lambda one: functions[one])
    knot, height = complexity.most_common(1)[0]
    mains = sum(len(re.findall(r"^@hydra\.main\(", text, re.MULTILINE)) for text in tree.sources.values())
    knots, groups = cycles(tree.imports), cycles(tree.package_imports)
    return {
        "lines of Python shipped (without tests and benchmarks)": f"{tree.lines(shipped=True):,}",
        "lines of Python of benchmarks (`bench/`, `tools/bench/`)": f"{tree.lines(shipped=False):,}",
        "files in the largest folder": f"{folders[largest]} (`{largest}`)",
        "lines of the longest function": f"{functions[longest]} (`{longest}`)",
        "highest cyclomatic complexity of a function (ruff C901)": f"{height} (`{knot}`)",
        "functions of a complexity above 10": f"{sum(one > 10 for one in complexity.values())}",
        "names of public classes that stand twice or more": f"{len(twice)}",
        "programs with a Hydra `main` of their own": f"{mains}",
        "YAML files on top of `conf/`": f"{len(list((root / 'conf').glob('*.yaml')))}",
        "import cycles between modules": f"{len(knots)} ({sum(map(len, knots))} modules)",
        "import cycles between packages": f"{len(groups)} ({sum(map(len, groups))} packages)",
    }


def measured_at(revision: str) -> dict[str, str]:
    """The measures of a commit. UserError where git does not have it."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=False)
        if archive.returncode:
            raise UserError(f"before={revision}: git has no such commit here: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        return measures(Path(folder))


@dataclass
class CodeBench:
    """What is compared.

    before: commit that stands in the first column
    output: file of the table
    """

    before: str = BEFORE
    output: str = OUTPUT


def run(call: Call[CodeBench]) -> None:
    """Measure both trees and write the table."""
    then, now = measured_at(call.config.before), measures(ROOT)
    rows = [f"| {name} | {then[name]} | {value} |" for name, value in now.items()]
    head = f"| measure | before ({call.config.before}) | now (on top of {commit()}) |"
    lines = ["# The code in numbers", "", f"`{call.command}`: counted, of both trees by the same program.", "", head]
    Path(call.config.output).write_text("\n".join([*lines, "| --- | --- | --- |", *rows, "", NOTES, ""]))
    print(f"written to {call.config.output}")


NOTES = (
    "Lines include blank ones, comments and docstrings. A folder's files include those that are no Python. Cycles "
    "count imports within functions too; a package is a sub-package, or a module on top of one. "
    "tests/test_structure.py fails where a folder has more than 16 files, a function more than 80 lines or a "
    "complexity above 15, where a public class name stands twice, or where a cycle arises."
)

PROGRAM = Program("code", __doc__, run, schema=Schema("bench_code", CodeBench, ()), command="python -m bench.code")

if __name__ == "__main__":
    PROGRAM.start()
