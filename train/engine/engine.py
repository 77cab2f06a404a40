"""A model with its optimizer under one of two engines, FSDP2 or DeepSpeed ZeRO.

Both keep the same contract: gradients of the ranks' shares are averaged over all ranks, the norm is that of the true
global gradient, what took no part in a step is not touched, and a checkpoint has the same names and whole shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model.joint import JointConfig, JointTransformer
from train.engine.norms import squares_by_group
from train.engine.optim import ShardedOptimizer, local, update_squares
from train.engine.optim_config import OptimConfig
from train.engine.zero import ZeroEngine
from train.optimizer.adamw import AdamW
from train.optimizer.protocol import Optimizer
from train.parallel.mesh import Layout, ParallelConfig, host_mesh
from train.parallel.parallelize import Part, build_model, fill_weights
from train.parallel.parts import trained_towers
from train.parallel.workload import Workload


class Engine(Protocol):
    """A model that is being trained."""

    model: JointTransformer  # called like it, whatever wraps it
    network: JointTransformer  # the module itself
    size: int  # parameters of the whole model

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a loss's gradient, averaged over all ranks. `last`: it is the last one before `step`. A loss that depends
        on no part that trains adds nothing."""

    def step(self, factor: float, expert: str) -> Tensor:
        """Clip, update at `factor` times each group's LR, drop the gradients.

        What is frozen stays as it is, and so does, with moments, counts and averages, what took no part in the
        forwards since the last step: the other expert, the tower of a modality that the step's samples lack, and then
        the Bridge.

        Returns the 2-norm of the global gradient before clipping (a scalar on the device). When it is not finite,
        weights, moments and update counts stay as they were.
        """

    def limit_norm(self, limit: float) -> None:
        """From now on also suppress updates whose norm is above `limit`. RunError if the engine cannot."""

    def group_squares(self) -> dict[str, Tensor]:
        """This rank's part of sums over all ranks, [groups of train/engine/norms.py] each: squares of the weights
        ("param"), of the last update ("update"), of the last gradient before clipping ("grad")."""

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

    def fill(self, part: Part) -> None:
        """Set every weight, reading only what this rank holds; averages begin anew from them. All ranks
        call."""

    def average_counts(self) -> dict[str, int]:
        """How many updates the average of each tower and of the Bridge that trains has seen; empty where none is kept.
        The average of what is frozen is its weights."""

    def averaged(self) -> AbstractContextManager[None]:
        """While entered the model computes with the averages of its weights. All ranks call; no step in between."""


def build_engine(
    config: JointConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    layout: Layout,
    seed: int | None,
    workload: Workload | None = None,
    ema_decay: float = 0.0,
    kind: type[Optimizer] = AdamW,
) -> Engine:
    """The engine that `parallel.engine` names, with the model's starting weights. RunError when it cannot run here.

    `seed`: of the weights; None leaves them unset, for `restore` or `fill`. `workload`: a rank's largest micro-batch,
    for recompute=budget. `ema_decay`: of the weights' average (0: none). `kind`: the optimizer.
    """
    if parallel.engine == "fsdp2":
        model = build_model(config, parallel, layout, seed, workload, trained_towers(optim.train, config.experts))
        on_host = parallel.optimizer_state == "host"
        return ShardedEngine(model, optim, layout, parallel.accumulate, on_host, ema_decay, kind)
    return ZeroEngine(config, parallel, optim, layout, seed, workload, ema_decay, kind)


