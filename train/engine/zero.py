"""DeepSpeed ZeRO 1, 2 and 3 as an engine: the same gradients, updates and checkpoints as FSDP2 (see
train/engine/engine.py).

ZeRO 1 shards the optimizer's state and the float32 weights, 2 the gradients too, 3 the parameters too. To DeepSpeed all
ranks are one data-parallel group; sequence parallelism lies within it. Where its public calls do not reach (the flat
float32 partitions that its optimizers hold), this file names the attributes of DeepSpeed 0.19 that it reads.

With compute_dtype=bfloat16 parameters and activations are bfloat16, master weights and moments float32, gradients are
reduced in float32. Parameters of the time path are rounded to bfloat16 as all others (its arithmetic stays float32),
and ZeRO 1 sums the gradients of several micro-batches in bfloat16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from core.errors import RunError
from model.joint import JointConfig, JointTransformer
from train.engine.ema import Average
from train.engine.norms import squares_by_group
from train.engine.optim import update_squares
from train.engine.optim_config import OptimConfig, decay_of, rate_of
from train.engine.zero_frozen import FrozenWeights
from train.engine.zero_memory import device_memory, refuse_what_cannot_fit
from train.engine.zero_setup import AsNetwork, AsTuple, materialise, settings_of, start_deepspeed
from train.optimizer.adamw import AdamW
from train.optimizer.protocol import LocalShard, Optimizer, refusal
from train.parallel.mesh import Layout, ParallelConfig
from train.parallel.parallelize import Part, prepare_model, starting_weights
from train.parallel.parts import GROUPS, freeze, tower_of, trained_towers
from train.parallel.workload import Workload

AVERAGE = "average"  # beside the optimizer's own in its state, so that DeepSpeed's calls find it by parameter


class ZeroEngine:
    """One stage of ZeRO over a model; implements train.engine.engine.Engine."""

    def __init__(
        self,
        config: JointConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        layout: Layout,
        seed: int | None,
        workload: Workload | None = None,
        ema_decay: float = 0.0,
        kind: type[Optimizer] = AdamW,
    ) -> None:
        """Builds the model with its starting weights (`seed` None: unset). RunError if DeepSpeed is not installed, or
        cannot drive this kind of optimizer."""
        if fault := refusal(kind, "elements", "ZeRO cuts them anywhere: parallel=fsdp2"):
            raise RunError(fault)
        deepspeed = start_deepspeed(layout.device)
        self._stage = int(parallel.engine.removeprefix("zero"))
        with torch.device("meta"):
            network = JointTransformer(config)
        trained = trained_towers(optim.train, config.experts)
        freeze(network, trained)
        prepare_model(network, parallel, layout, workload)
        network.to(layout.compute)
        self.network = network
        self._optim = optim
        self.size = sum(parameter.numel() for parameter in network.parameters())
        refuse_what_cannot_fit(
            self._stage, config, dict(network.named_parameters()), layout.world, layout.compute, ema_decay > 0,
            device_memory(layout.device), kind, trained,
        )  # fmt: skip
        settings = settings_of(self._stage, layout.compute, optim, self.size)
        materialise(network, layout.device, settings if self._stage == 3 else None)
        parameters = dict(network.named_parameters())
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        optimizer: Any = kind.make(_groups(self._parameters, optim), optim)
        self._optimizer, self._update = optimizer, optimizer.step
        optimizer.step = self._update_active
        self._squares = torch.zeros(0)  # of the gradients in this step's calls of it, by group of train/engine/norms.py
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(
                model=AsTuple(network), optimizer=self._optimizer, config=settings, dist_init_required=False
            )
        self._zero: Any = self._engine.optimizer
        self.model: Any = AsNetwork(network, self._engine)
        self._towers = {
            expert: name
            for expert in config.experts
            for name, child in network.named_children()
            if child is network.expert(expert)
        }
        # Checkpoints pass through host memory, split as FSDP2 splits.
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._frozen = FrozenWeights(
            {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}, self._mesh
        )
        self._learned = False  # whether anything had a gradient since the last step
        self._average: Average[int] | None = None
        self._make_state(ema_decay)
        if seed is not None:
            self.fill(starting_weights(config, seed))

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        if not loss.requires_grad:
            return
        self._learned = True
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, factor: float, expert: str) -> Tensor:
        """See Engine. The norm of a gradient that is not finite is inf."""
        idle = set(GROUPS) - self._stepped(expert)
        learned, self._learned = self._learned, False
        self._squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=self._engine.device)
        if not learned:
            return self._squares.sum()
        for group in self._optimizer.param_groups:
            group["idle"] = group["name"] in idle
            group["lr"] = group["base_rate"] * factor
        before = {tower: state["step"].clone() for tower, state in self._states() if tower not in idle}
        self._engine.step()
        if self._average is not None:
            # Updates are counted on the device: to know whether this one was applied needs no wait.
            applied = {tower: state["step"] - before[tower] for tower, state in self._states() if tower not in idle}
            pieces = [piece for piece, (index, _) in enumerate(self._masters()) if self._tower(index) not in idle]
            self._average.update(pieces, applied)
        if self._stage == 3:
            # It writes gradients over the last ones, but only where there are new ones: the expert that idles next
            # would leave its own behind, to be counted in the norm; so would a tower without its modality.
            self._zero.grad_partitions_flat_buffer.zero_()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64, device=self._engine.device)
        self._unclipped = ((norm + 1e-6) / self._optim.clip).clamp(min=1)  # as DeepSpeed clips
        return norm

    def _stepped(self, expert: str) -> set[str]:
        """The towers, and the Bridge, that took part since the last step: those of the modalities that the model was
        given."""
        given, self.model.given = self.model.given, set()
        towers = {"video": {self._towers[expert]}, "audio": {"audio_dit"}}
        found = set().union(*(towers[modality] for modality in given))
        return found | ({"dual_tower_bridge"} if len(given) == 2 else set())

    def limit_norm(self, limit: float) -> None:
        """See Engine. Not supported: DeepSpeed itself decides what it does not apply."""
        raise RunError("guard.skip_spikes needs parallel=fsdp2")

    def group_squares(self) -> dict[str, Tensor]:
        """See Engine."""
        groups = self._optimizer.param_groups
        shards = [
            LocalShard(self._tower(index), master.detach(), self._optimizer.state[master], groups[index]["lr"])
            for index, master in self._masters()
        ]
        weights = [(shard.tower, shard.weights) for shard in shards]
        weights += [(name, value.to_local().to(self._engine.device)) for name, value in self._frozen.values.items()]
        return {
            "param": squares_by_group(weights, self._engine.device),
            "update": update_squares(shards, self._optimizer, self._engine.device),
            "grad": self._squares * self._unclipped.square(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """See Engine. Copies on the host, gathered one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self._frozen.values.items()}
        counts = self.update_counts()
        for name, parameter in self._parameters.items():
            tensors[f"model.{name}"] = self._keep_part(safe_get_full_fp32_param(parameter))
            for key in self._optimizer.KEYS if name in counts else ():
                tensors[f"optim.{name}.{key}"] = self._keep_part(safe_get_full_optimizer_state(parameter, key))
            if self._average is not None:
                tensors[f"ema.{name}"] = self._keep_part(safe_get_full_optimizer_state(parameter, AVERAGE))
        return tensors

    def update_counts(self) -> dict[str, int]:
        """See Engine (each group of parameters counts its own)."""
        steps = {tower: int(state["step"]) for tower, state in self._states()}
        counts = {name: steps[tower_of(name)] for name in self._parameters}
        return {name: count for name, count in counts.items() if count > 0}

    def average_counts(self) -> dict[str, int]:
        """See Engine."""
        return {} if self._average is None else self._average.counts()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See Engine."""
        assert self._average is not None
        with self._average.swapped():
            self._publish()
            yield
        self._publish()

    def restore(
        self,
        counts: dict[str, int],
        read: Callable[[dict[str, Tensor]], None],
        averaged: dict[str, int] | None = None,
    ) -> None:
        """See Engine. RunError when parameters that this engine updates together were updated differently often."""
        steps: dict[str, int] = {}
        for name in self._parameters:
            count = counts.get(name, 0)
            tower = tower_of(name)
            if steps.setdefault(tower, count) != count:
                raise RunError(
                    f"{name} was updated {count} times, other parameters of {tower} {steps[tower]} times;"
                    " ZeRO keeps one count for them all: resume with parallel=fsdp2"
                )
        targets: dict[str, Tensor] = {f"model.{name}": value for name, value in self._frozen.values.items()}
        for name, parameter in self._parameters.items():
            shape = _shape(parameter)
            targets[f"model.{name}"] = self._keep_part(torch.zeros(shape))
            for key in self._optimizer.KEYS if name in counts else ():
                targets[f"optim.{name}.{key}"] = self._keep_part(torch.zeros(shape))
            if self._average is not None and averaged:
                targets[f"ema.{name}"] = self._keep_part(torch.zeros(shape))
        read(targets)
        for tower, state in self._states():
            state["step"].fill_(steps[tower])
            for key in self._optimizer.KEYS:
                state[key].zero_()
        for name in self._parameters:
            for what in (None, AVERAGE, *self._optimizer.KEYS):
                target = targets.get(_key(name, what))
                if target is not None:
                    assert isinstance(target, DTensor)
                    whole = target.full_tensor().flatten()
                    self._put(name, lambda first, last, w=whole: w[first:last], what)  # type: ignore[misc]
        self._publish()
        self._frozen.publish()
        if self._average is not None:
            self._average.set_counts(averaged) if averaged else self._average.restart()

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """See Engine."""
        for name, parameter in self._parameters.items():
            self._put(name, partial(part, name, _shape(parameter)), None)
        self._publish()
        self._frozen.fill(part)
        if self._average is not None:
            self._average.restart()

    def _masters(self) -> Iterator[tuple[int, Tensor]]:
        """(index of the group, this rank's flat float32 part of it or of a piece of it)."""
        if self._stage < 3:
            yield from enumerate(self._zero.single_partition_of_fp32_groups)
        else:
            for piece, master in enumerate(self._zero.fp32_partitioned_groups_flat):
                yield self._zero.sub_group_to_group_id[piece], master

    def _update_active(self, closure: Any = None) -> Any:
        """DeepSpeed calls this as the optimizer's `step`: skips the groups marked idle, and adds up the squares of the
        gradients.

        ZeRO hands every group a gradient, zeros for one that had none, on which momentum and decay would move it. It
        does so one group or one piece of a group at a time, clipped, on this rank's part; nobody else sees them by
        group.
        """
        groups = self._optimizer.param_groups
        active = [group for group in groups if not group["idle"]]
        given = [(group["name"], part.grad) for group in active for part in group["params"]]
        self._squares += squares_by_group([pair for pair in given if pair[1] is not None], self._squares.device)
        self._optimizer.param_groups = active
        try:
            return self._update(closure)
        finally:
            self._optimizer.param_groups = groups

    def _tower(self, index: int) -> str:
        text: str = self._optimizer.param_groups[index]["name"]
        return text

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(tower, what the optimizer holds) of every part of `_masters`."""
        for index, master in self._masters():
            yield self._tower(index), self._optimizer.state[master]

    def _make_state(self, ema_decay: float) -> None:
        """Zeros for every group before the first update: DeepSpeed links its names to whatever is there at one time,
        and one expert has none yet."""
        for _, master in self._masters():
            self._optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{key: torch.zeros_like(master, requires_grad=False) for key in self._optimizer.KEYS},
            }
        if ema_decay:
            towers = [self._tower(index) for index, _ in self._masters()]
            self._average = Average(ema_decay, {i: m for i, (_, m) in enumerate(self._masters())}, towers.__getitem__)
            for value, (_, state) in zip(self._average.values.values(), self._states(), strict=True):
                state[AVERAGE] = value
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _put(self, name: str, part: Callable[[int, int], Tensor], key: str | None) -> None:
        """Set what this rank holds of a master weight, or of the state kept for it as `key`; `part(start, stop)` gives
        the elements."""
        parameter: Any = self._parameters[name]
        if self._stage < 3:
            if (held := parameter._hp_mapping) is not None:  # some of it lies in this rank's partition
                address = held.lp_fragment_address
                held.get_hp_fragment(key).copy_(part(address.start, address.start + address.numel))
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, whole = parameter.ds_tensor.numel(), math.prod(_shape(parameter))
        first, last = (min(size * rank, whole) for rank in (dist.get_rank(), dist.get_rank() + 1))
        value = torch.zeros(size, dtype=torch.float32, device=self._engine.device)
        value[: last - first] = part(first, last)
        if key is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, key)

    def _publish(self) -> None:
        """Copy the master weights into the parameters that compute."""
        if self._stage < 3:
            self._zero.update_lp_params()
        else:
            for piece in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(piece)

    def _keep_part(self, full: Tensor) -> DTensor:
        """Keep this rank's part of a whole tensor that all ranks have."""
        full = full.detach().cpu()
        part = distribute_tensor(full, self._mesh, [Shard(0)], src_data_rank=None).to_local().clone()
        return DTensor.from_local(part, self._mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


def _key(name: str, what: str | None) -> str:
    """A checkpoint's key of a parameter's master weight (None), its average, or of what the optimizer keeps of it."""
    return {None: f"model.{name}", AVERAGE: f"ema.{name}"}.get(what, f"optim.{name}.{what}")


def _shape(parameter: Any) -> tuple[int, ...]:
    """The whole shape of a parameter, which ZeRO 3 leaves empty between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _groups(parameters: dict[str, nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """A group of parameters for each tower and the Bridge: they are stepped together, or idle together."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rate, decay = rate_of(name, config), decay_of(name, config)
        fresh = {
            "params": [], "name": tower_of(name), "lr": rate, "base_rate": rate, "weight_decay": decay, "idle": False,
        }  # fmt: skip
        groups.setdefault(tower_of(name), fresh)["params"].append(parameter)
    return list(groups.values())
