"""Whole training runs inside the ranks of a test: config as a user writes it, through Hydra, to `train.loop.run`."""

import io
import json
import os
import signal
from contextlib import redirect_stderr
from pathlib import Path

import torch
import torch.distributed as dist

from core.errors import UserError
from train import loop
from train.config import compose_train
from train.parallel.mesh import make_layout

SMALL = [
    "model.video.dim=48", "model.video.num_heads=1", "model.video.num_layers=2", "model.video.ffn_dim=64",
    "model.video.freq_dim=32", "model.audio.dim=48", "model.audio.num_heads=1", "model.audio.num_layers=1",
    "model.audio.ffn_dim=64", "model.audio.freq_dim=32", "model.video.text_dim=6", "model.audio.text_dim=6",
    "model.text_length=4", "objective=phase2", "optim.warmup=2", "optim.lr_tower=1e-2", "optim.lr_bridge=1e-2",
    "data.batch_size=4", "data.shuffle_shards=2", "monitor.wandb=disabled", "validation.every=3",
    "validation.samples=3",
]  # fmt: skip


def train(
    root: Path,
    data: Path,
    run_id: str,
    *overrides: str,
    kill_after: int | None = None,
    poison: int | None = None,
    of_source: bool = False,
) -> dict:
    """One run; returns how it ended, or the one message that it ended with. `kill_after`: SIGTERM to this rank's own
    process when that many steps are done; `poison`: a NaN in a latent of rank 1 in that step; `of_source`: the model is
    that of the weights."""
    small = [given for given in SMALL if not (of_source and given.startswith("model."))]
    arguments = [*small, f"run.root={root}", f"run.id={run_id}", f"data.path={data}", *overrides]
    restore = loop.forward_backward
    done = 0

    def counted(*args, **kwargs):
        nonlocal done
        done += 1
        if done == kill_after:
            os.kill(os.getpid(), signal.SIGTERM)
        if done == poison and dist.get_rank() == 1:
            args[1][0].batch.video[0, 0, 0, 0, 0] = float("nan")
        return restore(*args, **kwargs)

    loop.forward_backward = counted  # type: ignore[assignment]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            config, resolved = compose_train(arguments)
            ending = loop.run(config, resolved, make_layout(config.parallel, torch.device("cpu")))
        return {"ending": ending, "said": said.getvalue()}
    except UserError as error:
        return {"error": str(error), "said": said.getvalue()}
    finally:
        loop.forward_backward = restore


def metrics(root: Path, run_id: str) -> tuple[list[dict], list[dict]]:
    """(training records, validation records) of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (root / run_id / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return [x for x in lines if "train/loss" in x], [x for x in lines if "valid/loss" in x]


def status(root: Path, run_id: str) -> dict:
    return json.loads((root / run_id / "status.json").read_text())
