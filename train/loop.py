"""A training run from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack, nullcontext
from typing import Any

from data.batch import Batch
from data.errors import DataError, ReadError
from model.joint import JointConfig
from train import checkpoint
from train.checkpoint import TrainState
from train.config import TrainConfig
from train.corruption import compare_replicas
from train.counters import CollectiveCounter
from train.engine import build_engine
from train.errors import LINGER, RankError, exit_status, lost_peer
from train.feed import describe_data, largest_workload, open_data, open_dataset, open_stream, start_state
from train.guard import StepSignals, StepSums, StopRequest, gather, on_first_rank
from train.mesh import Layout
from train.monitor import Monitor, cut_metrics
from train.objective import Objective
from train.optim import lr_factor
from train.parallelize import compiled_graphs
from train.run_dir import RunDir
from train.step import StepLosses, forward_backward
from train.traffic import layout_rows
from train.validate import Validator

logger = logging.getLogger(__name__)


def run(config: TrainConfig, resolved: dict[str, Any], layout: Layout, stop: StopRequest | None = None) -> str:
    """Train until `config.steps` or a stop request; start where the run directory's newest checkpoint ended.

    `resolved`: the plain form of config, for the run directory; `stop`: made early by the program. Returns "finished"
    or "stopped". Raises RunError and DataError with one clear message; status.json says how the run ended.
    """
    run_dir = RunDir.of(config.run.root, config.run.id)
    first = layout.first
    lock = None

    def enter() -> None:
        nonlocal lock
        lock = run_dir.lock()
        run_dir.open(resolved)
        run_dir.write_status("running")

    on_first_rank(enter)
    try:
        ending, step = _train(config, resolved, layout, run_dir, stop or StopRequest(), first)
    except BaseException as error:
        _record_failure(error, run_dir, first)
        raise
    finally:
        if lock is not None:
            lock.close()
    if first:
        run_dir.write_status(ending, step=step)
    return ending


def _train(
    config: TrainConfig, resolved: dict[str, Any], layout: Layout, run_dir: RunDir, stop: StopRequest, first: bool
) -> tuple[str, int]:
    if first:
        stop.watch(run_dir.stop_file)
    objective = Objective(config.objective, config.model.experts)
    data = open_data(config.data, config.model.video.text_dim)
    workload = largest_workload(data, config.data, layout)
    engine = build_engine(config.model, config.parallel, config.optim, layout, config.seed, workload)
    model = engine.model
    state = TrainState(engine, start_state(data, config.data, config.seed))

    found = on_first_rank(lambda: checkpoint.newest(run_dir.checkpoints))
    if found is not None:
        checkpoint.load(state, found, resolved)
    on_first_rank(lambda: cut_metrics(run_dir, state.step))
    if first:
        run_dir.write_status("running", step=state.step, layout=layout.describe())

    with ExitStack() as stack:
        monitor = Monitor(run_dir, config.monitor, resolved, config.steps, active=first)
        stack.callback(monitor.close)
        monitor.say(f"run {run_dir.root}: {layout.describe()}; {engine.size:,} parameters; data {describe_data(data)}")
        for what, value in layout_rows(config.model, config.parallel, layout, workload):
            monitor.say(f"  {what:<20}{value}")
        if found is not None:
            monitor.say(f"resumed from {found} at step {state.step}")
        validator = None
        if config.data.valid_path is not None:
            valid = open_dataset(config.data.valid_path, config.model.video.text_dim, config.data.places)
            validator = Validator(valid, config.validation, objective, layout, config.model.text_length)
            if state.step == 0:
                monitor.validation(0, validator.run(model))
        stream = open_stream(data, state.data, config.data, layout, objective, config.seed, config.model.text_length)
        stack.callback(stream.close)

        signals = StepSignals()
        details: dict[str, float | str] = {}  # of the step whose sums are under way
        losses: StepLosses | None = None  # likewise
        begin = time.perf_counter()

        def collect() -> StepSums | None:
            """Read the last step's sums, write its metrics."""
            sums = signals.collect()
            if sums is not None and losses is not None:
                if not sums.finite:
                    monitor.say(f"step {sums.step}: loss or gradient is not finite; its update was suppressed")
                    for key in sorted(set(gather(losses.damaged()))):
                        monitor.say(f"  sample {key} holds NaN or inf; it has weight 0 from now on")
                        stream.report_damage(key, "NaN or inf on the device", sums.step)
                found = {"loss": sums.loss, "loss_video": sums.loss_video, "loss_audio": sums.loss_audio}
                monitor.step(sums.step, {**found, "grad_norm": sums.grad_norm, **details})
            return sums

        stopping = False
        while state.step < config.steps and not stopping:
            step = state.step
            try:
                micro_batches = next(stream)
            except DataError as error:
                retry = isinstance(error, ReadError)
                raise RankError(f"data rank {layout.dp_rank}, step {step}: {error}", retry) from error
            expert = objective.expert(step)
            factor = lr_factor(config.optim, step, config.steps)
            counter = CollectiveCounter(layout) if _due(config.monitor.count_collectives, step + 1) else None
            with counter or nullcontext():
                now_losses = forward_backward(model, micro_batches, config.objective, expert, layout, engine.backward)
                norm = engine.step(factor, expert)

            earlier = collect()
            stopping = earlier is not None and earlier.stop
            losses = now_losses
            signals.post(step, losses.share, losses.video, losses.audio, norm, stop.requested())
            state.step = step + 1
            now = time.perf_counter()
            tokens = micro_batches[0].batch.total_weight * _tokens(micro_batches[0].batch, config.model)
            details = {
                "expert": expert,
                "lr_tower": config.optim.lr_tower * factor,
                "lr_bridge": config.optim.lr_bridge * factor,
                "tokens_per_s": tokens / (now - begin),
                "step_time": now - begin,
                "data_wait": stream.data_wait,
                **(counter.metrics() if counter is not None else {}),
            }
            if config.parallel.compile != "none":
                details["compiled_graphs"] = compiled_graphs()
            begin = now

            last = state.step == config.steps or stopping
            if last or _due(config.validation.every, state.step):
                collect()
                if validator is not None and not stopping:
                    monitor.validation(state.step, validator.run(model))
            if _due(config.parallel.replica_check, state.step):
                compare_replicas(engine, layout, state.step)
            if last or _due(config.checkpoint.every, state.step):
                collect()
                compare_replicas(engine, layout, state.step)
                path = checkpoint.save(state, run_dir.checkpoints, resolved, layout.describe(), config.checkpoint.keep)
                monitor.say(f"checkpoint {path}")
        if state.step == config.steps:
            return "finished", state.step
        monitor.say(f"stopped at step {state.step} of {config.steps}, as asked; the same command goes on from there")
        return "stopped", state.step


def _record_failure(error: BaseException, run_dir: RunDir, first: bool) -> None:
    """status.json says what ended the run: the cause, where a rank knows it, not that others then missed that rank."""
    if lost_peer(error):
        time.sleep(LINGER)
        if json.loads(run_dir.status.read_text())["state"] == "failed":
            return
    if first or isinstance(error, RankError):
        run_dir.write_status("failed", error=str(error) or type(error).__name__, exit_status=exit_status(error))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _tokens(batch: Batch, model: JointConfig) -> int:
    """Video and audio tokens of one sample of this batch."""
    video = math.prod(batch.video.shape[2:]) // math.prod(model.video.patch_size)
    return video + batch.audio.shape[2] // model.audio.patch_size[0]
