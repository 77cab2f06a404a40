"""parallel.deterministic, as far as it can be seen without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from model.bridge import resample

REPOSITORY = Path(__file__).parents[3]
# `mova train` that says, where a rank would join the others, what its torch is set to.
PROGRAM = """
import os, sys
import torch
import train.__main__ as program

def start(timeout):
    assert not torch.cuda.is_initialized()
    print("rank:", torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
          torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    sys.stdout.flush()
    os._exit(0)

program.start_process_group = start
program.PROGRAM.start()
"""


def start(tmp_path, *overrides, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "run.id=try1", f"run.root={tmp_path}", "data.path=none", *overrides],
        env=clean | {"PYTHONPATH": str(REPOSITORY)} | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_rank_is_deterministic_before_it_touches_a_gpu_and_only_where_it_is_asked_for(tmp_path):
    asked = start(tmp_path, "parallel.deterministic=true")
    assert "rank: True False True False :4096:8" in asked.stdout, asked.stderr
    assert "rank: False False False False None" in start(tmp_path).stdout


def test_a_workspace_that_does_not_repeat_is_refused_in_one_line(tmp_path):
    refused = start(tmp_path, "parallel.deterministic=true", CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert refused.returncode == 1 and "rank:" not in refused.stdout
    assert (
        refused.stderr.strip().splitlines()[-1].startswith("error: parallel.deterministic=true with CUBLAS_WORKSPACE")
    )


@pytest.mark.parametrize("steps,count", [(3, 7), (21, 403), (9, 4), (1, 5), (6, 6)])
def test_resampling_in_time_is_torch_s_with_a_backward_that_repeats(steps, count):
    g = torch.Generator().manual_seed(steps)
    x = torch.randn(2, steps, 5, generator=g, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, count, 5, generator=g, dtype=torch.float64)
    expected = interpolate(x.transpose(1, 2), size=count, mode="linear", align_corners=False).transpose(1, 2)
    found = resample(x, count)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(out, x, grad) for out in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    half = resample(x.detach().bfloat16(), count)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, expected.detach().bfloat16(), rtol=1e-2, atol=1e-2)
