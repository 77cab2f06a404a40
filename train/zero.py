"""DeepSpeed ZeRO 1, 2 and 3 as an engine: the same gradients, updates and checkpoints as FSDP2 (see train/engine.py).

ZeRO 1 shards the optimizer's state and the float32 weights, 2 the gradients too, 3 the parameters too. To DeepSpeed all
ranks are one data-parallel group; sequence parallelism lies within it. Where its public calls do not reach (the flat
float32 partitions that its optimizers hold), this file names the attributes of DeepSpeed 0.19 that it reads.

With compute=bfloat16 parameters and activations are bfloat16, master weights and moments float32, gradients are reduced
in float32. Parameters of the time path are rounded to bfloat16 as all others (its arithmetic stays float32), and
ZeRO 1 sums the gradients of several micro-batches in bfloat16.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model.init import initial_value
from model.joint import JointConfig, JointTransformer, Velocities
from train.ema import Average, tower_of
from train.errors import RunError
from train.mesh import DTYPES, Layout, ParallelConfig
from train.optim import MOMENTS, OptimConfig, group_of
from train.parallelize import prepare_model
from train.probes import GROUPS, Piece, squares_by_group, update_squares
from train.recompute import units
from train.workload import Workload

AVERAGE = "average"  # beside the moments in the optimizer's state, so that DeepSpeed's calls find it by parameter
LARGEST_BUCKET = 500_000_000  # elements that are reduced at a time: DeepSpeed's own default


class ExpertAdamW(torch.optim.AdamW):
    """AdamW that passes over the groups marked idle, and adds up the squares of the gradients that it is given.

    ZeRO hands every group a gradient, zeros for an expert that had none, on which momentum and decay would move it. It
    does so one group or one piece of a group at a time, clipped, on this rank's part; nobody else sees them by group.
    """

    squares: Tensor  # [groups of train/probes.py], of the calls since somebody set it to zero

    def step(self, closure: Any = None) -> Any:
        """One update of the groups that are not idle."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["idle"]]
        given = [(group["name"], part.grad) for group in self.param_groups for part in group["params"]]
        self.squares += squares_by_group([pair for pair in given if pair[1] is not None], self.squares.device)
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class ZeroEngine:
    """One stage of ZeRO over a model; implements train.engine.Engine."""

    def __init__(
        self,
        config: JointConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        layout: Layout,
        seed: int,
        workload: Workload | None = None,
        ema_decay: float = 0.0,
    ) -> None:
        """Builds the model with its starting weights. RunError when DeepSpeed is not there."""
        deepspeed = _start_deepspeed(layout.device)
        self._stage = int(parallel.engine.removeprefix("zero"))
        with torch.device("meta"):
            network = JointTransformer(config)
        prepare_model(network, parallel, layout, workload)
        network.to(DTYPES[parallel.compute])
        self.network = network
        self._optim = optim
        self.size = sum(parameter.numel() for parameter in network.parameters())
        settings = _settings(self._stage, parallel, optim, self.size)
        _materialise(network, layout.device, settings if self._stage == 3 else None)
        self._parameters = dict(network.named_parameters())
        self._adamw = _make_adamw(self._parameters, optim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(
                model=_AsTuple(network), optimizer=self._adamw, config=settings, dist_init_required=False
            )
        self._zero: Any = self._engine.optimizer
        self.model: Any = _Callable(network, self._engine)
        self._towers = {
            expert: name
            for expert in config.experts
            for name, child in network.named_children()
            if child is network.expert(expert)
        }
        # Checkpoints pass through host memory, split as FSDP2 splits.
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._average: Average[int] | None = None
        self._make_moments(ema_decay)
        depth, bridge = config.video.num_layers, config.bridge
        self.fill(lambda name, shape: initial_value(name, shape, seed, depth, bridge))

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, factor: float, expert: str) -> Tensor:
        """See Engine. The norm of a gradient that is not finite is inf."""
        idle = set(self._towers.values()) - {self._towers[expert]}
        for group in self._adamw.param_groups:
            group["idle"] = group["name"] in idle
            group["lr"] = group["base_rate"] * factor
        before = {tower: state["step"].clone() for tower, state in self._states() if tower not in idle}
        self._adamw.squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=self._engine.device)
        self._engine.step()
        if self._average is not None:
            # Updates are counted on the device: to know whether this one was applied needs no wait.
            applied = {tower: state["step"] - before[tower] for tower, state in self._states() if tower not in idle}
            pieces = [piece for piece, (index, _) in enumerate(self._masters()) if self._tower(index) not in idle]
            self._average.update(pieces, applied)
        if self._stage == 3:
            # It writes gradients over the last ones, but only where there are new ones: the expert that idles next
            # would leave its own behind, to be counted in the norm.
            self._zero.grad_partitions_flat_buffer.zero_()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64, device=self._engine.device)
        self._unclipped = ((norm + 1e-6) / self._optim.clip).clamp(min=1)  # as DeepSpeed clips
        return norm

    def limit_norm(self, limit: float) -> None:
        """See Engine. DeepSpeed decides for itself what it does not apply."""
        raise RunError("guard.skip_spikes needs parallel=fsdp2")

    def group_squares(self) -> dict[str, Tensor]:
        """See Engine."""
        groups = self._adamw.param_groups
        pieces = [
            Piece(self._tower(index), master.detach(), self._adamw.state[master], groups[index]["lr"])
            for index, master in self._masters()
        ]
        return {
            "param": squares_by_group([(piece.tower, piece.weights) for piece in pieces], self._engine.device),
            "update": update_squares(pieces, self._optim.betas, self._optim.eps, self._engine.device),
            "grad": self._adamw.squares * self._unclipped.square(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """See Engine. Copies on the host, gathered one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        counts = self.update_counts()
        for name, parameter in self._parameters.items():
            tensors[f"model.{name}"] = self._keep_part(safe_get_full_fp32_param(parameter))
            for key in MOMENTS if name in counts else ():
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
        places: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            shape = _shape(parameter)
            places[f"model.{name}"] = self._keep_part(torch.zeros(shape))
            for key in MOMENTS if name in counts else ():
                places[f"optim.{name}.{key}"] = self._keep_part(torch.zeros(shape))
            if self._average is not None and averaged:
                places[f"ema.{name}"] = self._keep_part(torch.zeros(shape))
        read(places)
        for tower, state in self._states():
            state["step"].fill_(steps[tower])
            for key in MOMENTS:
                state[key].zero_()
        for name in self._parameters:
            for what in (None, AVERAGE, *MOMENTS):
                place = places.get(_key(name, what))
                if place is not None:
                    assert isinstance(place, DTensor)
                    self._put(name, place.full_tensor(), what)
        self._publish()
        if self._average is not None:
            self._average.set_counts(averaged) if averaged else self._average.restart()

    @torch.no_grad()
    def fill(self, value: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Set every parameter to value(name, shape), float32 and equal on all ranks."""
        for name, parameter in self._parameters.items():
            self._put(name, value(name, _shape(parameter)), None)
        self._publish()
        if self._average is not None:
            self._average.restart()

    def _masters(self) -> Iterator[tuple[int, Tensor]]:
        """(index of the group, this rank's flat float32 part of it or of a piece of it)."""
        if self._stage < 3:
            yield from enumerate(self._zero.single_partition_of_fp32_groups)
        else:
            for piece, master in enumerate(self._zero.fp32_partitioned_groups_flat):
                yield self._zero.sub_group_to_group_id[piece], master

    def _tower(self, index: int) -> str:
        return self._adamw.param_groups[index]["name"]

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(tower, what the optimizer holds) of every part of `_masters`."""
        for index, master in self._masters():
            yield self._tower(index), self._adamw.state[master]

    def _make_moments(self, ema_decay: float) -> None:
        """Zeros for every group before the first update: DeepSpeed links its names to whatever is there at one moment,
        and one expert has none yet."""
        for _, master in self._masters():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
            }
        if ema_decay:
            towers = [self._tower(index) for index, _ in self._masters()]
            self._average = Average(ema_decay, {i: m for i, (_, m) in enumerate(self._masters())}, towers.__getitem__)
            for value, (_, state) in zip(self._average.values.values(), self._states(), strict=True):
                state[AVERAGE] = value
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _put(self, name: str, full: Tensor, moment: str | None) -> None:
        """Set this rank's part of a master weight or of a moment."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter: Any = self._parameters[name]
        value = full.to(self._engine.device, torch.float32)
        if self._stage == 3:  # its call for whole values cannot take those that the ranks do not divide
            size = parameter.ds_tensor.numel()
            value = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            value = value.narrow(0, size * dist.get_rank(), size)
        if moment is None:
            (safe_set_local_fp32_param if self._stage == 3 else safe_set_full_fp32_param)(parameter, value)
        else:
            setter = safe_set_local_optimizer_state if self._stage == 3 else safe_set_full_optimizer_state
            setter(parameter, value, moment)

    def _publish(self) -> None:
        """Copy the master weights into the parameters that compute."""
        if self._stage < 3:
            self._zero.update_lp_params()
        else:
            for piece in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(piece)

    def _keep_part(self, full: Tensor) -> DTensor:
        """This rank's part of a whole tensor that all ranks have."""
        full = full.detach().cpu()
        part = distribute_tensor(full, self._mesh, [Shard(0)], src_data_rank=None).to_local().clone()
        return DTensor.from_local(part, self._mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


class _AsTuple(nn.Module):
    """The network for DeepSpeed, whose hooks see tensors in tuples but not in a dataclass."""

    def __init__(self, network: JointTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        out = self.network(**inputs)
        return out.video, out.audio


class _Callable:
    """What the trainer calls: DeepSpeed's engine with the network's interface."""

    def __init__(self, network: JointTransformer, engine: Any) -> None:
        self.config, self.token_range = network.config, network.token_range
        self._engine = engine

    def __call__(self, **inputs: Any) -> Velocities:
        return Velocities(*self._engine(**inputs))


def _key(name: str, what: str | None) -> str:
    """A checkpoint's key of a parameter's master weight (None), its average, or one of its moments."""
    return {None: f"model.{name}", AVERAGE: f"ema.{name}"}.get(what, f"optim.{name}.{what}")


def _shape(parameter: Any) -> tuple[int, ...]:
    """The whole shape of a parameter, which ZeRO 3 leaves empty between uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _make_adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> ExpertAdamW:
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        rate = config.lr_bridge if group_of(name) == "bridge" else config.lr_tower
        fresh = {"params": [], "name": tower_of(name), "lr": rate, "base_rate": rate, "idle": False}
        groups.setdefault(tower_of(name), fresh)["params"].append(parameter)
    return ExpertAdamW(
        list(groups.values()),
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _settings(stage: int, parallel: ParallelConfig, optim: OptimConfig, size: int) -> dict[str, Any]:
    """DeepSpeed's configuration; batch sizes are the trainer's affair, and 1 leaves the loss as it is."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(size, LARGEST_BUCKET),
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
        },
    }
    if parallel.compute == "bfloat16":
        settings["bf16"] = {"enabled": True}
        if stage > 1:  # with ZeRO 1 this switches to another optimizer, without the partitions used here
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _materialise(network: JointTransformer, device: torch.device, partition: dict[str, Any] | None) -> None:
    """Memory for the parameters; with `partition` (the settings) each unit is split before the next one is made."""
    for unit in (*units(network), network):
        for module in unit.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
        if partition is not None:
            import deepspeed

            deepspeed.zero.Init(module=unit, config_dict_or_path=partition)


def _start_deepspeed(device: torch.device) -> Any:
    """DeepSpeed over the running process group. RunError when it is not installed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would look for a GPU and take what it finds
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # its launcher's, which it insists on
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    except ImportError as error:
        raise RunError(f"parallel.engine=zero1, zero2, zero3 need DeepSpeed ({error}): pip install deepspeed") from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        # Its shared-memory all-reduce on CPUs serves inference only; it would take a compiler and a minute to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend())
    return deepspeed
