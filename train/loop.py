"""A training run from top to bottom."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import torch.distributed as dist

from core.errors import (
    LINGER,
    NO_ROOM,
    NoRoomError,
    RankError,
    RunError,
    describe,
    exit_status,
    gone,
    has_trained,
    lacks_room,
    lost_peer,
    restarted,
)
from core.run_dir import RunDir
from data.errors import DataError
from train.checkpoint import checkpoint
from train.checkpoint.resume import open_run
from train.checkpoint.uploads import LAST_SIGNALS
from train.config import TrainConfig, default_values
from train.engine.optim_config import rates
from train.engine.schedule import lr_factor
from train.faults.bad_steps import kind_of, report
from train.faults.ending import CLOSING, end_within
from train.faults.lead import Lead
from train.faults.replica_check import compare_replicas
from train.faults.stop import StopRequest
from train.faults.straggler import tell
from train.faults.watchdog import Watchdog
from train.monitor import wandb_log
from train.monitor.counters import CollectiveCounter
from train.monitor.log import was_validated
from train.objective.noise import Prepared
from train.parallel.collectives import gather, on_first_rank
from train.parallel.mesh import Layout
from train.parallel.parallelize import compiled_graphs, eager_units
from train.parallel.step_sums import Flags
from train.ready import ReadyRun, StoppedInStartUp
from train.step import Details, StepUnderWay, forward_backward

logger = logging.getLogger(__name__)


def run(config: TrainConfig, resolved: dict[str, Any], layout: Layout, stop: StopRequest | None = None) -> str:
    """Train until `config.steps` or a stop request; start where the run directory's newest checkpoint ended.

    `resolved`: the plain form of config, for the run directory; `stop`: made early by the program. Returns "finished"
    or "stopped". Raises RunError and DataError with one clear message; status.json tells how the run ended.
    """
    run_dir = RunDir.of(config.run.root, config.run.id)
    first = layout.first
    lock = None
    has_trained(False)

    def enter() -> None:
        nonlocal lock
        if restarted() and not run_dir.config.exists():
            raise NoRoomError(f"{run_dir.root} existed before and is gone: moved, or its file system not mounted")
        lock = run_dir.lock()
        try:
            open_run(run_dir, resolved, default_values())
            run_dir.write_status("running")
        except BaseException:
            lock.close()  # a caller that continues, as a notebook does, may start the run again
            raise

    on_first_rank(enter)
    watchdog = Watchdog(run_dir, config.guard, dist.get_rank())
    bounded_end = ExitStack()
    try:
        with ExitStack() as stack:
            training = Training(config, resolved, layout, run_dir, stop or StopRequest(), watchdog, stack)
            ending, step = training.run(), training.state.step

            def last_words() -> None:
                if first:
                    run_dir.write_status(ending, step=step)

            bounded_end.enter_context(end_within(_closing(config), last_words))
    except StoppedInStartUp:
        if first:
            run_dir.write_status("stopped", step=run_dir.committed_step())
        return "stopped"
    except BaseException as error:
        _record_failure(error, run_dir, first)
        raise
    finally:
        with bounded_end:
            watchdog.close()
            if lock is not None:
                lock.close()
    last_words()
    return ending


class Training(ReadyRun):
    """The steps of a run. All ranks call the same methods."""

    def __init__(
        self,
        config: TrainConfig,
        resolved: dict[str, Any],
        layout: Layout,
        run_dir: RunDir,
        stop: StopRequest,
        watchdog: Watchdog,
        stack: ExitStack,
    ) -> None:
        super().__init__(config, resolved, layout, run_dir, stop, watchdog, stack)
        self._under_way: StepUnderWay | None = None
        self._asked = Flags()  # what any rank reported in the last collected step
        self._rewinds = self._done = 0  # of this attempt; `_done`: steps
        self._begin = 0.0  # of the current step's time
        self._lead = Lead(config.guard.stop_margin + _after_the_last_save(config))
        self._graphs = -1  # see `_steady`
        self._owed = _due_validation(config, self.state.step) and not on_first_rank(
            lambda: was_validated(run_dir, self.state.step)
        )

    def run(self) -> str:
        """Step until `config.steps` or a stop request; returns "finished" or "stopped"."""
        config, state = self.config, self.state
        stopping = any(gather([self.stop.requested()]))
        if self._owed and not stopping:  # before the first step, or the one that a stop prevented in the last attempt
            stopping = not self._validate()
        self._begin = time.perf_counter()
        while state.step < config.steps and not stopping:
            stopping = self._between_steps(self._step(state.step))
        self.watchdog.beat("waiting for the last checkpoint")
        self.saver.finish(lambda: self.watchdog.beat("waiting for the last checkpoint"))
        self._tell_of_saves()
        if state.step == config.steps and not self._owed:
            return "finished"
        text = f"stopped at step {state.step} of {config.steps}, as requested; the same command resumes from there"
        self.monitor.event("stopped", state.step, text)
        return "stopped"

    def _step(self, step: int) -> Flags:
        """One attempted batch: forward, backward, update. Returns what any rank requested one step ago."""
        config, layout = self.config, self.layout
        self.watchdog.beat(f"in step {step}")
        begin = time.perf_counter()
        profiled = self.inspector.step(step)
        micro_batches = self._next_batch(step)
        expert = self.objective.expert(step)
        factor = lr_factor(config.optim, step, config.steps)
        if config.guard.skip_spikes:
            self.engine.limit_norm(self.judge.limit(step, kind_of(expert, micro_batches[0].batch.bucket)))
        scales = self.balance.scales(step, expert) if config.objective.balance else (1.0, 1.0)
        self.meter.begin(step)
        counter = CollectiveCounter(layout) if _due(config.monitor.count_collectives, step + 1) else None
        with counter or nullcontext():
            losses = forward_backward(
                self.engine.model, micro_batches, config.objective, expert, layout, self.engine.backward, scales
            )
            norm = self.engine.step(factor, expert)

        self._collect()
        asked = self._asked
        if asked.inspect:
            self.inspector.take(step + 1)
        look = layout.first and self.inspector.requested()
        flags = Flags(self.stop.requested(), layout.first and self.saver.due_by_clock(), self.saver.failed(), look)
        extra = self.meter.sums(step, losses)
        self.signals.post(step, losses.share, losses.video, losses.audio, norm, flags, extra)
        self.state.step, self.state.seen = step + 1, self.state.seen.after(micro_batches[0].batch)
        now = time.perf_counter()
        host = self.meter.host(step, micro_batches, now - self._begin, self.state.seen) | profiled
        host |= counter.metrics() if counter is not None else {}
        self._under_way = StepUnderWay(losses, self._details(expert, factor, scales, host))
        self.lag.add(self.stream.data_wait, now - self._begin)
        if self._steady() and self._done:
            self._lead.took("step", now - begin)
        self._done += 1
        has_trained()
        self._begin = now
        return asked

    def _details(self, expert: str, factor: float, scales: tuple[float, float], host: dict[str, float]) -> Details:
        """The metrics of a step that need no sums. `host`: what this rank measured."""
        config = self.config
        found: Details = {
            "train/expert": expert,
            **{f"train/{name}": rate for name, rate in rates(config.optim, factor).items()},
            "perf/data_wait": self.stream.data_wait,
            "data/empty_captions": self.state.data.empty_captions,
            **host,
        }
        if config.objective.balance:
            found |= {"train/scale_video": scales[0], "train/scale_audio": scales[1]}
        if config.parallel.compile != "none":
            found |= {"perf/compiled_graphs": compiled_graphs(), "perf/eager_units": self._eager_units()}
        return found

    def _eager_units(self) -> int:
        """Units that are not compiled as the config asks, told after the first step."""
        eager = eager_units(self.engine.network)
        if eager and not self._done:
            self.monitor.say(
                f"WARNING: {eager} units ran in eager mode though parallel.compile={self.config.parallel.compile}; is "
                "TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE set, or monitor.count_collectives=1?"
            )
        return eager

    def _steady(self) -> bool:
        """Whether nothing was compiled since the last call."""
        before, self._graphs = self._graphs, compiled_graphs() if self.config.parallel.compile != "none" else 0
        return before == self._graphs

    def _next_batch(self, step: int) -> list[Prepared]:
        try:
            return next(self.stream)
        except (DataError, NoRoomError) as error:  # NoRoomError: of the cache
            retry = error.retry or gone(error)
            raise RankError(f"data rank {self.layout.dp_rank}, step {step}: {error}", retry) from error

    def _between_steps(self, asked: Flags) -> bool:
        """Validate, compare ranks, rewind, save: whatever is due after a step. Returns whether the run must stop.
        `asked`: what `_step` returned."""
        config, state = self.config, self.state
        stopping, due = asked.stop, _due_validation(config, state.step)
        if _due(config.guard.straggler_every, state.step):  # before it is collected
            assert self._under_way is not None, "a step has just run"
            self._under_way.details.update(tell(self.lag.compare(), state.step, self.monitor))
        if due or stopping or state.step == config.steps:
            self._collect()
        if due:
            begin, self._owed = time.perf_counter(), True
            stopping = stopping or not self._validate()
            self.meter.stall("validation", time.perf_counter() - begin)
        if _due(config.parallel.replica_check, state.step):
            self._compare_replicas()
        if self._asked.save_failed:
            self.saver.settle()
        last = state.step == config.steps or stopping
        if len(self.judge.in_a_row) >= config.guard.max_nonfinite:
            self._rewind()
        elif last or asked.save or config.checkpoint.due(state.step):
            self.watchdog.beat(f"in the checkpoint after step {state.step - 1}")
            self._save()
        self._tell_of_saves()
        begin = time.perf_counter()
        if self.garbage.after(state.step):
            self.meter.stall("garbage", time.perf_counter() - begin)
            self._lead.took("garbage", time.perf_counter() - begin)
        self.stop.lead = self._lead.seconds(self.saver.seconds)
        return stopping

    def _validate(self) -> bool:
        """Validate the current weights. False if any rank must stop meanwhile: then nothing is written, and the next
        attempt begins with this validation."""
        if self.validator is not None:
            step, asked = self.state.step, 0.0

            def stopped() -> bool:
                nonlocal asked
                before, asked = asked, time.perf_counter()
                if self._steady() and before:
                    self._lead.took("clip", asked - before)
                self.stop.lead = self._lead.seconds(self.saver.seconds)
                self.watchdog.beat(f"in the validation after {step} steps", starting=self._done == 0)
                return self.stop.requested()

            losses = self.validator.run_all(self.engine, stopped)
            if losses is None:
                return False
            self.monitor.validation(step, losses)
        self._owed = False
        return True

    def _collect(self) -> None:
        """Read the last step's sums, judge the step, write its metrics."""
        sums, step = self.signals.collect(), self._under_way
        if sums is None or step is None:
            return
        self._asked = sums.flags
        expert = self.objective.expert(sums.step)
        if self.config.objective.balance:
            self.balance.add(sums, expert)
        finding = self.judge.look(sums, kind_of(expert, step.losses.bucket))
        if finding.bad:
            report(finding, sums, step.losses, self.stream, self.monitor)
        skipped = {"train/skipped": 1} if finding.skipped else {}
        found = self.meter.read(sums, expert) | {"perf/comm_wait": sums.wait}
        self.monitor.step(sums.step, found | step.details | skipped)

    def _save(self) -> None:
        """Begin to save the current state; its metrics are complete before it is committed."""
        self._collect()
        begin = time.perf_counter()
        self._compare_replicas()
        needed = self.judge.in_a_row[0] if self.judge.in_a_row else None
        self.saver.begin(self.state, self.monitor.sync, needed=needed)
        self.meter.stall("checkpoint", time.perf_counter() - begin)

    def _compare_replicas(self) -> None:
        begin = time.perf_counter()
        compare_replicas(self.engine, self.layout, self.state.step)
        self._lead.took("comparison", time.perf_counter() - begin)

    def _tell_of_saves(self) -> None:
        for event in self.saver.events():
            self.monitor.event(event.kind, event.step, event.text, **event.details)

    def _rewind(self) -> None:
        """Restore the weights from before the bad steps, and continue after them. RunError if that is impossible."""
        bad, self._rewinds = self.judge.in_a_row, self._rewinds + 1
        self._collect()
        bad = self.judge.in_a_row or bad  # the current step may be one more of them, or none
        self.saver.settle()
        guard, step = self.config.guard, self.state.step
        path = checkpoint.newest(self.run_dir.checkpoints, up_to=bad[0]) if guard.rewind else None
        if path is None or self._rewinds > guard.max_rewinds:
            if not guard.rewind:
                why = "guard.rewind=true would return to the last checkpoint and skip them"
            elif path is None:
                why = "there is no checkpoint from before them to return to"
            else:
                why = f"the run has already been rewound {self._rewinds - 1} times"
            file = self.run_dir.root / "bad_steps.jsonl"
            raise RunError(
                f"{len(bad)} steps in a row, {bad[0]} to {bad[-1]}, had no finite loss or gradient; weights are "
                f"those before step {bad[0]}. Check the samples in {file} and the learning rate ({why})"
            )
        checkpoint.go_back(self.state, path)
        self.judge.in_a_row = []
        text = f"went back to the weights of {path} after {len(bad)} bad steps; continues at step {step}"
        self.monitor.event("went back", step, text, checkpoint=path.name, first=bad[0], last=bad[-1])
        self._save()  # else a restart would meet the bad steps again


def _record_failure(error: BaseException, run_dir: RunDir, first: bool) -> None:
    """Write what ended the run to status.json: the cause, if a rank knows it, not that others then lost that rank."""
    if lost_peer(error):
        time.sleep(LINGER)
        with suppress(OSError):
            if run_dir.read_status().get("state") == "failed":
                return
    if first or isinstance(error, RankError) or gone(error):
        cause = {"cause": NO_ROOM} if lacks_room(error) else {}
        run_dir.write_status("failed", error=describe(error), exit_status=exit_status(error), **cause)


def _after_the_last_save(config: TrainConfig) -> float:
    """Longest time from there until this process ends, in seconds."""
    sending = config.checkpoint.upload_seconds + LAST_SIGNALS if config.checkpoint.upload else 0.0
    return sending + _closing(config) + CLOSING  # of the program, behind `run`


def _closing(config: TrainConfig) -> float:
    """Longest time for closing what is open, in seconds."""
    return CLOSING + (wandb_log.PATIENCE if config.monitor.wandb != "disabled" else 0.0)


def _due_validation(config: TrainConfig, step: int) -> bool:
    if config.data.valid_path is None:
        return False
    return step in (0, config.steps) or _due(config.validation.every, step)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
