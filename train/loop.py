"""A training run from top to bottom."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.errors import DataError, ReadError
from data.stream import Stream
from train import checkpoint
from train.bad_steps import Finding, Judge
from train.checkpoint import TrainState
from train.config import TrainConfig
from train.corruption import compare_replicas
from train.counters import CollectiveCounter
from train.engine import build_engine
from train.errors import LINGER, RankError, RunError, exit_status, lost_peer
from train.feed import describe_data, epoch_samples, largest_workload, open_data, open_dataset, open_stream, start_state
from train.guard import Flags, StepSignals, StepSums, StopRequest, gather, on_first_rank
from train.inspect import Inspector
from train.lag import LagProbe, SlowRank
from train.mesh import Layout
from train.meter import Meter
from train.monitor import Monitor, cut_metrics
from train.objective import Objective
from train.optim import lr_factor
from train.parallelize import compiled_graphs, recomputed_units
from train.run_dir import RunDir, write_atomically
from train.saver import Saver
from train.step import StepLosses, forward_backward
from train.traffic import layout_rows
from train.validate import Validator
from train.watchdog import Watchdog

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
    engine = build_engine(config.model, config.parallel, config.optim, layout, config.seed, workload, config.ema.decay)
    model = engine.model
    if config.guard.skip_spikes:
        engine.limit_norm(math.inf)
    state = TrainState(engine, start_state(data, config.data, config.seed))

    found = checkpoint.newest(run_dir.checkpoints)
    if found is not None:
        checkpoint.load(state, found, resolved)
    elif config.run.start_from is not None:
        started_from = checkpoint.load_weights(engine, Path(config.run.start_from))
    on_first_rank(lambda: checkpoint.clean(run_dir.checkpoints))
    on_first_rank(lambda: cut_metrics(run_dir, state.step))
    table = dict(layout_rows(config.model, config.parallel, layout, workload))
    if first:
        run_dir.write_status("running", step=state.step, layout=layout.describe())
        write_atomically(run_dir.layout, json.dumps(table, indent=2) + "\n")

    with ExitStack() as stack:
        monitor = stack.enter_context(
            Monitor(
                run_dir, config.monitor, resolved, config.steps, first, {"layout": table, "parameters": engine.size}
            )
        )
        monitor.say(f"run {run_dir.root}: {layout.describe()}; {engine.size:,} parameters; data {describe_data(data)}")
        width = max(map(len, table)) + 2
        for what, value in table.items():
            monitor.say(f"  {what:<{width}}{value}")
        if found is None and config.run.start_from is not None:
            monitor.say(f"weights of {started_from}")
        if found is not None:
            monitor.event("resumed", state.step, f"resumed from {found} at step {state.step}", checkpoint=found.name)
        watchdog = Watchdog(run_dir, config.guard, dist.get_rank())
        stack.callback(watchdog.close)
        inspector = Inspector(run_dir, config.inspect, layout.device, monitor.event, watchdog.dump)
        stack.callback(inspector.close)
        saver = Saver(run_dir.checkpoints, config.checkpoint, resolved, layout.describe())
        judge = Judge(config.guard, config.model.experts, state.history)
        lag = LagProbe(layout.device, config.guard.lag_ratio)
        validator = None
        if config.data.valid_path is not None:
            valid = open_dataset(config.data.valid_path, config.model.video.text_dim, config.data.places)
            validator = Validator(valid, config.validation, objective, layout, config.model.text_length)
            if state.step == 0:
                monitor.validation(0, validator.run_all(engine))
        stream = open_stream(data, state.data, config.data, layout, objective, config.seed, config.model.text_length)
        stack.callback(stream.close)

        recomputed = recomputed_units(engine.network, config.parallel, layout, workload)
        meter = Meter(config.monitor, config.model, engine, layout, recomputed, epoch_samples(data))
        signals = StepSignals()
        details: dict[str, float | str] = {}  # of the step whose sums are under way
        losses: StepLosses | None = None  # likewise
        asked = Flags()  # what any rank said in the last step that was collected
        rewinds = 0

        def collect() -> None:
            """Read the last step's sums, judge it, write its metrics."""
            nonlocal asked
            sums = signals.collect()
            if sums is None or losses is None:
                return
            asked = sums.flags
            finding = judge.look(sums, objective.expert(sums.step))
            if finding.bad:
                _report(finding, sums, losses, stream, monitor)
            skipped = {"train/skipped": 1} if finding.skipped else {}
            found = meter.read(sums, objective.expert(sums.step)) | {"perf/comm_wait": sums.wait}
            monitor.step(sums.step, found | details | skipped)

        def save() -> None:
            """Begin to save the state as it is; its metrics are complete before it is committed."""
            collect()
            begin = time.perf_counter()
            compare_replicas(engine, layout, state.step)
            saver.begin(state, monitor.sync, needed=judge.in_a_row[0] if judge.in_a_row else None)
            meter.stall("checkpoint", time.perf_counter() - begin)

        def rewind() -> None:
            """Take the weights from before the bad steps, and go on after them. RunError where that is impossible."""
            nonlocal rewinds
            bad, rewinds = judge.in_a_row, rewinds + 1
            collect()
            bad = judge.in_a_row or bad  # the step under way may be one more of them, or none
            saver.settle()
            path = checkpoint.newest(run_dir.checkpoints, up_to=bad[0]) if config.guard.rewind else None
            if path is None or rewinds > config.guard.max_rewinds:
                if not config.guard.rewind:
                    why = "guard.rewind=true goes back to the last checkpoint and passes over them"
                elif path is None:
                    why = "there is no checkpoint from before them to go back to"
                else:
                    why = f"the run went back {rewinds - 1} times already"
                file = run_dir.root / "bad_steps.jsonl"
                raise RunError(
                    f"{len(bad)} steps in a row, {bad[0]} to {bad[-1]}, had no finite loss or gradient; weights are "
                    f"those before step {bad[0]}. Look at the samples in {file} and at the learning rate ({why})"
                )
            checkpoint.go_back(state, path)
            judge.in_a_row = []
            text = f"went back to the weights of {path} after {len(bad)} bad steps; goes on at step {state.step}"
            monitor.event("went back", state.step, text, checkpoint=path.name, first=bad[0], last=bad[-1])
            save()  # else a restart would meet the bad steps again

        stopping = any(gather([stop.requested()]))
        begin = time.perf_counter()
        while state.step < config.steps and not stopping:
            step = state.step
            watchdog.beat(f"in step {step}")
            inspector.step(step)
            try:
                micro_batches = next(stream)
            except DataError as error:
                retry = isinstance(error, ReadError)
                raise RankError(f"data rank {layout.dp_rank}, step {step}: {error}", retry) from error
            expert = objective.expert(step)
            factor = lr_factor(config.optim, step, config.steps)
            if config.guard.skip_spikes:
                engine.limit_norm(judge.limit(step, expert))
            meter.begin(step)
            counter = CollectiveCounter(layout) if _due(config.monitor.count_collectives, step + 1) else None
            with counter or nullcontext():
                now_losses = forward_backward(model, micro_batches, config.objective, expert, layout, engine.backward)
                norm = engine.step(factor, expert)

            collect()
            stopping, save_due = asked.stop, asked.save
            if asked.inspect:
                inspector.take(step + 1)
            losses = now_losses
            look = first and inspector.requested()
            flags = Flags(stop.requested(), first and saver.due_by_clock(), saver.failed(), look)
            extra = meter.sums(step, losses)
            signals.post(step, losses.share, losses.video, losses.audio, norm, flags, extra)
            state.step, state.seen = step + 1, state.seen.after(micro_batches[0].batch)
            now = time.perf_counter()
            details = {
                "train/expert": expert,
                "train/lr_tower": config.optim.lr_tower * factor,
                "train/lr_bridge": config.optim.lr_bridge * factor,
                "perf/data_wait": stream.data_wait,
                **meter.host(step, micro_batches, now - begin, state.seen),
                **(counter.metrics() if counter is not None else {}),
            }
            if config.parallel.compile != "none":
                details["perf/compiled_graphs"] = compiled_graphs()
            lag.add(stream.data_wait, now - begin)
            stop.lead = config.guard.stop_margin + 2 * saver.seconds + 5 * (now - begin)
            begin = now

            last = state.step == config.steps or stopping
            if last or _due(config.validation.every, state.step):
                collect()
                if validator is not None and not stopping:
                    watchdog.beat(f"in the validation after step {step}")
                    monitor.validation(state.step, validator.run_all(engine))
                    meter.stall("validation", time.perf_counter() - now)
            if _due(config.parallel.replica_check, state.step):
                compare_replicas(engine, layout, state.step)
            if _due(config.guard.lag_every, state.step):
                details |= _report_lag(lag.compare(), state.step, monitor)
            if asked.save_failed:
                saver.settle()
            if len(judge.in_a_row) >= config.guard.max_nonfinite:
                rewind()
            elif last or save_due or config.checkpoint.due(state.step):
                watchdog.beat(f"in the checkpoint after step {step}")
                save()
            for event in saver.events():
                monitor.event(event.kind, event.step, event.text, **event.details)
        watchdog.beat("waiting for the last checkpoint")
        saver.finish()
        for event in saver.events():
            monitor.event(event.kind, event.step, event.text, **event.details)
        if state.step == config.steps:
            return "finished", state.step
        text = f"stopped at step {state.step} of {config.steps}, as asked; the same command goes on from there"
        monitor.event("stopped", state.step, text)
        return "stopped", state.step


