"""Sets DeepSpeed up for this network: starts and configures it, allocates memory, and adapts the network's
interface."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import RunError
from model.joint import JointTransformer, Velocities
from train.engine.optim_config import OptimConfig
from train.parallel.recompute import units

LARGEST_BUCKET = 500_000_000  # elements that are reduced at a time: DeepSpeed's own default


class AsTuple(nn.Module):
    """The network for DeepSpeed, whose hooks see tensors in tuples but not in a dataclass."""

    def __init__(self, network: JointTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> tuple[Tensor | None, Tensor | None]:
        out = self.network(**inputs)
        return out.video, out.audio


class AsNetwork:
    """What the trainer calls: DeepSpeed's engine with the network's interface."""

    def __init__(self, network: JointTransformer, engine: Any) -> None:
        self.config, self.token_range = network.config, network.token_range
        self.given: set[str] = set()  # modalities of the forwards for backward since the last step
        self._engine = engine

    def __call__(self, **inputs: Any) -> Velocities:
        if torch.is_grad_enabled():
            self.given |= {modality for modality in ("video", "audio") if inputs[modality] is not None}
        return Velocities(*self._engine(**inputs))


def settings_of(stage: int, compute: torch.dtype, optim: OptimConfig, size: int) -> dict[str, Any]:
    """DeepSpeed's configuration; the trainer handles batch sizes, and 1 leaves the loss unchanged."""
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
    if compute == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        if stage > 1:  # with ZeRO 1 this switches to another optimizer, without the partitions used here
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def materialise(network: JointTransformer, device: torch.device, partition: dict[str, Any] | None) -> None:
    """Memory for the parameters; with `partition` (the settings) each unit is split before the next one is made."""
    for unit in (*units(network), network):
        for module in unit.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
        if partition is not None:
            import deepspeed

            deepspeed.zero.Init(module=unit, config_dict_or_path=partition)


def start_deepspeed(device: torch.device) -> Any:
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