class ShardedEngine:
    """FSDP2 with the optimizer on the local shards. A checkpoint reads and writes the live storage."""

    def __init__(
        self,
        model: JointTransformer,
        optim: OptimConfig,
        layout: Layout,
        accumulate: str = "sharded",
        state_on_host: bool = False,
        ema_decay: float = 0.0,
        kind: type[Optimizer] = AdamW,
    ) -> None:
        """`accumulate`, `state_on_host`: see ParallelConfig."""
        self.model = self.network = model
        self._world, self._copies = layout.world, layout.dp_replicate
        self.size = sum(parameter.numel() for parameter in model.parameters())
        self.optimizer = ShardedOptimizer(model, optim, layout.shard_group, state_on_host, ema_decay, kind)
        self._accumulate = accumulate
        self._state_mesh: DeviceMesh | None = None
        if state_on_host and layout.device.type != "cpu":  # DTensor would move it to the mesh's device
            self._state_mesh = host_mesh(layout.mesh if layout.dp_replicate > 1 else layout.mesh["fsdp"])

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        if loss.requires_grad:
            backward_sharded(self.model, loss, last, self._accumulate)

    def step(self, factor: float, expert: str) -> Tensor:
        """See Engine. What took no part has no gradient, which is all that the optimizer needs to know."""
        norm = self.optimizer.global_norm()
        self.optimizer.step(factor, norm)
        return norm

    def limit_norm(self, limit: float) -> None:
        """See Engine."""
        self.optimizer.limit = limit

    def group_squares(self) -> dict[str, Tensor]:
        """See Engine."""
        optimizer = self.optimizer
        shards = list(optimizer.held())
        device = shards[0].weights.device
        weights = [(name, local(parameter.detach())) for name, parameter in optimizer.parameters.items()]
        assert optimizer.squares is not None
        return {
            "param": squares_by_group(weights, device) / self._copies,
            "update": update_squares(shards, optimizer.inner, device) / self._copies,
            "grad": optimizer.squares / self._world,
        }

    def tensors(self) -> dict[str, Tensor]:
        """See Engine."""
        if self.optimizer.state_on_host and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # copies to the host may be under way
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.optimizer.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            shard = self.optimizer.shards.get(name)
            if shard is None:
                continue  # frozen
            kept = self.optimizer.inner.state.get(shard, {})
            for key in self.optimizer.inner.KEYS:
                if key in kept:
                    tensors[f"optim.{name}.{key}"] = _like(parameter, kept[key], self._state_mesh)
            if self.optimizer.average is not None:
                tensors[f"ema.{name}"] = _like(parameter, self.optimizer.average.values[name], None)
        return tensors

    def update_counts(self) -> dict[str, int]:
        """See Engine (each expert counts its own). Waits for the device, once."""
        state = self.optimizer.inner.state
        steps = {name: state[shard]["step"] for name, shard in self.optimizer.shards.items() if shard in state}
        counts = torch.stack([*steps.values()]).tolist() if steps else []
        return {name: int(count) for name, count in zip(steps, counts, strict=True)}

    def restore(
        self,
        counts: dict[str, int],
        read: Callable[[dict[str, Tensor]], None],
        averaged: dict[str, int] | None = None,
    ) -> None:
        """See Engine."""
        state = self.optimizer.inner.state
        state.clear()
        for name, count in counts.items():
            shard = self.optimizer.shards[name]
            on_host = self.optimizer.state_on_host
            state[shard] = {"step": torch.tensor(float(count), dtype=torch.float32, device=shard.device)}
            for key in self.optimizer.inner.KEYS:
                buffer = self.optimizer.host_state(shard, key) if on_host else torch.zeros_like(shard)
                state[shard][key] = buffer.detach()
        tensors, average = self.tensors(), self.optimizer.average
        read({key: tensor for key, tensor in tensors.items() if averaged or not key.startswith("ema.")})
        self._forget_gathered()
        if average is not None:
            average.set_counts(averaged) if averaged else average.restart()

    def fill(self, part: Part) -> None:
        """See Engine."""
        fill_weights(self.network, part)
        if self.optimizer.average is not None:
            self.optimizer.average.restart()

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
        """Free units that a forward left gathered (the root): they would continue with the old weights."""
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()


def _like(parameter: Tensor, shard: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """What is kept for a parameter's shard, as a tensor split like the parameter, on `mesh` if it is elsewhere."""
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


def backward_sharded(model: nn.Module, loss: Tensor, last: bool, accumulate: str = "sharded") -> None:
    """Backward through an FSDP2 model, or a plain one.

    `accumulate` "sharded": the gradient of each micro-batch is reduced to the shards, over replicas once, in the last.
    "unsharded": it is reduced in the last only, and a whole gradient lies on every rank until then.
    """
    for unit in model.modules() if isinstance(model, FSDPModule) else ():
        if isinstance(unit, FSDPModule):
            hold_back = accumulate == "unsharded" and not last and _was_gathered(unit)
            unit.set_requires_gradient_sync(not hold_back, recurse=False)
            unit.set_requires_all_reduce(last, recurse=False)
    loss.backward()


def _was_gathered(unit: FSDPModule) -> bool:
    """Whether this unit has ever taken part. An expert before its first step has no gradient to hold back, and torch
    2.11 fails on it where gradients wait in another dtype than they come in (bfloat16)."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return group is None or all(hasattr(parameter, "_unsharded_param") for parameter in group.fsdp_params)
