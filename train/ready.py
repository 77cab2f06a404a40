"""A run that is ready for its first step: everything built in order, the newest checkpoint restored."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.durable import write_atomically
from core.run_dir import RunDir
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import Newest, TrainState
from train.checkpoint.saver import Saver
from train.checkpoint.uncommitted import begin_anew, commit_newer, set_aside
from train.config import TrainConfig, default_values
from train.dataloader import (
    describe_data,
    epoch_samples,
    largest_workload,
    open_data,
    open_dataset,
    open_stream,
    start_state,
)
from train.encoders import agreed, encoders_of_data, encoders_of_start
from train.engine.engine import build_engine
from train.engine.schedule import misfit
from train.faults.bad_steps import SpikeDetector
from train.faults.garbage import Garbage
from train.faults.stop import StopRequest
from train.faults.straggler import StragglerProbe
from train.faults.watchdog import Watchdog
from train.monitor.log import Monitor, cut_metrics
from train.monitor.metrics import Metrics
from train.monitor.planned import read_planned
from train.monitor.profiler import Profiler
from train.objective.balance import Balance
from train.objective.objective import Objective
from train.objective.validate import Validator
from train.parallel.attention import check_attention
from train.parallel.collectives import gather, on_first_rank
from train.parallel.mesh import Layout, spread_timeout
from train.parallel.parallelize import recomputed_units
from train.parallel.parts import trained_towers
from train.parallel.step_sums import StepSignals
from train.parallel.traffic import layout_rows
from train.start.weights import start_weights, stated_encoders, told


class StoppedInStartUp(Exception):
    """A run was asked to stop before its first step: there is nothing to save."""


class ReadyRun:
    """What the steps of a run work with."""

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
        """Build everything and restore the newest checkpoint. `stack` closes what is open when the run ends.
        StoppedInStartUp on all ranks if any is asked to stop meanwhile: each part may take minutes."""
        self.config, self.layout, self.run_dir = config, layout, run_dir
        self.stop, self.watchdog = stop, watchdog
        if layout.first:
            stop.watch(run_dir.stop_file)
        self.garbage = stack.enter_context(Garbage(config.guard.gc_every))
        self.objective = Objective(config.objective, config.model.experts)
        data = open_data(config.data, config.model.video.text_dim)
        workload = largest_workload(data, config.data, layout)
        trained = trained_towers(config.optim.train, config.model.experts)
        if layout.device.type == "cuda":
            check_attention(config.model, layout, workload)
        self._obey_stop()
        looking = _look(run_dir)
        self._obey_stop()
        seed = config.seed if looking.path is None and not config.init.given() else None  # what is read is not drawn
        self.engine = build_engine(
            config.model, config.parallel, config.optim, layout, seed, workload, config.ema.decay
        )
        spread_timeout()  # to the groups that an engine made
        if config.guard.skip_spikes:
            self.engine.limit_norm(math.inf)
        self._obey_stop()
        encoders = encoders_of_data(data, config.data.ignore_encoders)
        self.state = TrainState(self.engine, start_state(data, config.data, config.seed), encoders=encoders)
        found = looking.get()
        _restore(self.state, found, config, resolved, run_dir)
        table: dict[str, str] = {}
        if layout.first:  # who alone writes and prints it
            average = config.ema.decay > 0
            table |= layout_rows(config.model, config.parallel, layout, workload, average, trained)
            table |= {f"start of {part}": words for part, words in told(self.state.origin)}
            run_dir.write_status("running", step=self.state.step, layout=layout.describe())
            write_atomically(run_dir.layout, json.dumps(table, indent=2) + "\n")
        facts = {"layout": table, "parameters": self.engine.size, "origin": self.state.origin}
        self.monitor = stack.enter_context(
            Monitor(run_dir, config.monitor, resolved, config.steps, layout.first, facts)
        )
        self._tell(table, describe_data(data), found)
        self.inspector = Profiler(run_dir, config.inspect, layout.device, self.monitor.event, watchdog.dump)
        stack.callback(self.inspector.close)
        self.saver = Saver(run_dir.checkpoints, config.checkpoint, resolved, layout.describe())
        self.balance = Balance(config.objective.balance_decay, self.state.balance)
        self.judge = SpikeDetector(config.guard, config.model.experts, self.state.history, config.optim.warmup)
        self.lag = StragglerProbe(layout.device, config.guard.straggler_ratio)
        self.validator = _open_validator(config, self.objective, layout, encoders)
        self.stream = open_stream(
            data, self.state.data, config.data, layout, self.objective, config.seed, config.model.text_length
        )
        stack.callback(self.stream.close)
        recomputed = recomputed_units(self.engine.network, config.parallel, layout, workload)
        self.meter = Metrics(
            config.monitor, config.model, self.engine, layout, recomputed, epoch_samples(data), trained,
            read_planned(run_dir, layout.world) if layout.first else None,
        )  # fmt: skip
        self.garbage.started()
        self.signals = StepSignals()

    def _obey_stop(self) -> None:
        if any(gather([self.stop.requested()])):
            raise StoppedInStartUp

    def _tell(self, table: dict[str, str], data: str, found: Path | None) -> None:
        """Log what runs, and from where it continues. `found`: the checkpoint."""
        say, step = self.monitor.say, self.state.step
        say(f"run {self.run_dir.root}: {self.layout.describe()}; {self.engine.size:,} parameters; data {data}")
        width = max(map(len, table), default=0) + 2
        for what, value in table.items():
            say(f"  {what:<{width}}{value}")
        if line := misfit(self.config.optim, self.config.steps):
            say(f"WARNING: {line}")
        if found is not None:
            text = f"resumed from {found} at step {step}"
            self.monitor.event("resumed", step, text, checkpoint=found.name)


def _look(run_dir: RunDir) -> Newest:
    """The checkpoint that the run resumes from, if it has one, as far as it is known before its checksums are. All
    ranks call."""
    folder = run_dir.checkpoints
    looking = Newest(folder)
    committed_now = on_first_rank(
        lambda: (
            begin_anew(run_dir, run_dir.known_commit()) is not None
            if looking.path is None
            else commit_newer(folder, looking.path)
        )
    )
    return Newest(folder) if committed_now else looking


def _restore(
    state: TrainState, found: Path | None, config: TrainConfig, resolved: dict[str, Any], run_dir: RunDir
) -> None:
    """Restore a checkpoint, or if the run has none yet the weights that `init` names. Metrics of steps that the run
    will repeat are removed."""
    if found is not None:
        checkpoint.load(state, found, resolved, default_values())
    elif config.init.given():
        state.origin = start_weights(state.engine, config.init, config.model, config.seed)
        for path, stated in on_first_rank(lambda: stated_encoders(state.origin)):
            state.encoders = encoders_of_start(stated, path, state.encoders, config.data.ignore_encoders)
    on_first_rank(lambda: set_aside(run_dir.checkpoints))
    on_first_rank(lambda: cut_metrics(run_dir, state.step))


def _open_validator(
    config: TrainConfig, objective: Objective, layout: Layout, encoders: dict[str, str]
) -> Validator | None:
    if config.data.valid_path is None:
        return None
    valid = open_dataset(config.data.valid_path, config.model.video.text_dim, config.data.storage)
    held_out = f"data.valid_path={config.data.valid_path}"
    agreed(valid.encoders, held_out, encoders, "the data", config.data.ignore_encoders)
    return Validator(valid, config.validation, objective, layout, config.model.text_length)
