"""Plant faults in a copy of the project, one at a time: the tests named with each must fail, and pass without it.

python -m tests.plant                       # all, a quarter of a minute each
python -m tests.plant "LR one step late"
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.first_day import FIRST_DAY
from tests.faults.planning import PLAN
from tests.faults.sequence import SHARED_TOKENS
from tests.faults.training import FUSED, GUARD, LOOP, MODEL, OBJECTIVE, PARITY, SAMPLER, STOP
from tests.faults.units import UNITS
from tests.faults.weights import ENCODERS, WEIGHTS

ROOT = Path(__file__).parents[1]
PARTS = (
    "bench", "conf", "core", "data", "docs", "launch", "model", "tests", "tools", "train", "README.md", "setup.py",
    "pyproject.toml",
)  # fmt: skip
FAULTS = (
    {
        name: (*change, tests)
        for faults, tests in (
            (LOOP, ["tests/train/test_replay.py"]),
            (STOP, ["tests/train/faults/test_stop.py"]),
            (PARITY, ["tests/model/test_parity.py"]),
            (SAMPLER, ["tests/model/test_sampler.py", "tests/tools/test_sample.py", "-k", "schedule or integration"]),
            (MODEL, ["tests/model/test_joint.py", "-k", "patches or residual or rope"]),
            (FUSED, ["tests/model/test_fused.py", "-k", "not compiled"]),
            (OBJECTIVE, ["tests/train/objective/test_objective.py", "-k", "pairs or warm_up or visits or eps"]),
            (GUARD, ["tests/train/faults/test_faults.py", "-k", "limit_of_its_own or warm_up"]),
        )
        for name, change in faults.items()
    }
    | FIRST_DAY
    | WEIGHTS
    | ENCODERS
    | PLAN
    | SHARED_TOKENS
    | UNITS
)


def passes(tests: list[str], change: tuple[str, str, str] | None = None) -> tuple[bool, str]:
    """Whether the tests pass in a copy of the project, with a change (file, its text, what stands there instead) or as
    it is, and the first line of what failed. AssertionError where the text to change is not there."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            source, target = ROOT / part, Path(folder) / part
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        if change is not None:
            file, right, wrong = change
            text = (Path(folder) / file).read_text()
            assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
            (Path(folder) / file).write_text(text.replace(right, wrong))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode in (0, 1), f"pytest {' '.join(tests)} did not run: {done.stdout[-2000:]}"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return done.returncode == 0, " ".join(lines[:1])[:150]


sound = functools.cache(lambda *tests: passes(list(tests))[0])  # else what fails shows nothing


def caught(fault: str) -> bool:
    """Whether its tests pass as they are and fail with the fault."""
    file, right, wrong, tests = FAULTS[fault]
    passed, line = passes(tests, (file, right, wrong))
    if not sound(*tests):
        print(f"FAILS WITHOUT IT: {fault}", flush=True)
        return False
    print(f"{'NOT CAUGHT' if passed else 'caught'}: {fault}: {line}", flush=True)
    return not passed


if __name__ == "__main__":
    sys.exit(not all([caught(fault) for fault in sys.argv[1:] or FAULTS]))
