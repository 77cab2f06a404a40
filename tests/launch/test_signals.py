"""What asks for a stop, of the launcher and of a worker; and what of other hands or jobs does not."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.errors import restarted
from core.run_dir import RunDir
from launch.attempts import Attempts, Limits
from launch.local.local import _StopSignals
from launch.status import standing
from train.checkpoint.checkpoint import MARKER
from train.checkpoint.uploads import waiting_uploads
from train.faults.stop import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def worker(stack: contextlib.ExitStack) -> Callable[[], bool]:
    return StopRequest().requested


def launcher(stack: contextlib.ExitStack) -> Callable[[], bool]:
    heard = stack.enter_context(_StopSignals())
    return lambda: heard.asked


@pytest.mark.parametrize("program", [worker, launcher])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_one_of_them_is_a_request_and_a_second_one_no_more(program: Callable, number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    with contextlib.ExitStack() as stack:
        asked = program(stack)
        assert not asked()
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert asked()


@pytest.mark.parametrize("program", [worker, launcher])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_when_it_began_stays_ignored(program: Callable, number: signal.Signals) -> None:
    """nohup ignores SIGHUP, a shell SIGINT for what it runs in the background: ssh ends, and the run goes on."""
    signal.signal(number, signal.SIG_IGN)
    with contextlib.ExitStack() as stack:
        asked = program(stack)
        os.kill(os.getpid(), number)
        assert not asked() and signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("name", "value", "stops"),
    [("MOVA_DEADLINE", "1", False), ("MOVA_DEADLINE", "nonsense", False), ("MOVA_DEADLINE", "in 5 s", True),
     ("MOVA_STARTED", "nonsense", False), ("MOVA_STARTED", "", False)],
)  # fmt: skip
def test_what_a_job_that_is_over_left_stops_no_run_that_is_started_by_hand(
    name: str, value: str, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell within an allocation that has ended; a limit that is still to come counts."""
    monkeypatch.setenv(name, str(time.time() + 5) if value == "in 5 s" else value)
    stop = StopRequest()
    stop.watch(tmp_path / "stop")
    stop.lead = 10.0
    assert stop.requested() is stops
    (tmp_path / "stop").touch()
    assert stop.requested()


def test_records_of_another_hand_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that lack what ours have, files that hold another kind of value: no traceback, no step that was not."""
    run = RunDir(tmp_path / "one")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("steps: 3\n")
    lines = ['{"event": "submitted"}', "{}", '{"event": "begin"}', '{"event": "end", "step": null}', '{"event": 7}']
    (run.root / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    (run.root / "events.jsonl").write_text('{"event": "checkpoint", "step": "many"}\n')
    for content in ("[]", "null", '"x"', '{"state": "stopped", "step": "x"}', '{"committed": null}'):
        run.status.write_text(content)
        assert run.known_commit() is None and standing(run).step == 0
        assert Attempts(run).objection(Limits(1, 1)) is None
        run.write_status("running")
        assert run.read_status()["state"] == "running"
    (run.root / "x").mkdir()
    (run.root / "x" / MARKER).write_text("{}")
    for content in ("[]", "{}", '{"waiting": null}', '{"waiting": ["../x", 3]}'):
        (run.root / "uploads.json").write_text(content)
        assert waiting_uploads(run.checkpoints) == []
    monkeypatch.setenv("MOVA_ATTEMPT", "nonsense")
    assert restarted() == 0
