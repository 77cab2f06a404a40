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
    assert found & (UNUSED | COMPILER | {"data.prepare"}) == set()


@pytest.mark.parametrize("program", ["train", "launch"])
def test_a_help_text_imports_no_compiler(program: str) -> None:
    assert imported(LISTED, [program, "--help"]) & (UNUSED | COMPILER) == set()


@pytest.mark.parametrize("given", [["--help"], ["status", "--help"]])
def test_the_list_of_programs_and_the_state_of_a_run_need_no_torch(given: list[str]) -> None:
    assert imported(LISTED, given) & {"torch", "numpy", *UNUSED} == set()
