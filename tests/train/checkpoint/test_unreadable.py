"""A checkpoint that can't be looked at is never taken for absent or damaged, and none is deleted by a second save."""

import errno

import pytest

from tests.distributed import run_cases
from tests.train.checkpoint import unreadable_cases as cases

BOTH = ["step-00000001", "step-00000002"]
REFUSED = {
    # how the newest is out of reach: what the message names, exit status at a start that somebody typed
    "no permission for its marker": (("call", "stat", errno.EACCES, "02/COMMITTED"), "02/COMMITTED: Permission", 1),
    "its marker can't be looked at": (("call", "stat", errno.EIO, "02/COMMITTED"), "02/COMMITTED: Input/output", 75),
    "its folder can't be looked at": (("call", "stat", errno.EIO, "step-00000002"), "02: Input/output", 75),
    "its files can't be looked at": (("call", "stat", errno.EIO, "02/.metadata"), "02/.metadata: Input/output", 75),
    "nothing can be listed": (("call", "listdir", errno.EIO, ""), "Input/output error", 75),
    "a rank can't read a file": (("shard", 2), "cannot be read (Input/output error); to go on from the checkpoint", 75),
    "a link leads nowhere": (("disk", cases.link_to_nowhere), "step-00000003 is a link to", 1),
}
FOUND = {
    "an older one can't be looked at": ("call", "stat", errno.EIO, "01/COMMITTED"),
    "a file has a checkpoint's name": ("disk", cases.file_in_place),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("unreadable")
    looks = {name: arguments for name, (arguments, _, _) in REFUSED.items()} | FOUND
    folders = {name: root / name.replace(" ", "-").replace("'", "") for name in [*looks, "again", "pruned"]}
    for folder in folders.values():
        folder.mkdir()
    return run_cases(
        2,
        {name: (cases.look, (folders[name], *arguments)) for name, arguments in looks.items()}
        | {"again": (cases.again, (folders["again"],)), "pruned": (cases.pruned, (folders["pruned"],))},
    )


@pytest.mark.parametrize("name", REFUSED)
def test_the_newest_out_of_reach_is_refused_on_all_ranks_and_nothing_is_touched(outcomes, name):
    _, words, status = REFUSED[name]
    for outcome in outcomes[name]:
        assert words in outcome["error"] and outcome["status"] == status
        assert [entry for entry in outcome["left"] if entry != "step-00000003"] == BOTH


@pytest.mark.parametrize("name", FOUND)
def test_what_is_in_nobodys_way_is_left_alone(outcomes, name):
    for outcome in outcomes[name]:
        assert outcome["found"] == "step-00000002"
        assert set(BOTH) <= set(outcome["left"]) <= {*BOTH, "step-00000003"}


def test_a_second_save_of_a_step_deletes_nothing(outcomes):
    for outcome in outcomes["again"]:
        assert "already exists" in outcome["error"] and outcome["whole"]


def test_a_damaged_marker_of_an_old_one_ends_no_rotation(outcomes):
    assert outcomes["pruned"][0] == ["step-00000001", "step-00000004"]
