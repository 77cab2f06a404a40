"""A captioner that is added to a finished dataset: new columns, the same samples in the same order."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clip import Bucket
from data.dataset.build import add_captioner, build_index, keep_own
from data.dataset.index import DatasetIndex
from data.dataset.rows import Rows, save_rows
from data.dataset.shards import TextTar
from data.errors import DataError
from tests.shards import make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)


def caption(root: Path, captioner: str, skip: int | None = None) -> list[Rows]:
    """Tars of another captioner, which has no words for every third sample; leave out one number."""
    index = DatasetIndex.open(root)
    parts = []
    for number, shard in enumerate(index.shards):
        if number == skip:
            continue
        tar = TextTar(root, captioner, shard["name"][3:-4])
        for row in range(int(index.shard_start[number]), int(index.shard_start[number + 1])):
            words = "" if row % 3 == 0 else f"{captioner} {row}"
            tar.add(index.key(row), {"caption": words}, torch.full((2, 6), float(row)))
        parts.append(tar.close())
    return parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", [(BOTH, 4), (BOTH, 3), (BOTH, 2)])


@pytest.mark.parametrize("stored", [False, True])
def test_added_captions_leave_samples_and_fingerprint(root: Path, tmp_path: Path, stored: bool) -> None:
    before = DatasetIndex.open(root)
    paths = []
    for number, rows in enumerate(caption(root, "abc")):  # before "plain" in the alphabet
        paths.append(tmp_path / f"{number}.npz")
        save_rows(paths[-1], rows)
    add_captioner(root, "abc", paths if stored else ())
    after = DatasetIndex.open(root)
    assert after.captioners == ["plain", "abc"] and after.own_captioners == ["plain"]
    assert after.fingerprint == before.fingerprint
    assert after.text_fingerprints["plain"] == before.text_fingerprints["plain"] != after.text_fingerprints["abc"]
    assert [after.key(row) for row in range(9)] == [before.key(row) for row in range(9)]
    assert [after.is_absent(row, "abc") for row in range(9)] == [row % 3 == 0 for row in range(9)]
    assert after.count_absent("abc") == 3 and after.count_absent("plain") == 0
    assert float(after.read_text(5, "abc")[0, 0]) == 5 and torch.equal(
        after.read_text(5, "plain"), before.read_text(5, "plain")
    )
    # An index from the tars alone is the same, byte for byte.
    put = {path.name: path.read_bytes() for path in (root / "index").iterdir()}
    shutil.rmtree(root / "index")
    build_index(root)
    assert {path.name: path.read_bytes() for path in (root / "index").iterdir()} == put
    assert sorted(path.name for path in root.iterdir() if not path.name.endswith(".tar")) == [
        "captioners.json", "empty-text.safetensors", "index"
    ]  # fmt: skip


def test_a_second_time_changes_nothing_and_other_words_need_another_name(root: Path) -> None:
    caption(root, "abc")
    add_captioner(root, "abc")
    record = (root / "index" / "dataset.json").read_bytes()
    add_captioner(root, "abc")
    assert (root / "index" / "dataset.json").read_bytes() == record
    index = DatasetIndex.open(root)
    tar = TextTar(root, "abc", "000002")
    for row in (7, 8):
        tar.add(index.key(row), {"caption": "other"}, torch.zeros(1, 6))
    tar.close()
    with pytest.raises(DataError, match="other captions by 'abc'"):
        add_captioner(root, "abc")
    add_captioner(root, "plain")  # the dataset's own, as they are
    assert (root / "index" / "dataset.json").read_bytes() == record


def test_tars_that_do_not_fit_leave_the_index_alone(root: Path) -> None:
    record = (root / "index" / "dataset.json").read_bytes()
    caption(root, "abc", skip=2)
    with pytest.raises(DataError, match="text-abc-000002.tar"):
        add_captioner(root, "abc")
    shutil.copy(root / "text-abc-000001.tar", root / "text-abc-000002.tar")
    with pytest.raises(DataError, match="does not hold the keys of av-000002.tar"):
        add_captioner(root, "abc")
    with pytest.raises(DataError, match="captioner '../x'"):
        add_captioner(root, "../x")
    assert (root / "index" / "dataset.json").read_bytes() == record
    assert not list(root.glob("index.*")) and not list(root.glob(".index*"))


def test_unfinished_captions_are_left_out_of_a_rebuilt_index(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = DatasetIndex.open(root).record
    keep_own(root)
    caption(root, "abc", skip=2)
    shutil.rmtree(root / "index")
    build_index(root)
    assert DatasetIndex.open(root).record == before and "abc are left out" in capsys.readouterr().out
    assert json.loads((root / "captioners.json").read_bytes()) == {"own": ["plain"], "added": []}


def test_who_has_the_index_open_keeps_it(root: Path) -> None:
    running = DatasetIndex.open(root)
    caption(root, "abc")
    add_captioner(root, "abc")
    assert running.captioners == ["plain"] and [running.key(row) for row in range(9)]
    assert np.array_equal(running.columns["av_offset"], DatasetIndex.open(root).columns["av_offset"])
    assert running.read_clip(8).key == running.key(8)


def test_a_key_that_occurs_twice_is_named(root: Path) -> None:
    for kind in ("av", "text-plain"):
        shutil.copy(root / f"{kind}-000000.tar", root / f"{kind}-000007.tar")
    twice = DatasetIndex.open(root).key(0)
    with pytest.raises(DataError, match=f"more than once: {twice}"):
        build_index(root)
