"""Checkpoints that lost their markers: a run never starts anew where there was one, and nothing of it is deleted."""

import json
import re
import shutil

import pytest

from core.errors import RunError, exit_status
from core.run_dir import RunDir
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from tests.train.runs import metrics
from train.checkpoint import uncommitted
from train.checkpoint.checkpoint import MARKER, STATE

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
RECORDS = ("status.json", "attempts.jsonl", "events.jsonl")


def after(change, root, name, *overrides):
    """Train again after something has happened to the run's folder; returns the ending and what lies there then."""
    change(root / name)
    before = (root / name / "metrics.jsonl").read_text()
    outcome = runs.train(root, root / "data", name, *overrides)
    outcome["names"] = sorted(path.name for path in (root / name / "checkpoints").glob("*"))
    outcome["untouched"] = (root / name / "metrics.jsonl").read_text() == before
    return outcome


def lose_markers(run):
    for marker in run.glob(f"checkpoints/*/{MARKER}"):
        marker.unlink()


def lose_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


class KeepOnly:
    """All markers and records are gone, but for these records."""

    def __init__(self, *kept):
        self.kept = kept

    def __call__(self, run):
        lose_markers(run)
        for name in RECORDS:
            if name not in self.kept:
                (run / name).unlink(missing_ok=True)


class Copy:
    """A run begins as the copy of another one."""

    def __init__(self, source):
        self.source = source

    def __call__(self, run):
        shutil.copytree(self.source, run)
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(f"id: {self.source.name}\n", f"id: {run.name}\n"))


class Then:
    """One change after the other."""

    def __init__(self, *changes):
        self.changes = changes

    def __call__(self, run):
        for change in self.changes:
            change(run)


def write_old_status(run):
    """As an earlier version left it."""
    (run / "status.json").write_text(json.dumps({"state": "stopped", "step": 4}))


def write_attempts(run):
    (run / "attempts.jsonl").write_text(json.dumps({"event": "begin", "job": "1", "restart": 0, "step": 4}) + "\n")


def forget_sums(run):
    """As an earlier version wrote it."""
    for file in run.glob(f"checkpoints/*/{STATE}"):
        content = json.loads(file.read_text())
        del content["files"]
        file.write_text(json.dumps(content))


