"""What the trainer drives: a model with its optimizer under one of two engines, FSDP2 or DeepSpeed ZeRO.

Both keep the same contract: gradients of the ranks' shares are averaged over all ranks, the norm is that of the true
global gradient, the idle expert is not touched, and a checkpoint has the same names and whole shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model.joint import JointConfig, JointTransformer
from train.mesh import Layout, ParallelConfig
from train.optim import MOMENTS, OptimConfig, ShardedOptimizer
from train.parallelize import build_model
from train.probes import squares_by_group, update_squares
from train.step import backward_sharded
from train.workload import Workload
from train.zero import ZeroEngine


class Engine(Protocol):
    """A model that is being trained."""

    model: JointTransformer  # called like it, whatever wraps it
    network: JointTransformer  # the module itself
    size: int  # parameters of the whole model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a loss's gradient, averaged over all ranks. `last`: it is the last one before `step`."""

    def step(self, factor: float, expert: str) -> Tensor:
        """Clip, update at `factor` times each group's LR, drop the gradients; the other expert stays as it is.

        Returns the 2-norm of the global gradient before clipping (a scalar on the device). When it is not finite,
        weights, moments and update counts stay as they were.
        """

    def limit_norm(self, limit: float) -> None:
        """Suppress the next updates whose norm is above `limit`, as those that are not finite. RunError if it can't."""

    def group_squares(self) -> dict[str, Tensor]:
        """This rank's part of sums over all ranks, [groups of train/probes.py] each: squares of the weights ("param"),
        of the last update ("update"), of the last gradient before clipping ("grad")."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by its engine-neutral key, sharded ones as DTensors. All ranks call."""

    def update_counts(self) -> dict[str, int]:
        """How often each parameter has been updated, of those that ever were."""

    def restore(
        self,
        counts: dict[str, int],
        read: Callable[[dict[str, Tensor]], None],
        averaged: dict[str, int] | None = None,
    ) -> None:
        """Take over a checkpoint: `read` fills the tensors that it is given. All ranks call.

        `averaged`: its `average_counts`; without any, averages begin anew from its weights.
        """

    def average_counts(self) -> dict[str, int]:
        """How many updates the average of each tower and of the Bridge has seen; empty where none is kept."""

    def averaged(self) -> AbstractContextManager[None]:
        """While entered the model computes with the averages of its weights. All ranks call; no step in between."""


def build_engine(
    config: JointConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    layout: Layout,
    seed: int,
    workload: Workload | None = None,
    ema_decay: float = 0.0,
) -> Engine:
    """The engine that `parallel.engine` names, with the model's starting weights. RunError when it cannot run here.

    `workload`: a rank's largest micro-batch, for recompute=budget. `ema_decay`: of the weights' average (0: none).
    """
    if parallel.engine == "fsdp2":
        model = build_model(config, parallel, layout, seed, workload)
        on_host = parallel.optimizer_state == "host"
        return ShardedEngine(model, optim, layout, parallel.accumulate, on_host, ema_decay)
    return ZeroEngine(config, parallel, optim, layout, seed, workload, ema_decay)


class ShardedEngine:
    """FSDP2 with AdamW on the local shards. A checkpoint reads and writes the live storage."""

    def __init__(
        self,
        model: JointTransformer,
        optim: OptimConfig,
        layout: Layout,
        accumulate: str = "sharded",
        state_on_host: bool = False,
        ema_decay: float = 0.0,
    ) -> None:
        """`accumulate`, `state_on_host`: see ParallelConfig."""
        self.model = self.network = model
        self._world, self._copies = layout.world, layout.dp_replicate
        self.size = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = ShardedOptimizer(model, optim, layout.shard_group, state_on_host, ema_decay)
        self._accumulate = accumulate
        self._state_mesh: DeviceMesh | None = None
        if state_on_host and layout.device.type != "cpu":  # DTensor would move it to the mesh's device
            ranks = (layout.dp_replicate, layout.world // layout.dp_replicate)
            mesh = init_device_mesh("cpu", ranks, mesh_dim_names=("dp_replicate", "fsdp"))
            self._state_mesh = mesh if layout.dp_replicate > 1 else mesh["fsdp"]

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        backward_sharded(self.model, loss, last, self._accumulate)

    def step(self, factor: float, expert: str) -> Tensor:
        """See Engine. The idle expert has no gradient, which is all that the optimizer needs to know."""
        norm = self.optimizer.global_norm()
        self.optimizer.step(factor, norm)
        return norm

    def limit_norm(self, limit: float) -> None:
        """See Engine."""
        self.optimizer.limit = limit

    def group_squares(self) -> dict[str, Tensor]:
        """See Engine."""
        optimizer, config = self.optimizer, self.optimizer.config
        pieces = list(optimizer.pieces())
        device = pieces[0].weights.device
        assert optimizer.squares is not None
        return {
            "param": squares_by_group([(piece.tower, piece.weights) for piece in pieces], device) / self._copies,
            "update": update_squares(pieces, config.betas, config.eps, device) / self._copies,
            "grad": optimizer.squares / self._world,
        }

    def tensors(self) -> dict[str, Tensor]:
        """See Engine."""
        if self.optimizer.state_on_host and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # copies to the host may be under way
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.optimizer.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            moments = self.optimizer.adamw.state.get(self.optimizer.shards[name], {})
            for key in MOMENTS:
                if key in moments:
                    tensors[f"optim.{name}.{key}"] = _like(parameter, moments[key], self._state_mesh)
            if self.optimizer.average is not None:
                tensors[f"ema.{name}"] = _like(parameter, self.optimizer.average.values[name], None)
        return tensors

    def update_counts(self) -> dict[str, int]:
        """See Engine (each expert counts its own)."""
        state = self.optimizer.adamw.state
        return {name: int(state[shard]["step"]) for name, shard in self.optimizer.shards.items() if shard in state}

    def restore(
        self,
        counts: dict[str, int],
        read: Callable[[dict[str, Tensor]], None],
        averaged: dict[str, int] | None = None,
    ) -> None:
        """See Engine."""
        state = self.optimizer.adamw.state
        state.clear()
        for name, count in counts.items():
            shard = self.optimizer.shards[name]
            on_host = self.optimizer.state_on_host
            state[shard] = {"step": torch.tensor(float(count), dtype=torch.float32, device=shard.device)}
            for key in MOMENTS:
                zeros = self.optimizer.host_moment(shard) if on_host else torch.zeros_like(shard, requires_grad=False)
                state[shard][key] = zeros
        tensors, average = self.tensors(), self.optimizer.average
        read({key: tensor for key, tensor in tensors.items() if averaged or not key.startswith("ema.")})
        if average is not None:
            average.set_counts(averaged) if averaged else average.restart()

    def average_counts(self) -> dict[str, int]:
        """See Engine."""
        return {} if self.optimizer.average is None else self.optimizer.average.counts()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See Engine."""
        assert self.optimizer.average is not None
        self._forget_gathered()
        with self.optimizer.average.swapped():
            yield
            self._forget_gathered()

    def _forget_gathered(self) -> None:
        """Units that a forward left gathered (the root stays so) would go on with the weights of before."""
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def _like(parameter: Tensor, shard: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """A moment's shard as a tensor split like its parameter, on `mesh` where it does not lie beside it."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        mesh or parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
