"""tools.bench.ranks: what the ranks of a benchmark give, and how one that fails ends all."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from core.errors import UserError
from tools.bench import ranks


def add(number: int) -> tuple[int, int]:
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail(how: str, note: str) -> None:
    """Rank 1 fails; rank 0 waits, and takes SIGTERM for a request as a training run does."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    if dist.get_rank() == 0:
        Path(note).write_text(str(os.getpid()))
        time.sleep(300)
    while not Path(note).exists():
        time.sleep(0.01)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("size=3: give an even one") if how == "refused" else TypeError("no such thing")


def test_each_rank_gives_its_own() -> None:
    assert ranks.on_ranks(2, add, 10) == [(0, 21), (1, 21)]


@pytest.mark.long
def test_alone_each_is_a_group() -> None:
    assert ranks.on_ranks(2, add, 10, together=False) == [(0, 10), (0, 10)]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("refused", UserError, "^size=3: give an even one$"),
        pytest.param("broken", ProcessRaisedException, "TypeError: no such thing", marks=pytest.mark.long),
        ("killed", ProcessExitedException, "SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_all_in_time(
    how: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    with pytest.raises(error, match=words):
        ranks.on_ranks(2, fail, how, str(tmp_path / "rank0"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "rank0").read_text()), 0)
