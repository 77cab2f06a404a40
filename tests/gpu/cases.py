"""What a run does on a GPU, on fake tensors: every part of it once, and what it makes the host wait for.

python -m tests.gpu.cases out.json          # all cases; operators, syncs and copies of each, as a table too
python -m tests.gpu.cases out.json replicas # some of them
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from core.errors import RunError
from data.batch import Batch
from data.clip import Bucket, EncodedClip
from model.joint import JointConfig, JointTransformer
from model.sampler import SamplerConfig, sample
from tests.gpu.fakecuda import Watch, fake_cuda, fake_tensors, walk_backward
from tests.train.cases import tiny_config
from train.checkpoint.saver import HostCopy
from train.engine.engine import ShardedEngine
from train.engine.optim_config import OptimConfig
from train.faults import replica_check, straggler
from train.faults.replica_check import compare_replicas
from train.faults.straggler import StragglerProbe
from train.generate import WholeField
from train.monitor.log import MonitorConfig
from train.monitor.metrics import Metrics
from train.objective.noise import Prepared
from train.objective.objective import Draws, Objective, ObjectiveConfig, StepLosses
from train.objective.validate import ValidationConfig, Validator
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import place_model, recomputed_units
from train.parallel.step_sums import Flags, StepSignals
from train.parallel.workload import Workload
from train.step import forward_backward

WORLD = 8
WORK = Workload(2, (5, 8, 8), 40, 1)
BUCKET = Bucket(*WORK.grid, WORK.audio_steps, 24.0, True, True)
ALL_TOWERS = ("video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge")
Report = dict[str, Any]


@dataclass
class Parts:
    """A model under one layout, with a batch for it."""

    config: JointConfig
    layout: Layout
    engine: ShardedEngine
    batch: Prepared
    parallel: ParallelConfig
    calls: dict[str, int]  # functions of the last backward, by name

    def forward_backward(self) -> StepLosses:
        """One micro-batch; the gradients of the parameters that take part are zeros."""
        losses = forward_backward(
            self.engine.model, [self.batch], ObjectiveConfig(), "high", self.layout, self._backward
        )
        for name, parameter in self.engine.model.named_parameters():
            if not name.startswith("video_dit_2."):
                parameter.grad = torch.zeros_like(parameter)
        return losses

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        units = [unit for unit in self.engine.model.modules() if isinstance(unit, FSDPModule)]
        for unit in units:  # forwards that are computed again find whole weights, as FSDP's hooks see to
            unit.unshard()
        self.calls = dict(walk_backward(loss))
        for unit in units:
            unit.reshard()


def make_batch(config: JointConfig) -> Prepared:
    """A micro-batch on the host."""
    latents = lambda *shape: torch.zeros(WORK.clips, *shape, dtype=torch.bfloat16)  # noqa: E731
    text, ones = (config.text_length, config.video.text_dim), torch.ones(WORK.clips)
    batch = Batch(
        step=0, bucket=BUCKET, keys=["a", "b"], sample_numbers=np.arange(WORK.clips),
        video=latents(16, *WORK.grid), audio=latents(config.audio.in_dim, WORK.audio_steps),
        condition=latents(20, *WORK.grid), text=latents(*text), empty_text=latents(*text)[0], weight=ones,
        video_weight=ones, audio_weight=ones, total_weight=2.0,
    )  # fmt: skip
    noise = torch.zeros(WORK.clips, 16, *WORK.grid), torch.zeros(WORK.clips, config.audio.in_dim, WORK.audio_steps)
    return Prepared(batch, Draws(950 * ones, 500 * ones, *noise, ones, ones, ones))


@contextmanager
def parts(ema: float = 0.0, pooled: bool = False, **settings: Any):
    """A model in mid-run on fake CUDA; fake tensors while entered."""
    parallel = ParallelConfig(**settings)
    config = tiny_config(4, pooled_adaln=pooled)
    with fake_cuda(WORLD) as device:
        layout = make_layout(parallel, device)
        with fake_tensors():
            with torch.device(device):
                model = JointTransformer(config)
            place_model(model, parallel, layout, WORK)
            on_host = parallel.optimizer_state == "host"
            engine = ShardedEngine(model, OptimConfig(), layout, parallel.accumulate, on_host, ema)
            averaged = dict.fromkeys(ALL_TOWERS, 1) if ema else None
            with Watch():  # which knows what lies in page-locked memory
                engine.restore(dict.fromkeys(engine.optimizer.parameters, 1), lambda _: None, averaged)
                batch = make_batch(config).page_locked(device)
            yield Parts(config, layout, engine, batch, parallel, {})


def watched(action: Callable[[], Any]) -> Report:
    """What an action does; the second time, when what is made once is there."""
    with Watch() as first:
        action()
    with Watch() as watch:
        action()
    once = {finding: count for finding, count in first.found.items() if finding not in watch.found}
    list_of = lambda found: [[*finding, count] for finding, count in sorted(found.items())]  # noqa: E731
    return {"found": list_of(watch.found), "once": list_of(once), "ops": dict(sorted(watch.ops.items()))}


def step(**settings: Any) -> Report:
    """Whole training steps with all metrics: forward, backward, norm, update, sums posted and read."""
    with parts(**settings) as p:
        recomputed = recomputed_units(p.engine.network, p.parallel, p.layout, WORK)
        meter = Metrics(MonitorConfig(every=1), p.config, p.engine, p.layout, recomputed, 100)
        signals = StepSignals()

        def one() -> None:
            meter.begin(0)
            losses = p.forward_backward()
            norm = p.engine.step(1.0, "high")
            p.engine.limit_norm(3.0)
            sums = signals.collect()
            if sums is not None:
                meter.read(sums, "high")
            signals.post(0, losses.share, losses.video, losses.audio, norm, Flags(), meter.sums(0, losses))

        return watched(one) | {"calls": p.calls, "compute": str(p.layout.compute), "why": p.layout.compute_reason}


def replicas() -> Report:
    """The comparison of replicas, with moments on the host."""
    with (
        parts(ulysses=4, dp_replicate=2, optimizer_state="host") as p,
        patch.object(replica_check, "gather", lambda mine: mine),
        patch.object(replica_check, "outvoted", lambda hashes, place: hashes.tolist() and []),
    ):
        return watched(lambda: compare_replicas(p.engine, p.layout, 500))


def save(**settings: Any) -> Report:
    """The part of a save in which training stands still."""
    with parts(ema=0.99, **settings) as p:
        copy = HostCopy()

        def one() -> None:
            copy.take(p.engine.tensors())
            p.engine.update_counts()
            p.engine.average_counts()

        return watched(one)


class _OneClip:
    """A dataset of one clip whose values play no part."""

    captioners = ["plain"]

    def __init__(self, config: JointConfig) -> None:
        self._text = torch.zeros(3, config.video.text_dim, dtype=torch.bfloat16)

    def __len__(self) -> int:
        return 1

    def empty_text(self) -> torch.Tensor:
        return self._text

    def key(self, row: int) -> str:
        return "clip"

    def bucket_of(self, row: int) -> Bucket:
        return BUCKET

    def read_text(self, row: int, captioner: str) -> torch.Tensor:
        return self._text

    def read_clip(self, row: int) -> EncodedClip:
        grid = torch.zeros(16, *WORK.grid, dtype=torch.bfloat16)
        return EncodedClip("clip", grid, torch.zeros(WORK.audio_steps, 128, dtype=torch.bfloat16), grid, {})


def validation() -> Report:
    """Validation of the weights and of their averages."""
    with parts(ema=0.99, ulysses=2) as p:
        index: Any = _OneClip(p.config)
        objective = Objective(ObjectiveConfig(), p.config.experts)
        validator = Validator(index, ValidationConfig(), objective, p.layout, p.config.text_length)
        return watched(lambda: validator.run_all(p.engine))


def sampler() -> Report:
    """Two steps of sampling with both guidances, the tokens of a clip shared."""
    with parts(ulysses=4) as p:
        device, batch = p.layout.device, p.batch.batch
        inputs = [torch.zeros(shape, device=device) for shape in (batch.video.shape, batch.audio.shape)]
        condition, text = batch.condition.float().to(device), batch.text.float().to(device)
        field = WholeField(p.engine.model.eval(), p.layout)
        config = SamplerConfig(steps=2, bridge_scale=2.0, shift_video=5.0, shift_audio=5.0, boundary=900.0)
        return watched(lambda: sample(field, config, *inputs, condition, text, text[0], p.config.experts, 24.0))


def feed() -> Report:
    """A batch goes into page-locked memory and to the device."""
    with parts() as p:
        device = p.layout.device

        def one() -> None:
            locked = make_batch(p.config).page_locked(device)
            locked.batch.to(device), locked.draws.to(device)

        return watched(one)


def slow_ranks() -> Report:
    """The comparison of speeds."""
    with parts() as p, patch.object(straggler, "gather", lambda mine: mine):
        probe = StragglerProbe(p.layout.device, 1.5)
        return watched(probe.compare)


def damaged() -> Report:
    """Which samples of a step were damaged; asked only after a step that was not finite."""
    with parts() as p:
        losses = p.forward_backward()
        return watched(losses.damaged)


def planted(fault: str) -> Report:
    """A step in which the video head does what it must not."""
    with parts() as p:
        head = p.engine.network.video_dit.head
        plain = type(head).forward

        def forward(self: Any, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            if fault == "item":
                x.sum().item()
            elif fault == "cpu":
                x.detach().cpu()
            elif fault == "mixed":
                x = x + torch.ones(())
            elif fault == "float64":
                x = x.double().to(x.dtype)
            return plain(self, x, time)

        with patch.object(type(head), "forward", forward):
            return watched(p.forward_backward)


def choices() -> Report:
    """What parallel.compute_dtype comes to on several devices, and what is refused."""
    found = {}
    for name, capability, settings in (
        ("H100", (9, 0), {}), ("A100", (8, 0), {}), ("T4", (7, 5), {}), ("asked", (9, 0), {"compute_dtype": "float32"}),
        ("T4, tokens shared", (7, 5), {"ulysses": 2}), ("ring", (9, 0), {"compute_dtype": "float32", "ring": 2}),
        ("float64", (9, 0), {"compute_dtype": "float64", "ulysses": 2}),
    ):  # fmt: skip
        with fake_cuda(WORLD, capability) as device:
            try:
                layout = make_layout(ParallelConfig(**settings), device)
                found[name] = f"{layout.compute} ({layout.compute_reason})"
            except RunError as error:
                found[name] = f"error: {error}"
    return {"choices": found}


CASES: dict[str, Callable[[], Report]] = {
    "step": step,
    "step in float32": lambda: step(compute_dtype="float32"),
    "step, ulysses and replicas": lambda: step(ulysses=4, dp_replicate=2, ema=0.99),
    "step, more ranks than heads": lambda: step(ulysses=8),
    "step, ring and pooled frames": lambda: step(ring=2, ulysses=2, pooled=True),
    "step, recomputed": lambda: step(ulysses=2, recompute="selective"),
    "step, moments on the host": lambda: step(ulysses=4, optimizer_state="host"),
    "replicas": replicas,
    "save": save,
    "save, moments on the host": lambda: save(optimizer_state="host"),
    "validation": validation,
    "sampler": sampler,
    "feed": feed,
    "slow ranks": slow_ranks,
    "damaged samples": damaged,
    "choices": choices,
    **{f"planted {fault}": lambda fault=fault: planted(fault) for fault in ("item", "cpu", "mixed", "float64")},  # type: ignore[misc]
}


def run(names: list[str]) -> dict[str, Report]:
    """The reports of some cases, by name; one that fails holds its error."""
    reports: dict[str, Report] = {}
    for name in names:
        begin = time.perf_counter()
        try:
            reports[name] = CASES[name]()
        except Exception:
            reports[name] = {"error": traceback.format_exc()}
        reports[name]["seconds"] = round(time.perf_counter() - begin, 1)
    return reports


def main(path: str, *names: str) -> None:
    """The program."""
    reports = run(list(names) or list(CASES))
    Path(path).write_text(json.dumps(reports, indent=1) + "\n")
    for name, report in reports.items():
        print(f"== {name} ({report['seconds']} s)")
        for kind in ("found", "once"):
            for finding in report.get(kind, []):
                print("  ", "once " if kind == "once" else "", *finding)
        for operator, count in report.get("ops", {}).items():
            print(f"     {count:6} {operator}")
        print(report.get("error", ""), report.get("choices", ""), sep="")


if __name__ == "__main__":
    main(*sys.argv[1:])
