"""What the programs of this folder share: how they name a run, and how they end on a mistake.

python -m tools.report runs/try1          # means run=runs/try1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from omegaconf.errors import OmegaConfBaseException

from data.errors import DataError
from launch.compose import quote
from train.errors import RunError


def run_first(arguments: Sequence[str]) -> list[str]:
    """A first argument that is a whole path, or no key=value, is the run directory, quoted for Hydra."""
    if arguments and (arguments[0].startswith("/") or not ("=" in arguments[0] or arguments[0].startswith("-"))):
        return [f"run={quote(arguments[0])}", *arguments[1:]]
    return list(arguments)


@contextmanager
def said_in_one_line(usage: str) -> Iterator[None]:
    """A user's mistake ends the program with one line and exit status 1. `usage`: said where a key is wrong."""
    try:
        yield
    except (RunError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        print(f"error: {str(error).splitlines()[0]} ({usage})", file=sys.stderr)
        sys.exit(1)
