"""The one command: `mova train`, `mova launch`, `mova prepare`, ...

    mova --help                 # all programs, one line each
    mova train --help           # a program and all its keys
    mova completion bash        # completion of programs, keys and choices; see docs/configuration.md

A program is a module with a PROGRAM (core/program.py); to add one, name it in PROGRAMS. `python -m MODULE` is the same
code. Only the program to run is imported.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tools.bench
from core.errors import EXIT_FAILED, EXIT_OK
from core.keys import nearest
from train.faults.garbage import importing

PROGRAMS = {  # in the order in which a project uses them
    "quickstart": "tools.quickstart",
    "synthesize": "data.synthesize",
    "prepare": "data.prepare.__main__",
    "import": "data.import_latents",
    "index": "data.index",
    "inspect": "data.inspect",
    "caption": "data.caption",
    "refilter": "data.refilter",
    "train-sync": "data.train_sync",
    "plan": "tools.plan.__main__",
    "launch": "launch.__main__",
    "train": "train.__main__",
    "status": "launch.status",
    "upload": "launch.upload",
    "watch": "tools.watch",
    "report": "tools.report.__main__",
    "curves": "tools.curves",
    "sample": "tools.sample",
    "sync-score": "tools.sync_score",
    "export": "tools.export.__main__",
}
BENCH = "bench"
COMPLETION = "completion"
HELP = ("-h", "--help")


def main(arguments: list[str] | None = None) -> int:
    """The console script: run the program named by the arguments. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    name, rest = (given[0], given[1:]) if given else ("", [])
    if name == BENCH:
        return _pick("mova bench", {one: f"tools.bench.{module}" for one, module in benchmarks().items()}, rest)
    if name == COMPLETION:
        return _completion(rest)
    return _pick("mova", PROGRAMS, given)


def _pick(command: str, programs: dict[str, str], given: list[str]) -> int:
    """Start the program named by the first argument, or list all of them."""
    if not given or given[0] in HELP:
        print(_overview(command, programs), end="")
        return EXIT_OK if given else EXIT_FAILED
    if given[0] not in programs:
        print(f"error: {command} has no {given[0]}{nearest(given[0], programs)} ({command} --help)", file=sys.stderr)
        return EXIT_FAILED
    sys.argv = [f"{command} {given[0]}", *given[1:]]
    load(programs[given[0]]).start()
    raise AssertionError("unreachable: start ends the process")


def load(module: str) -> Any:
    """The Program of a module, imported."""
    with importing():
        return importlib.import_module(module).PROGRAM


def benchmarks() -> dict[str, str]:
    """{name: module} of what `mova bench` takes: the modules of tools/bench that hold a PROGRAM."""
    modules = [one.name for one in pkgutil.iter_modules(tools.bench.__path__)]
    return {name.replace("_", "-"): name for name in modules if "\nPROGRAM = " in _source(f"tools.bench.{name}")}


def first_line(module: str) -> str:
    """The first line of a module's docstring, without importing it."""
    return (ast.get_docstring(ast.parse(_source(module))) or "").partition("\n")[0]


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_text(encoding="utf-8")


def _overview(command: str, programs: dict[str, str]) -> str:
    rows = [(name, first_line(module)) for name, module in programs.items()]
    if command == "mova":
        rows.append((BENCH, "Benchmark this machine for training: mova bench --help lists the benchmarks."))
        rows.append((COMPLETION, "Print shell completion: mova completion bash."))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {line}" for name, line in rows]
    head = [
        f"{command} PROGRAM [key=value ...]",
        "",
        *lines,
        "",
        f"{command} PROGRAM --help explains every key.",
        "",
    ]
    return "\n".join(head)


def _completion(arguments: list[str]) -> int:
    if arguments != ["bash"]:
        print("error: mova completion takes one shell, bash (docs/configuration.md)", file=sys.stderr)
        return EXIT_FAILED
    from tools.completion import bash

    programs = {name: load(module) for name, module in PROGRAMS.items()}
    programs |= {f"{BENCH} {name}": load(f"tools.bench.{module}") for name, module in benchmarks().items()}
    print(bash(programs), end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
