"""Faults injected into runs, one by one; docs/recovery.md has the table of their outcomes."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from core.errors import EXIT_FAILED, EXIT_RETRY, RunError, exit_status, lost_peer
from core.jsonl import JsonLines
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import chaos
from tests.train.checkpoint import save_cases as cases
from tests.train.runs import metrics, status
from train.faults.bad_steps import ENOUGH, SpikeDetector, kind_of
from train.faults.config import GuardConfig
from train.parallel.step_sums import Flags, StepSums

MODALITIES = ((True, True), (True, False), (False, True))
CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
NAN = float("nan")


@pytest.fixture(scope="module")
def runs_with_faults(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    data = make_dataset(root / "data", [(CLIP, 8), (CLIP, 8)])
    few = ("guard.max_nonfinite=3", "validation.every=0")
    quick = ("validation.every=0", "optim.lr_tower=1e-4", "optim.lr_bridge=1e-4")
    spikes = (*quick, "steps=60", "guard.spike_factor=30")
    bad = (("loss_times", NAN, (5, 6, 7)),)
    high = (("loss_times", 1e4, (50,)),)
    often = ("checkpoint.every=2", "checkpoint.minutes=0")

    def case(name, *overrides, faults=()):
        return (with_faults, (faults, root, data, name, *overrides))

    return root, run_cases(
        2,
        {
            "diverged": case("diverged", "steps=20", *few, faults=bad),
            "rewound": case("rewound", "steps=12", *few, "guard.rewind=true", *often, faults=bad),
            "no-way-back": case("no-way-back", "steps=12", *few, "guard.rewind=true", faults=bad),
            "spike": case("spike", *spikes, faults=high),
            "skipped": case("skipped", *spikes, "guard.skip_spikes=true", faults=high),
            "full-disk": case("full-disk", "steps=8", *quick, *often, faults=(("full_disk", 1),)),
            "signal in a save": case(
                "signal", "steps=400", *quick, *often, faults=(("signal_in_save", cases.USR2), ("slow_steps", 0.02))
            ),
            "time limit": case(
                "limit", "steps=4000", *quick, "guard.stop_margin=2", faults=(("deadline", 6.0), ("slow_steps", 0.05))
            ),
            "clock": case(
                "clock", "steps=40", *quick, "checkpoint.minutes=0.01", "checkpoint.keep=99",
                faults=(("slow_steps", 0.05),),
            ),
            "slow-data": case(
                "slow-data", "steps=8", *quick, "guard.straggler_every=8", faults=(("slow_data", 1, 0.6),),
            ),
            "slow device": case(
                "slow", "steps=8", *quick, "guard.straggler_every=4", faults=(("slow_device", 1, 4),),
            ),
        },
    )  # fmt: skip


def with_faults(faults, *arguments):
    return cases.run(*arguments, faults=faults)


def lines(root, run_id, name):
    path = root / run_id / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def committed(root, run_id):
    return sorted(int(path.parent.name[5:]) for path in (root / run_id / "checkpoints").glob("step-*/COMMITTED"))


def test_a_diverged_run_ends_with_its_samples_in_a_file(runs_with_faults):
    root, results = runs_with_faults
    for result in results["diverged"]:
        assert "3 steps in a row, 5 to 7, had no finite loss or gradient" in result["error"]
        assert "guard.rewind=true" in result["error"]
    bad = lines(root, "diverged", "bad_steps.jsonl")
    assert [entry["step"] for entry in bad] == [5, 6, 7]
    assert all(len(entry["samples"]) == 4 and entry["loss"] is None and entry["damaged"] == [] for entry in bad)
    assert status(root, "diverged")["exit_status"] == EXIT_FAILED


def test_rewinding_takes_the_weights_from_before_and_goes_on_behind_the_bad_batches(runs_with_faults):
    root, results = runs_with_faults
    assert [result.get("ending") for result in results["rewound"]] == ["finished"] * 2, results["rewound"]
    (event,) = [e for e in lines(root, "rewound", "events.jsonl") if e["event"] == "went back"]
    assert event["checkpoint"] == "step-00000004" and (event["first"], event["last"]) == (5, 7)
    training, _ = metrics(root, "rewound")
    assert [entry["step"] for entry in training] == list(range(12))
    assert [entry["step"] for entry in training if entry["train/loss"] is None] == [5, 6, 7]
    state = json.loads((root / "rewound" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["step"] == state["data"]["position"] == 12
    # Of 12 attempted steps: 4 lie before the checkpoint, number 4 was taken back, 3 were bad, the others follow.
    assert max(state["optimizer_steps"].values()) == 12 - 3 - 1 - (event["step"] - 8) * 1


def test_without_a_checkpoint_from_before_the_run_ends(runs_with_faults):
    assert "no checkpoint from before them to return to" in runs_with_faults[1]["no-way-back"][0]["error"]


def test_a_spike_is_recorded_with_its_samples(runs_with_faults):
    root, results = runs_with_faults
    assert results["spike"][0]["ending"] == "finished"
    entries = [entry for entry in lines(root, "spike", "bad_steps.jsonl") if entry["step"] == 50]
    assert entries[0]["what"] == "spike" and entries[0]["spikes"] == ["loss", "grad_norm"]
    assert len(entries[0]["samples"]) == 4
    assert all("train/skipped" not in entry for entry in metrics(root, "spike")[0])


def test_a_skipped_spike_leaves_weights_and_moments_as_they_were(runs_with_faults):
    root, results = runs_with_faults
    assert results["skipped"][0]["ending"] == "finished"
    training, _ = metrics(root, "skipped")
    assert [entry["step"] for entry in training if entry.get("train/skipped")] == [50]
    for name, count in (("spike", 60), ("skipped", 59)):
        state = json.loads((root / name / "checkpoints" / "step-00000060" / "state.json").read_text())
        assert max(state["optimizer_steps"].values()) == count
        assert len(state["history"]) >= 59


def test_the_limit_of_a_step_does_not_depend_on_when_sums_were_read():
    """Judges that know different numbers of later steps give one limit: a resumed run skips what the other did."""

    def judged(steps):
        judge = SpikeDetector(GuardConfig(skip_spikes=True), ["one"], [])
        for step in range(steps):
            loss, norm = 1.0 + 0.1 * (step % 7), 2.0 + 0.1 * (step % 5)
            judge.look(StepSums(step, loss, 1.0, 1.0, norm, Flags(), True, extra={}, wait=0.0), "one")
        return judge

    assert judged(40).limit(40, "one") == judged(39).limit(40, "one") < 10
    assert judged(ENOUGH).limit(ENOUGH, "one") == float("inf")


def test_each_expert_has_a_limit_of_its_own():
    """High noise has norms about 10, low noise about 1: 5 is a spike of the one and less than usual of the other."""
    judge = SpikeDetector(GuardConfig(skip_spikes=True), ["high", "low"], [])

    def looked(step: int, norm: float):
        kind = kind_of(("high", "low")[step % 2], CLIP)
        return judge.look(StepSums(step, 1.0, 1.0, 1.0, norm, Flags(), True, extra={}, wait=0.0), kind)

    for step in range(2 * ENOUGH + 4):
        assert not looked(step, (10.0 if step % 2 == 0 else 1.0) + 0.01 * (step % 7)).bad
    step = 2 * ENOUGH + 4  # of high noise
    assert judge.limit(step, kind_of("high", CLIP)) > 10 and judge.limit(step + 1, kind_of("low", CLIP)) < 5
    assert not looked(step, 5.0).bad
    found = looked(step + 1, 5.0)
    assert found.spikes == ["grad_norm"] and found.skipped


def test_steps_of_the_warm_up_are_neither_judged_nor_compared_with():
    """Norms rise from 0.4 to 4 as the learning rate arrives, as in the quickstart: no spike. 200 is one at step 30, 60
    and 80 without a warm-up, and with one of 40 steps as soon as enough steps came after it."""

    def spikes(warmup: int) -> list[int]:
        judge = SpikeDetector(GuardConfig(skip_spikes=True), ["one"], [], warmup)
        bad = []
        for step in range(90):
            norm = 200.0 if step in (30, 60, 80) else 0.4 if step < 40 else 4.0
            if judge.look(StepSums(step, 1.0, 1.0, 1.0, norm, Flags(), True, extra={}, wait=0.0), "one").bad:
                bad.append(step)
        assert judge.limit(warmup - 1, "one") == float("inf")
        return bad

    assert spikes(warmup=40) == [80]
    assert spikes(warmup=0)[:2] == [30, 40] and {60, 80} < set(spikes(warmup=0))


def test_steps_without_sound_or_picture_are_judged_among_their_like():
    """Nine in ten steps teach sound alone, at a tenth of the loss: the tenth is no spike, and not skipped for ever."""
    judge = SpikeDetector(GuardConfig(skip_spikes=True), ["high", "low"], [])
    both, sound = CLIP, replace(CLIP, has_video=False)
    found = []
    for step in range(600):
        kind = kind_of(("high", "low")[step % 2], sound if step % 10 else both)
        loss = (0.1 if step % 10 else 1.0) + 0.001 * (step % 7)
        found.append(judge.look(StepSums(step, loss, 1.0, 1.0, 2 * loss, Flags(), True, extra={}, wait=0.0), kind))
    assert not any(one.bad for one in found)
    assert judge.limit(600, kind_of("high", both)) > 2.0 > 1.0 > judge.limit(601, kind_of("high", sound))
    kinds = {kind_of(e, replace(CLIP, has_video=v, has_audio=a)) for e in ("high", "low") for v, a in MODALITIES}
    assert len(kinds) == 5  # without a picture the expert plays no part


def test_a_full_disk_in_a_save_does_not_end_the_run(runs_with_faults):
    root, results = runs_with_faults
    assert [result["ending"] for result in results["full-disk"]] == ["finished"] * 2
    assert committed(root, "full-disk") == [6, 8]
    (event,) = [e for e in lines(root, "full-disk", "events.jsonl") if e["event"] == "checkpoint failed"]
    assert event["step"] == 2 and "No space left on device" in event["error"]
    assert "WARNING: checkpoint" in results["full-disk"][0]["said"]


def test_metrics_wait_for_a_full_disk(tmp_path):
    """The file may not grow for a while; nothing is lost or cut in two."""
    file = JsonLines(tmp_path / "metrics.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file.append({"step": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        for step in range(1, 5):
            file.append({"step": step})
        with pytest.raises(OSError) as caught:
            file.sync()
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    file.append({"step": 5, "loss": NAN})
    file.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in written] == list(range(6)) and written[5]["loss"] is None


def test_a_signal_in_the_middle_of_a_save_stops_the_run_after_it(runs_with_faults):
    root, results = runs_with_faults
    assert [result["ending"] for result in results["signal in a save"]] == ["stopped"] * 2
    stopped = status(root, "signal")
    assert stopped["state"] == "stopped" and stopped["step"] < 60 and stopped["step"] in committed(root, "signal")


def test_a_run_stops_before_its_time_limit(runs_with_faults):
    root, results = runs_with_faults
    assert [result["ending"] for result in results["time limit"]] == ["stopped"] * 2
    assert committed(root, "limit") == [status(root, "limit")["step"]]


def test_checkpoints_come_by_the_clock_of_the_first_rank(runs_with_faults):
    root, results = runs_with_faults
    assert [result["ending"] for result in results["clock"]] == ["finished"] * 2
    steps = committed(root, "clock")
    assert len(steps) >= 3 and steps[-1] == 40 and steps[0] < 35


def test_a_rank_that_waits_for_its_data_is_named(runs_with_faults):
    """In the metrics of the last step too, which are complete when the ranks are compared after others."""
    root, _ = runs_with_faults
    slow = [e for e in lines(root, "slow-data", "events.jsonl") if e["event"] == "slow rank" and e["what"] == "data"]
    assert slow and {e["rank"] for e in slow} == {1}
    assert any("1" in entry.get("perf/slow_ranks", "") for entry in lines(root, "slow-data", "metrics.jsonl"))


def test_a_rank_whose_device_is_slow_is_named(runs_with_faults):
    root, _ = runs_with_faults
    slow = [e for e in lines(root, "slow", "events.jsonl") if e["event"] == "slow rank" and e["what"] == "compute"]
    assert 1 in {e["rank"] for e in slow} and max(e["ratio"] for e in slow if e["rank"] == 1) > 2


def test_a_rank_that_hangs_leaves_the_stacks_of_all_and_the_run_ends_for_another_attempt(tmp_path):
    chaos.dataset(tmp_path)
    hang = chaos.start(
        tmp_path, "hung", 2, "steps=50", "guard.watchdog_seconds=4", "guard.timeout_minutes=0.2", "validation.every=0",
        die={1: "hang:4"}, forked=False, seconds=150,
    )  # fmt: skip
    assert hang.statuses == [EXIT_RETRY, EXIT_RETRY], hang
    stacks = [(tmp_path / "hung" / "logs" / f"stacks-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "no progress for" in stacks[0] and "forward_backward" in stacks[0]
    assert "in hang" in stacks[1] or "chaos_rank.py" in stacks[1]
    assert status(tmp_path, "hung")["state"] == "failed" and status(tmp_path, "hung")["exit_status"] == EXIT_RETRY


def test_a_rank_that_keeps_the_interpreters_lock_leaves_its_stack_and_ends_by_a_signal(tmp_path):
    chaos.dataset(tmp_path)
    held = chaos.start(
        tmp_path, "held", 2, "steps=50", "guard.watchdog_seconds=3", "guard.timeout_minutes=0.1", "validation.every=0",
        die={1: "gil:4"}, forked=False, seconds=150,
    )  # fmt: skip
    assert held.statuses == [EXIT_RETRY, -signal.SIGALRM], held  # both are started again
    stack = (tmp_path / "held" / "logs" / "stacks-rank1.txt").read_text()
    assert "chaos_rank.py" in stack and "outer" in stack and "Timeout" in stack


def test_a_start_up_that_makes_no_progress_is_ended(tmp_path):
    """The second rank never opens its data."""
    chaos.dataset(tmp_path)
    held = chaos.start(
        tmp_path, "asleep", 2, "steps=50", "guard.startup_minutes=0.05", "guard.timeout_minutes=0.1",
        "validation.every=0", die={1: "asleep:1"}, forked=False, seconds=150,
    )  # fmt: skip
    assert held.statuses == [EXIT_RETRY, EXIT_RETRY], held
    assert "in the start-up" in (tmp_path / "asleep" / "logs" / "stacks-rank1.txt").read_text()


def test_sigterm_while_a_run_starts_is_not_lost_and_a_bad_config_is_no_case_for_a_restart(tmp_path):
    """The first rank is asked to stop while it still waits for the second one."""
    chaos.dataset(tmp_path)
    command = [
        sys.executable, "-m", "train", *chaos.SETTING, f"run.root={tmp_path}", "run.id=early", "steps=100000",
        f"data.path={tmp_path / 'data'}",
    ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(chaos.REPOSITORY),
    }  # fmt: skip
    first = subprocess.Popen(command, env=environment | {"RANK": "0"}, cwd=tmp_path)
    handled = f"/proc/{first.pid}/status"
    caught = 0
    while not caught & 1 << (signal.SIGTERM - 1):  # until its handler is there
        time.sleep(0.05)
        with open(handled) as file:
            caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
    first.send_signal(signal.SIGTERM)
    second = subprocess.Popen(command, env=environment | {"RANK": "1"}, cwd=tmp_path)
    try:
        assert [first.wait(timeout=120), second.wait(timeout=120)] == [0, 0]
    finally:
        first.kill()
        second.kill()
    assert status(tmp_path, "early") == {"state": "stopped", "time": status(tmp_path, "early")["time"], "step": 0}
    wrong = subprocess.run([*command, "optim.clip=-1"], env=environment | {"RANK": "0"}, cwd=tmp_path)
    assert wrong.returncode == EXIT_FAILED


@pytest.mark.parametrize(
    "error,expected,peer",
    [
        (RunError("x"), EXIT_FAILED, False),
        (RunError("x", retry=True), EXIT_RETRY, False),
        (OSError(5, "Input/output error"), EXIT_RETRY, False),
        (PermissionError(13, "Permission denied"), EXIT_FAILED, False),
        (FileNotFoundError(2, "No such file or directory"), EXIT_FAILED, False),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]"), EXIT_RETRY, True),
        (TypeError("a bug"), EXIT_FAILED, False),
    ],
)
def test_exit_statuses_tell_whether_to_try_again(error, expected, peer):
    assert exit_status(error) == expected and lost_peer(error) is peer


def chaotic(folder, what):
    """In a process of its own, which forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.chaos", str(folder / "chaos"), what],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(chaos.REPOSITORY)},
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_point_of_the_chaos_is_passed(tmp_path):
    """One that the trainer never passes would kill nobody."""
    chaos.dataset(tmp_path)
    for steps in (6, 9):  # start and resume; with 3 checkpoints one is deleted
        noted = chaos.start(
            tmp_path, "noted", 1, f"steps={steps}", "checkpoint.every=2", "checkpoint.minutes=0", forked=False,
            die={0: f"passed:{tmp_path / 'passed.txt'}"},
        )  # fmt: skip
        assert noted.statuses == [0], noted.said
    passed = set((tmp_path / "passed.txt").read_text().split("\n"))
    assert {point for point in chaos.POINTS if point != "time"} - passed == set()


@pytest.mark.long
def test_a_chaotic_run_equals_the_unbroken_one(tmp_path):
    """The short form of `make chaos`; `make test` has tests/train/test_run.py."""
    assert "killed 6 times" in chaotic(tmp_path, "6")


@pytest.mark.long
def test_killed_runs_go_on_at_other_numbers_of_ranks_and_under_another_engine(tmp_path):
    """2 -> 1 -> 4 (sequence parallel) -> 2, and FSDP2 -> ZeRO 2 -> FSDP2."""
    said = chaotic(tmp_path, "travel")
    assert "ranks: 3 kills" in said and "engines: 2 kills" in said
