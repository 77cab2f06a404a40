"""The process that forks ranks: how they ended, who is asked to end when, and what reaches them. The ranks here are
forks of this process that end as told."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from launch.local import ranks
from launch.local.ranks import KILL, Ended, Family, early, variables
from train.faults.stop import STOP_SIGNALS

Start = Callable[..., Family]
Ready = Callable[[], object]  # called by a rank once it does what it does


def sleep(ready: Ready, ignores: bool = False) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else signal.SIG_DFL)
    ready()
    time.sleep(60)
    return 0


def stubborn(ready: Ready) -> int:
    return sleep(ready, ignores=True)


def leave(status: int) -> Callable[[Ready], int]:
    return lambda ready: status


def die(ready: Ready) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.fixture
def family() -> Iterator[Start]:
    """family(what each rank does, ...) starts them, and returns when each does it or has ended; none outlives the test,
    and signals are handled as before."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, KILL)}
    pids: list[int] = []

    def start(*acts: Callable[[Ready], int], launcher: int | None = None) -> Family:
        begun = {}
        for rank, act in enumerate(acts):
            reading, writing = os.pipe()
            if (pid := os.fork()) == 0:
                status = 99
                try:
                    status = act(functools.partial(os.write, writing, b"."))
                finally:
                    os._exit(status)
            pids.append(pid)
            begun[pid] = rank
            os.close(writing)
            if not os.read(reading, 1):  # it ends without a word
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            os.close(reading)
        return Family(begun, os.getppid() if launcher is None else launcher)

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ranks_that_end_well_are_waited_for(family: Start) -> None:
    def later(ready: Ready) -> int:
        ready()
        time.sleep(0.5)
        return 0

    begin = time.monotonic()
    assert family(leave(0), later).wait() == Ended()
    assert time.monotonic() - begin > 0.4


def test_when_one_fails_the_others_are_asked_to_end_and_do_not_count(family: Start) -> None:
    assert family(sleep, leave(75), sleep).wait() == Ended(1, 75, (75,))


def test_of_those_that_fail_together_the_first_is_one_that_says_why(family: Start) -> None:
    """A status is of a rank that knows, a signal of one that was killed, perhaps for it."""
    ended = family(die, sleep, leave(1)).wait()
    assert ended == Ended(2, 1, (-9, 1))
    assert Ended.of_line(ended.as_line()) == ended and Ended.of_line(Ended().as_line()) == Ended()


def test_a_rank_that_does_not_end_is_killed(family: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.3)
    begin = time.monotonic()
    assert family(stubborn, leave(1)).wait() == Ended(1, 1, (1,))
    assert 0.3 < time.monotonic() - begin < 20


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_requests_to_stop_go_on_to_the_ranks(number: signal.Signals, family: Start) -> None:
    begun = family(sleep, sleep)
    os.kill(os.getpid(), number)
    ended = begun.wait()
    assert (ended.code, ended.codes) == (-signal.SIGTERM, (-signal.SIGTERM,)) and early(ended.codes)


def test_what_kills_them_leaves_no_choice(family: Start) -> None:
    begun = family(stubborn, stubborn)
    os.kill(os.getpid(), KILL)
    ended = begun.wait()
    assert (ended.code, ended.codes) == (-signal.SIGKILL, (-signal.SIGKILL,)) and not early(ended.codes)


def test_ranks_are_asked_to_stop_when_the_launcher_is_gone(family: Start) -> None:
    assert family(sleep, launcher=1 << 22).wait() == Ended(0, -signal.SIGTERM, (-signal.SIGTERM,))


def test_what_was_ignored_stays_ignored(family: Start) -> None:
    """nohup: the terminal goes, and the ranks train on."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    family(leave(0))
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_is_told_its_place() -> None:
    told = variables(1, 4, 29500)
    assert [told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["1", "1", "4", "4"]
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("127.0.0.1", "29500")