def _report(finding: Finding, sums: StepSums, losses: StepLosses, stream: Stream, monitor: Monitor) -> None:
    """Name the samples of a bad step, in bad_steps.jsonl and to the user. All ranks call it for the same step."""
    values = {name: getattr(sums, name) for name in ("loss", "loss_video", "loss_audio", "grad_norm")}
    damaged = sorted(set(gather(losses.damaged()))) if not finding.finite else []
    samples = sorted(set(gather([key for keys, _ in losses.inputs for key in keys])))
    what = "skipped" if finding.skipped else "spike" if finding.finite else "not finite"
    record = {"what": what, "spikes": finding.spikes, "samples": samples, "damaged": damaged}
    monitor.bad_step(finding.step, {**values, **record})
    if finding.finite:
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in finding.spikes)
        ending = "; its update was suppressed" if finding.skipped else ""
        monitor.event("spike", finding.step, f"step {finding.step}: far above what is usual: {shown}{ending}")
        return
    text = f"step {finding.step}: loss or gradient is not finite; its update was suppressed"
    monitor.event("not finite", finding.step, text, damaged=damaged)
    for key in damaged:
        monitor.say(f"  sample {key} holds NaN or inf; it has weight 0 from now on")
        stream.report_damage(key, "NaN or inf on the device", finding.step)


def _report_lag(slow: list[SlowRank], step: int, monitor: Monitor) -> dict[str, float | str]:
    """Tell of slow ranks; returns what belongs into the metrics."""
    for rank in slow:
        if rank.what == "compute":
            text = f"rank {rank.rank} is slow: the probe takes {rank.ratio:.1f} times what it takes on the median rank"
        else:
            text = f"rank {rank.rank} waits {rank.seconds:.3f} s for data in each step"
        monitor.event("slow rank", step, text, rank=rank.rank, what=rank.what, ratio=round(rank.ratio, 2))
    return {"perf/slow_ranks": ",".join(sorted({str(rank.rank) for rank in slow}))} if slow else {}


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