def cut_shard(run):
    for file in run.glob("checkpoints/*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-1])


def recommit(run):
    newest = max(run.glob("checkpoints/step-*"))
    assert uncommitted.main([str(newest)]) == 0


def lose_newest_marker(run):
    (run / "checkpoints" / "step-00000004" / MARKER).unlink()


def empty_newest_marker(run):
    (run / "checkpoints" / "step-00000004" / MARKER).write_bytes(b"")


def empty_markers(run):
    for marker in run.glob(f"checkpoints/*/{MARKER}"):
        marker.write_bytes(b"")


def lose_newest_marker_and_rot(run):
    lose_newest_marker(run)
    (shard,) = (run / "checkpoints" / "step-00000004").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def unmount(run):
    shutil.move(run / "checkpoints", run / "elsewhere")
    (run / "checkpoints").symlink_to(run / "away")


def copies_beside(run):
    """As somebody who is careful makes them."""
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002.bak")
    shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-good")


def half_a_save(run):
    (run / "checkpoints" / "step-00000005").mkdir()
    (run / "checkpoints" / "step-00000005" / "__0_0.distcp").write_bytes(b"half")


def nothing(run):
    """Nothing happens in between."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("uncommitted")
    make_dataset(root / "data", [(CLIP, 9), (CLIP, 6)])
    whole = ("steps=4", "checkpoint.every=2", "checkpoint.keep=9")
    more = ("steps=6", *whole[1:])
    changes = {
        "markers": lose_markers,
        "folder": lose_checkpoints,
        "events": KeepOnly("events.jsonl"),
        "status": KeepOnly("status.json"),
        "old status": Then(KeepOnly(), write_old_status),
        "attempts": Then(KeepOnly(), write_attempts),
        "nobody knows": KeepOnly(),
        "no sums": Then(KeepOnly(), forget_sums),
        "cut": Then(KeepOnly(), cut_shard),
        "metrics alone": Then(KeepOnly(), lose_checkpoints),
        "half": half_a_save,
        "newest": lose_newest_marker,
        "newest empty": empty_newest_marker,
        "newest rotten": lose_newest_marker_and_rot,
        "all empty": empty_markers,
        "dangling": unmount,
    }
    cases = {"first": (runs.train, (root, root / "data", "first", *whole))}
    for name, change in changes.items():
        cases[name] = (after, (Then(Copy(root / "first"), change), root, name.replace(" ", "-"), *more))
    rotating = (*more[:-1], "checkpoint.keep=1")
    cases["copies"] = (after, (Then(Copy(root / "first"), copies_beside), root, "copies", *rotating))
    cases["markers, again"] = (after, (nothing, root, "markers", *more))
    cases["markers, recommitted"] = (after, (recommit, root, "markers", *more))
    cases["half, earlier"] = (after, (half_a_save, root, "half", *more, "checkpoint.every=0"))
    return root, {name: outcome[0] for name, outcome in run_cases(1, cases).items()}


@pytest.mark.parametrize("name", ["markers", "markers, again", "folder", "events", "status", "old status", "attempts"])
def test_a_run_that_had_a_checkpoint_does_not_start_anew(found, name):
    outcome = found[1][name]
    assert "had a committed checkpoint of step 4" in outcome["error"] and "nothing was touched" in outcome["error"]
    assert outcome["untouched"]
    if name != "folder":
        assert outcome["names"] == ["step-00000002", "step-00000004"]
        assert "python -m train.checkpoint.uncommitted" in outcome["error"] and "step-00000004" in outcome["error"]
    else:
        assert "mount or restore that folder" in outcome["error"]


def test_the_program_commits_a_whole_one_again_and_the_run_goes_on(found):
    root, outcomes = found
    assert outcomes["markers, recommitted"]["ending"] == "finished"
    assert [x["step"] for x in metrics(root, "markers")[0]] == list(range(6))


def test_a_save_that_lacked_its_marker_only_is_committed_where_no_record_knows_of_any(found):
    root, outcomes = found
    assert outcomes["nobody knows"]["ending"] == "finished"
    assert "resumed from" in outcomes["nobody knows"]["said"] and "at step 4" in outcomes["nobody knows"]["said"]
    assert [x["step"] for x in metrics(root, "nobody-knows")[0]] == list(range(6))


@pytest.mark.parametrize("name,words", [("no sums", "records no checksums"), ("cut", "bytes instead of")])
def test_what_cannot_be_verified_is_refused_and_kept(found, name, words):
    outcome = found[1][name]
    assert re.search(words, outcome["error"])
    assert outcome["names"] == ["step-00000002", "step-00000004"] and outcome["untouched"]


@pytest.mark.parametrize("name", ["newest", "newest empty"])
def test_the_newest_alone_is_no_step_lost(found, name):
    root, outcomes = found
    assert outcomes[name]["ending"] == "finished" and "at step 4" in outcomes[name]["said"]
    assert outcomes[name]["names"] == ["step-00000002", "step-00000004", "step-00000006"]


def test_the_newest_alone_that_is_damaged_as_well_is_passed_over(found):
    outcome = found[1]["newest rotten"]
    assert outcome["ending"] == "finished" and "at step 2" in outcome["said"]
    assert "damaged-00000004" in outcome["names"]


def test_empty_markers_are_lost_ones(found):
    outcome = found[1]["all empty"]
    assert "had a committed checkpoint of step 4" in outcome["error"] and outcome["untouched"]
    assert outcome["names"] == ["step-00000002", "step-00000004"]


def test_a_link_that_leads_nowhere_is_not_replaced(found):
    root, outcomes = found
    assert "dangling/checkpoints is a link to" in outcomes["dangling"]["error"] and outcomes["dangling"]["untouched"]
    assert (root / "dangling" / "checkpoints").is_symlink()


def test_copies_under_other_names_stand_in_nobodys_way(found):
    root, outcomes = found
    assert outcomes["copies"]["ending"] == "finished" and "at step 4" in outcomes["copies"]["said"]
    assert outcomes["copies"]["names"] == ["step-00000002.bak", "step-00000006", "step-good"]  # no rotation takes them
    assert RunDir(root / "copies").committed_step() == 6


@pytest.mark.parametrize(("attempt", "status"), [("0", 1), ("1", 75)])
def test_checkpoints_that_are_away_may_be_back_at_the_next_attempt(found, monkeypatch, tmp_path, attempt, status):
    """At a restart they were there before: their file system is not mounted on this node, say."""
    root, _ = found
    run = RunDir(tmp_path / "one")
    shutil.copytree(root / "folder", run.root)
    monkeypatch.setenv("MOVA_ATTEMPT", attempt)
    with pytest.raises(RunError, match="had a committed checkpoint") as caught:
        uncommitted.begin_anew(run, run.known_commit())
    assert exit_status(caught.value) == status


def test_metrics_alone_prove_no_checkpoint(found):
    root, outcomes = found
    assert outcomes["metrics alone"]["ending"] == "finished"
    assert [x["step"] for x in metrics(root, "metrics-alone")[0]] == list(range(6))


def test_half_a_save_is_renamed_and_goes_with_the_next_commit(found):
    _, outcomes = found
    assert outcomes["half"]["ending"] == "finished"
    assert outcomes["half"]["names"] == ["step-00000002", "step-00000004", "step-00000006"]
    assert "renamed to uncommitted-00000005" not in outcomes["half"]["names"]
    # A run that is finished commits nothing more: what was set aside then stays.
    assert "uncommitted-00000005" in outcomes["half, earlier"]["names"]


def test_status_carries_the_committed_step_on(tmp_path):
    run = RunDir.of(str(tmp_path), "x")
    (run.checkpoints / "step-00000007").mkdir(parents=True)
    (run.checkpoints / "step-00000007" / MARKER).write_text("{}")
    run.write_status("running")
    shutil.rmtree(run.checkpoints)
    run.write_status("failed", error="x")
    assert run.read_status()["committed"] == 7 and run.known_commit() == 7


def test_the_program_refuses_what_is_not_whole(found, capsys):
    root, _ = found
    path = root / "cut" / "checkpoints" / "step-00000004"
    assert uncommitted.main([str(path)]) == 1
    assert "is not committed" in capsys.readouterr().err and not (path / MARKER).exists()
