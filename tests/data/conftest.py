"""What several tests of the data room need."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of natural clips; the test is skipped where there is none."""
    folder = Path(os.environ.get("MOVA_TEST_CLIPS") or Path(__file__).parents[3] / "shared" / "clips")
    if not folder.is_dir():
        pytest.skip(f"no natural clips: set MOVA_TEST_CLIPS to their folder ({folder} does not exist)")
    return folder
