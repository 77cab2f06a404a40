"""A start imports what it uses: no package that costs seconds in each process of a launch, and none for a help text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.clip import Bucket
from tests.launch.test_launch import DIM, REPOSITORY, SMALL
from tests.shards import make_dataset

UNUSED = {  # by a training of FSDP2 on local shards without W&B
    "av", "boto3", "botocore", "cv2", "deepspeed", "diffusers", "matplotlib", "onnxruntime", "pandas", "pyarrow",
    "scipy", "sklearn", "torchaudio", "torchvision", "transformers", "wandb", "webdataset",
}  # fmt: skip
COMPILER = {"torch._dynamo", "torch._inductor", "triton"}  # a second; FSDP2 imports it when it wraps a model
SHARDING = {  # half a second: of those that train alone
    "sympy", "torch.distributed.checkpoint", "torch.distributed.elastic.agent", "torch.distributed.fsdp",
    "torch.distributed.tensor", "train.engine.engine",
}  # fmt: skip
IMPORTED = "print(json.dumps(sorted(sys.modules)))"
TRAINED = f"""
import json, os, sys
import train.__main__ as program
def leave():
    {IMPORTED}
    sys.stdout.flush()
    os._exit(0)
program.leave = leave
program.PROGRAM.start()
"""
LAUNCHED = f"""
import json, sys
import launch.__main__ as program
from launch.local.local import Ending
def run_local(*_):
    {IMPORTED}
    return Ending("not run", False, False)
program.run_local = run_local
program.PROGRAM.start()
"""
FORKED = f"""
import json, os, sys, threading
import torch
import launch.local.ranks as program
asked = []
for owner, names in (
    (torch.cuda, ("is_available", "device_count", "_lazy_init")), (torch._C, ("_cuda_getDeviceCount",))
):
    for name in names:
        setattr(owner, name, lambda *_, name=name: asked.append(name))
def fork(of_ranks, *_):
    assert of_ranks.given.config.run.id == "one" and of_ranks.given.plain["steps"] == 1
    assert threading.active_count() == 1, threading.enumerate()
    assert asked == [], "a rank that was forked could not use a GPU"
    {IMPORTED}
    sys.stdout.flush()
    os._exit(0)
program._fork = fork
os.environ |= dict(LAUNCHER_PID="1", MOVA_RANKS="2", MOVA_REPORT="1", MOVA_CODE=os.environ["PYTHONPATH"])
program.main()
"""
LISTED = f"""
import atexit, json, sys
from tools.mova import main
atexit.register(lambda: {IMPORTED})
sys.exit(main())
"""


def imported(code: str, arguments: list[str], status: int = 0) -> set[str]:
    """The modules that a process of this code has imported in the end."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(tmp_path / "data", [(bucket, 8)], dim=DIM)
    return [*SMALL, "steps=1", f"run.root={tmp_path}", "run.id=one", f"data.path={tmp_path / 'data'}"]


def test_training_imports_nothing_that_it_does_not_use(arguments: list[str]) -> None:
    found = imported(TRAINED, arguments)
    assert "train.step" in found
    assert found & UNUSED == set()


def test_the_launcher_imports_nothing_that_it_does_not_use(arguments: list[str]) -> None:
    found = imported(LAUNCHED, arguments, status=1)
    assert "launch.local.local" in found
    assert found & (UNUSED | COMPILER | SHARDING | {"data.prepare"}) == set()


def test_ranks_share_what_they_import_and_the_config_and_could_still_use_a_gpu(arguments: list[str]) -> None:
    """Before the first fork everything is there that two ranks of FSDP2 need, and nothing that a fork breaks."""
    found = imported(FORKED, arguments)
    assert {"train.loop", "torch.distributed.fsdp", "torch._dynamo", "train.checkpoint.saver"} <= found
    assert found & UNUSED == set()


@pytest.mark.parametrize("program", ["train", "launch"])
def test_a_help_text_imports_no_compiler(program: str) -> None:
    assert imported(LISTED, [program, "--help"]) & (UNUSED | COMPILER | SHARDING) == set()


@pytest.mark.parametrize("given", [["--help"], ["status", "--help"]])
def test_the_list_of_programs_and_the_state_of_a_run_need_no_torch(given: list[str]) -> None:
    assert imported(LISTED, given) & {"torch", "numpy", *UNUSED} == set()
