"""Invariant 17: the attention backend that is asked for is the one that runs, and "auto" takes none that cannot.

The packages are stand-ins (flash_packages.py) that are really imported, in a process of its own.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from model.backends.choice import BACKENDS, choose
from model.backends.interface import Needs
from tests.child import run_child
from tests.model import flash_packages

REPOSITORY = Path(__file__).parents[2]
CUTE = "a cute folder that cannot be imported"
# name: (packages, compute capability, asked, deterministic)
SETS = {
    "flash2 with a cute folder": (("flash2", CUTE), (9, 0), "auto", False),
    "the same on an A100": (("flash2", CUTE), (8, 0), "auto", False),
    "flash2 asked for": (("flash2", CUTE), (9, 0), "flash2", False),
    "flash4 asked for, only its folder": (("flash2", CUTE), (9, 0), "flash4", False),
    "all": (("flash2", "flash3", "flash4"), (9, 0), "auto", False),
    "all, on Blackwell": (("flash2", "flash3", "flash4"), (10, 0), "auto", False),
    "flash4 alone": (("flash4",), (9, 0), "auto", False),
    "flash3": (("flash3",), (9, 0), "auto", False),
    "old flash3": (("old flash3",), (9, 0), "flash3", False),
    "nothing": ((), (9, 0), "auto", False),
    "nothing, flash2 asked for": ((), (9, 0), "flash2", False),
    "no function": (("flash2 without its function",), (8, 0), "auto", False),
    "no backward": (("flash3 without its backward",), (9, 0), "flash3", False),
    "a broken library": (("flash2 whose library does not load", "flash3 that asserts"), (9, 0), "auto", False),
    "another argument": (("flash3 that wants more",), (9, 0), "flash3", False),
    "another argument of the forward": (("flash3 that wants more of q",), (9, 0), "flash3", False),
    "another log-sum-exp": (("flash3 with another log-sum-exp",), (9, 0), "flash3", False),
    "no log-sum-exp": (("flash3 that never gives it",), (9, 0), "flash3", False),
    "deterministic flash2": (("flash2",), (8, 0), "auto", True),
    "deterministic flash3": (("old flash3",), (9, 0), "auto", True),
    "deterministic flash4": (("flash4",), (10, 0), "auto", True),
    "flash4 that cannot": (("flash4 without deterministic",), (10, 0), "auto", True),
    "flash4 that cannot, asked for": (("flash4 without deterministic",), (10, 0), "flash4", True),
    "cudnn, deterministic": ((), (9, 0), "cudnn", True),
}
# What must be said, and what was chosen (None: refused).
SAID = {
    "flash2 with a cute folder": (
        "cudnn",
        "import of flash_attn.cute fails: ModuleNotFoundError: No module named 'cut",
    ),
    "the same on an A100": ("flash2", "not cudnn: is built for compute capability 9.x, 10.x, this device has 8.0"),
    "flash2 asked for": ("flash2", ""),
    "flash4 asked for, only its folder": (None, "'flash4' cannot run here: flash4 import of flash_attn.cute fails"),
    "all": ("flash4", ""),
    "all, on Blackwell": ("flash4", ""),
    "flash4 alone": ("flash4", ""),
    "flash3": ("flash3", "not flash4: the package flash_attn.cute is not installed"),
    "old flash3": ("flash3", ""),
    "nothing": ("cudnn", "not flash3: the package flash_attn_interface is not installed"),
    "nothing, flash2 asked for": (None, "flash2 the package flash_attn is not installed; set auto, or another backend"),
    "no function": ("sdpa", "not flash2: flash_attn has no usable flash_attn_func: AttributeError"),
    "no backward": (None, "flash_attn_interface has no usable _flash_attn_backward: AttributeError"),
    "a broken library": ("cudnn", "import of flash_attn_interface fails: RuntimeError: only sm_90a"),
    "another argument": (None, "_flash_attn_backward requires an argument 'block_mask' that is unknown here"),
    "another argument of the forward": (None, "flash_attn_func requires an argument 'descale' that is unknown here"),
    "another log-sum-exp": (None, "attention backend flash3 gives no log-sum-exp [B, H, L]"),
    "no log-sum-exp": (None, "attention backend flash3 gives no log-sum-exp [B, H, L]"),
    "deterministic flash2": ("flash2", ""),
    "deterministic flash3": ("flash3", ""),
    "deterministic flash4": ("flash4", ""),
    "flash4 that cannot": ("sdpa", "not flash4: _flash_attn_bwd has no argument 'deterministic'"),
    "flash4 that cannot, asked for": (None, "flash4 _flash_attn_bwd has no argument 'deterministic'"),
    "cudnn, deterministic": (None, "cudnn has no deterministic backward"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    keys = ("capability", "asked", "deterministic")
    for name, (packages, *_) in SETS.items():
        flash_packages.write(folder / name, *packages)
    sets = {name: dict(zip(keys, case, strict=True)) for name, (_, *case) in SETS.items()}
    (folder / "sets.json").write_text(json.dumps(sets))
    command = [sys.executable, "-m", "tests.model.choose_backends", str(folder)]
    run_child(command, cwd=REPOSITORY, timeout=300)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", SETS)
def test_what_is_chosen_can_be_imported_and_called(found, name):
    chosen, said = SAID[name]
    result = found[name]
    assert result.get("chosen") == chosen, result
    text = result["said"] if chosen else result["refused"]
    assert said in text and "\n" not in text
    if chosen and chosen.startswith("flash"):
        assert result["error"] < 1e-12
        assert len(result["deterministic"]) >= 4 and set(result["deterministic"]) == {SETS[name][3]}


def test_every_case_has_its_answer():
    assert SETS.keys() == SAID.keys()


@pytest.mark.parametrize(
    "asked,needs,message",
    [
        ("flash2", Needs("cpu", torch.bfloat16), "flash2 needs a CUDA device, not cpu"),
        ("cudnn", Needs("cuda", torch.float32, (9, 0)), "cudnn needs bfloat16 or float16, not float32"),
        ("auto", Needs("cuda", torch.float32, (9, 0), blocks=True), "sdpa needs bfloat16 or float16, not float32"),
        ("flash3", Needs("cuda", torch.bfloat16, (8, 6)), "flash3 is built for .* 9.x, this device has 8.6"),
    ],
)  # fmt: skip
def test_a_backend_that_cannot_run_says_why(asked, needs, message):
    with pytest.raises(RuntimeError, match=message):
        choose(asked, needs)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'flash9' is not one of auto, sdpa"):
        choose("flash9", Needs("cpu", torch.float32))


def test_auto_on_a_cpu_is_torch_and_nothing_is_said_of_what_needs_a_gpu():
    assert choose("auto", Needs("cpu", torch.float32, blocks=True)).describe() == "sdpa"
    assert set(BACKENDS) == {"auto", "sdpa", "cudnn", "flash2", "flash3", "flash4"}
