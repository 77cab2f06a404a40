"""The user's time-out reaches every process group, and deadlines come in their order."""

from pathlib import Path

from data.clip import Bucket
from tests.distributed import TIMEOUT, run_cases
from tests.shards import make_dataset
from tests.train.parallel import timeout_cases
from train.faults.watchdog import NCCL_RECORD, deadlines

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)


def test_every_group_of_a_run_has_the_users_time_out_and_a_rank_that_stays_away_is_given_up(tmp_path: Path) -> None:
    """All ranks, replicas, ring, ulysses, the data's own; and the saver's, which has a key of its own."""
    data = make_dataset(tmp_path / "data", [(CLIP, 8)])
    results = run_cases(
        4,
        {
            "run": (timeout_cases.groups_of_a_run, (tmp_path, data, "checkpoint.timeout_minutes=7")),
            "hang": (timeout_cases.hang_in_a_sub_group, (2.0,)),
        },
    )
    for ending, groups in results["run"]:
        assert ending == "finished"
        assert {size for size, _ in groups} >= {1, 2, 4} and len(groups) >= 6
        usual = [timeout for _, timeout in groups if timeout != 7 * 60]
        assert usual == [TIMEOUT.total_seconds()] * (len(groups) - 1)
    assert 1.5 < results["hang"][0] < 5.5


def test_a_process_ends_only_after_nccl_could_write_its_record() -> None:
    for on_gpu in (False, True):
        ends = deadlines(300.0, 600.0, on_gpu)
        assert list(ends) == sorted(ends)
        assert ends.given_up == 900.0 and ends.ended - ends.given_up == (NCCL_RECORD if on_gpu else 0.0)
        assert ends.ended < ends.stacks < ends.killed
