"""Checkpoints on two ranks: written in the background, in two tiers, verified when they are read."""

import json
import re
import threading
import zlib

import pytest

from tests.distributed import run_cases
from tests.train.checkpoint import save_cases as cases
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointConfig


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")

    def place(name):
        (root / name).mkdir()
        return root / name

    copies = root / "copies"
    copies.mkdir()
    upload = CheckpointConfig(keep=1, upload=["cp", "-r", "{path}", f"{copies}/"])
    no_upload = CheckpointConfig(upload=["cp", "-r", "{path}", f"{root}/nowhere/at/all"])
    two = CheckpointConfig(keep=2, max_failures=2)
    damages = {name: getattr(cases, name) for name in ("flip", "cut", "unmark", "all_damaged")}
    return root, run_cases(
        2,
        {
            "background": (cases.in_the_background, (place("background"),)),
            "full once": (cases.failing, (place("once"), 1, 3, two)),
            "full for good": (cases.failing, (place("good"), 9, 5, two)),
            "full at the end": (cases.failing, (place("end"), 1, 1, two)),
            "no room": (cases.no_room, (place("room"),)),
            "tiers": (cases.rotated, (place("tiers"), CheckpointConfig(keep=2, permanent_every=3), 8)),
            "upload": (cases.rotated, (place("upload"), upload, 3)),
            "no upload": (cases.rotated, (place("no upload"), no_upload, 1)),
            "parameters": (cases.other_parameters, (place("parameters"),)),
            **{name: (cases.fall_back, (place(name), damage)) for name, damage in damages.items()},
        },
    )


def test_training_stops_for_the_copy_only_and_what_is_written_is_the_copy(ranks):
    for result in ranks[1]["background"]:
        assert result["stopped"] < 0.6 and result["half"]  # the writer takes a second
        assert result["waited"] > 0.9 and result["first_done"]  # one in flight
        assert result["values"] == {1: [[1.0 + i] for i in range(4)], 2: [[100.0 + i] for i in range(4)]}
    assert ranks[1]["background"][0]["kinds"] == ["checkpoint", "checkpoint"]


def test_a_full_disk_costs_one_checkpoint_and_is_said(ranks):
    for rank, result in enumerate(ranks[1]["full once"]):
        assert result["error"] is None and result["left"] == ["step-00000002", "step-00000003"]
        (failed,) = [event for event in result["events"] if event[0] == "checkpoint failed"]
        assert failed[1] == 1 and "rank 1: No space left on device" in failed[2] and "WARNING" in failed[2], rank


def test_too_many_failures_in_a_row_end_the_run_on_all_ranks(ranks):
    for result in ranks[1]["full for good"]:
        message, retry = result["error"]
        assert "step-00000003 could not be written (3 failed in a row): rank 1: No space left" in message and retry
    assert ranks[1]["full for good"][0]["left"] == []  # what was half written does not fill the disk


def test_a_failure_of_the_last_save_is_an_error(ranks):
    for result in ranks[1]["full at the end"]:
        assert "step-00000001 could not be written: rank 1: No space left" in result["error"][0]


def test_free_space_is_looked_at_before_anything_is_written(ranks):
    for result in ranks[1]["no room"]:
        assert "it needs 0.000 GB, 0.000 GB are free" in result["error"][0]
    assert ranks[1]["no room"][0]["left"] == []


def test_frequent_ones_are_rotated_and_rare_ones_stay(ranks):
    names = [name for name in ranks[1]["tiers"][0] if name.startswith("step")]
    assert names == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_each_committed_one_is_uploaded_whole(ranks):
    root, results = ranks
    assert sorted(results["upload"][0]).count("uploaded") == 3
    for step in (1, 2, 3):
        assert (root / "copies" / f"step-{step:08d}" / "COMMITTED").is_file()
    assert results["upload"][0][0] == "step-00000003"


def test_a_failed_upload_is_recorded_and_nothing_else(ranks):
    assert ranks[1]["no upload"][0] == ["step-00000001", "checkpoint", "upload failed"]
    assert ranks[1]["no upload"][1] == ["step-00000001"]  # the first rank uploads


@pytest.mark.parametrize(
    "name,words", [("flip", "__._0.distcp has checksum"), ("cut", r"distcp has \d+ bytes instead of \d+")]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(ranks, name, words):
    for result in ranks[1][name]:
        assert result["found"] == "step-00000001" and "damaged-00000002" in result["left"]
    said = ranks[1][name][0]["said"][0]
    assert re.search(words, said) and "the one before it is used" in said


def test_one_without_a_marker_is_not_a_checkpoint(ranks):
    assert [result["found"] for result in ranks[1]["unmark"]] == ["step-00000001"] * 2


def test_when_all_are_damaged_the_run_does_not_start_anew(ranks):
    for result in ranks[1]["all_damaged"]:
        assert re.search("no checkpoint under .* can be used: .*damaged-00000001, damaged-00000002", result["error"])


def test_parameters_are_compared_by_name_shape_and_group(ranks):
    for message in ranks[1]["parameters"]:
        assert "dual_tower_bridge.w1: not there -> {'shape': [64, 64], 'group': 'bridge'}" in message
        assert "video_dit.w2: {'shape': [64, 64], 'group': 'tower'} -> {'shape': [2, 2], 'group': 'tower'}" in message


def test_an_upload_that_names_no_folder_is_refused():
    with pytest.raises(ValueError, match=r"write \{path\} where the checkpoint's folder goes"):
        CheckpointConfig(upload=["cp", "x"])


def test_a_start_goes_on_while_checksums_are_compared_and_none_is_left_out(tmp_path, monkeypatch):
    """The newest is damaged, which only its checksum tells: the start has gone on with it by then."""
    for name, stand_in in (("on_first_rank", lambda action: action()), ("gather", lambda mine: mine)):
        monkeypatch.setattr(checkpoint, name, stand_in)
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "tensors").write_bytes(b"x" * 100)
        files = {"tensors": {"bytes": 100, "crc32": zlib.crc32(b"x" * 100)}}
        (path / checkpoint.STATE).write_text(json.dumps({"step": step, "kept": False, "files": files}))
        checkpoint.write_marker(path)
    (path / "tensors").write_bytes(b"x" * 99 + b"y")
    go_on, compare = threading.Event(), checkpoint._rotten
    monkeypatch.setattr(checkpoint, "_rotten", lambda *given: compare(*given) if go_on.wait(60) else None)
    looking = checkpoint.Newest(tmp_path)
    assert looking.path == path and path.exists(), "nothing has waited"
    go_on.set()
    assert looking.get() == tmp_path / "step-00000001" == looking.path
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged-00000002", "step-00000001"]


def test_an_error_of_the_comparison_is_not_taken_for_an_intact_checkpoint(tmp_path, monkeypatch):
    looking = checkpoint.Newest.__new__(checkpoint.Newest)
    monkeypatch.setattr(checkpoint, "_rotten", lambda *_: 1 / 0)
    looking._error, looking._faults, looking._unread, looking.path = None, [], [], tmp_path
    looking._thread = threading.Thread(target=looking._compare, args=(tmp_path, ["tensors"]))
    looking._thread.start()
    with pytest.raises(ZeroDivisionError):
        looking.get()
