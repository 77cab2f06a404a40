"""How programs that look at one run are called: `python -m tools.report runs/try1` means run=runs/try1."""

from __future__ import annotations

from collections.abc import Sequence

from launch.compose import quote


def run_first(arguments: Sequence[str]) -> list[str]:
    """A first argument that is a whole path, or no key=value, is the run directory, quoted for Hydra."""
    if arguments and (arguments[0].startswith("/") or not ("=" in arguments[0] or arguments[0].startswith("-"))):
        return [f"run={quote(arguments[0])}", *arguments[1:]]
    return list(arguments)
