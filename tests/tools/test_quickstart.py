"""The parts of the quickstart that decide what is kept apart and what is said."""

from pathlib import Path

import pytest

from tools import quickstart
from tools.quickstart import QuickstartConfig, QuickstartError


def test_every_folder_of_clips_has_a_place_of_its_own(tmp_path: Path) -> None:
    names = {quickstart.folder_name(tmp_path / name) for name in ("a/clips", "b/clips", "b/clips/", "c d", "c-d")}
    assert len(names) == 4
    assert "synthetic" not in names


def test_says_in_one_line_that_the_folder_of_clips_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QuickstartError, match="CLIPS=/nowhere is not a folder"):
        quickstart.quickstart(QuickstartConfig(clips="/nowhere", root=str(tmp_path / "q")))
    assert not (tmp_path / "q").exists()


def test_a_folder_is_used_by_one_quickstart_at_a_time(tmp_path: Path) -> None:
    quickstart._lock(tmp_path)
    with pytest.raises(QuickstartError, match="another quickstart"):
        quickstart._lock(tmp_path)
