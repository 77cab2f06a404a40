"""A flash and a beep at one moment, through data.prepare into shards and back, lie within 20 ms of the truth."""

from pathlib import Path

import pytest

from bench.data.flash_beep import HOLES, STARTS, chosen, make_files, measure


@pytest.mark.slow
def test_flash_and_beep_lie_together(tmp_path: Path) -> None:
    """For each codec and container, and for sound with holes, late sound and early sound."""
    folder = tmp_path / "files"
    folder.mkdir()
    files = make_files(folder)
    assert files == len(chosen()) + 1 + len(HOLES) + 3 * len(STARTS) and len(chosen()) > 25
    found = measure(folder, tmp_path / "set", 1)
    assert len(found) == files, (tmp_path / "set" / "rejected.jsonl").read_text()
    off = {name: one for name, one in found.items() if one.worst > 0.02}
    assert not off, off
