"""Weights for training from scratch: a pure function of (seed, parameter name, shape), the same on every machine.

Each parameter has a Philox stream of its own, so that a rank can make the values of its own parameters in any order,
and so that the number of ranks, the device and the torch version change nothing.

Scheme: linears normal(0, 0.02), the projections that write into the residual stream (attention o, ffn.2, the Bridge's
o) divided by sqrt(2 · blocks) as in GPT-2; norms 1, biases 0; modulation normal / sqrt(dim) as in Wan; the head's
projection 0, so that training starts from the prediction 0. The Bridge's q and k may start with a bias (`clock_bias`).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model.bridge import BridgeConfig
from model.joint import JointTransformer

STD = 0.02
RESIDUAL_WRITERS = (".self_attn.o.weight", ".cross_attn.o.weight", ".ffn.2.weight", ".inner.o.weight")


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, depth: int, bridge: BridgeConfig | None = None
) -> Tensor:
    """The starting value of one parameter, float32 on the CPU.

    name: its full name in JointTransformer; depth: blocks of the deeper tower (scales the residual writers).
    """
    if bridge is not None and name.endswith((".inner.q.bias", ".inner.k.bias")):
        return clock_bias(shape[0], bridge)
    if name.endswith("bias") or name.endswith("head.head.weight"):
        return torch.zeros(shape)
    if "norm" in name or name.endswith("condition_scale"):
        return torch.ones(shape)
    if name.endswith("modulation"):
        std = shape[-1] ** -0.5
    elif name.endswith(RESIDUAL_WRITERS):
        std = STD / math.sqrt(2 * depth)
    else:
        std = STD
    digest = hashlib.sha256(f"init/{seed}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).mul_(std)


@torch.no_grad()
def init_weights(model: JointTransformer, depth: int, seed: int = 0) -> None:
    """Give every parameter of a whole (not sharded) model its starting value, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), seed, depth, model.config.bridge))


def clock_bias(dim: int, config: BridgeConfig) -> Tensor:
    """[dim]: BridgeConfig.clock_bias in the channels of each head that the Bridge's RoPE turns fastest, else 0."""
    half = config.head_dim // 2  # channel j turns with channel j + half
    head = torch.zeros(config.head_dim)
    head[: half // 2] = head[half : half + half // 2] = config.clock_bias
    return head.repeat(dim // config.head_dim)
