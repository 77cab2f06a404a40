"""Python's garbage waits for the chosen steps, on every rank, and is collected there."""

import gc
import weakref

from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from train.faults.garbage import Garbage

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)


class Ring:
    """Refers to itself, so that only the collector takes it away."""

    def __init__(self) -> None:
        self.me = self


def test_what_refers_to_itself_lives_until_the_chosen_step():
    def left(garbage: Garbage, step: int) -> bool:
        kept = weakref.ref(Ring())
        for _ in range(3000):  # Python's own collector starts after some hundreds
            Ring()
        garbage.after(step)
        return kept() is not None

    with Garbage(3) as garbage:
        garbage.started()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        assert [left(garbage, step) for step in range(1, 7)] == [True, True, False, True, True, False]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with Garbage(0):
        assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with Garbage(3):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def collections(root, data) -> list[int]:
    """The steps of a run after which the collector of this rank ran; 0: before the first."""
    from train.faults import garbage

    seen: list[int] = []
    plain, current = garbage.Garbage.after, 0

    def after(self, step):
        nonlocal current
        current = step
        return plain(self, step)

    def noticed(phase, _):
        if phase == "start" and not gc.isenabled():
            seen.append(current)

    garbage.Garbage.after = after
    gc.callbacks.append(noticed)
    try:
        ending = runs.train(root, data, "garbage", "steps=7", "guard.gc_every=3")
    finally:
        gc.callbacks.remove(noticed)
        garbage.Garbage.after = plain
    assert ending["ending"] == "finished"
    return seen


def test_all_ranks_of_a_run_collect_after_the_same_steps_and_no_others(tmp_path):
    make_dataset(tmp_path / "data", [(CLIP, 9)])
    found = run_cases(2, {"run": (collections, (tmp_path, tmp_path / "data"))})["run"]
    assert found == [[0, 3, 6], [0, 3, 6]]
