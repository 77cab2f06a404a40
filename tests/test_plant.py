"""Every planted fault still fits: its text stands once in the file that it names, and its tests are there."""

import pytest

from tests.plant import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_can_be_planted(fault: str) -> None:
    file, right, wrong, tests = FAULTS[fault]
    assert (ROOT / file).read_text().count(right) == 1, f"{file} no longer has: {right}"
    assert right != wrong
    named = [test.partition("::")[0] for test in tests if test.startswith("tests/")]
    assert named and [test for test in named if not (ROOT / test).exists()] == []
