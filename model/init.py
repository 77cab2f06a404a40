"""Weights for training from scratch: a pure function of (seed, parameter name, shape), the same on every machine.

Each block of rows of each parameter has a Philox stream of its own (seed, name, number of the block), so that a rank
makes the rows that it holds and no others, and so that the number of ranks, their layout, the device and the torch
version change nothing.

From scratch: linears normal(0, 0.02), the projections that write into the residual stream (attention o, ffn.2, the
Bridge's o) divided by sqrt(2 · blocks) as in GPT-2; norms 1, biases 0; modulation normal / sqrt(dim) as in Wan; the
head's projection 0, so that training starts from the prediction 0. The Bridge's q and k may start with a bias
(`clock_bias`).

A fresh Bridge between trained towers starts as the reference's does (`bridge_part`): torch's own scheme.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model.bridge import BridgeConfig
from model.joint import JointConfig, JointTransformer

STD = 0.02
BLOCK = 1 << 15  # elements of a block: as many whole rows as fit, at least one
RESIDUAL_WRITERS = (".self_attn.o.weight", ".cross_attn.o.weight", ".ffn.2.weight", ".inner.o.weight")


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, depth: int, bridge: BridgeConfig | None = None
) -> Tensor:
    """The starting value of one parameter, float32 on the CPU. See `initial_part`."""
    return initial_part(name, shape, 0, math.prod(shape), seed, depth, bridge).view(shape)


def initial_part(
    name: str, shape: tuple[int, ...], start: int, stop: int, seed: int, depth: int, bridge: BridgeConfig | None = None
) -> Tensor:
    """[stop - start]: elements of the starting value of one parameter, in the order of its memory, float32 on the CPU.

    name: its full name in JointTransformer; depth: blocks of the deeper tower (scales the residual writers).
    """
    if bridge is not None and name.endswith((".inner.q.bias", ".inner.k.bias")):
        return clock_bias(shape[0], bridge)[start:stop]
    if name.endswith("bias") or name.endswith("head.head.weight"):
        return torch.zeros(stop - start)
    if "norm" in name or name.endswith("condition_scale"):
        return torch.ones(stop - start)
    if name.endswith("modulation"):
        std = shape[-1] ** -0.5
    elif name.endswith(RESIDUAL_WRITERS):
        std = STD / math.sqrt(2 * depth)
    else:
        std = STD
    return _normals(f"init/{seed}/{name}", shape, start, stop).mul_(std)


def bridge_part(
    name: str, shape: tuple[int, ...], start: int, stop: int, seed: int, config: JointConfig, zero: bool
) -> Tensor:
    """[stop - start]: elements of the starting value of one of the Bridge's parameters, float32 on the CPU.

    As the reference draws them (MOVA, interactionv2): linears and their biases uniform within 1/sqrt(inputs), torch's
    default; norms 1 and 0; the pooling's probe normal(0, 0.02), its in_proj Xavier uniform, its biases 0. `zero`: the
    projections that write into the towers are 0, so that the Bridge adds nothing.
    """
    if zero and ".inner.o." in name:
        return torch.zeros(stop - start)
    if config.bridge.clock_bias and name.endswith((".inner.q.bias", ".inner.k.bias")):
        return clock_bias(shape[0], config.bridge)[start:stop]
    if "norm" in name or name.endswith("condition_scale"):
        return torch.full((stop - start,), 0.0 if name.endswith("bias") else 1.0)
    if name.endswith((".in_proj_bias", ".out_proj.bias")):
        return torch.zeros(stop - start)
    stream = f"init/{seed}/{name}"
    if name.endswith(".probe"):
        return _normals(stream, shape, start, stop).mul_(STD)
    if name.endswith(".in_proj_weight"):
        bound = math.sqrt(6 / sum(shape))
    else:
        bound = _inputs(name, config) ** -0.5
    return _drawn(stream, shape, start, stop, "random").mul_(2 * bound).sub_(bound)


def _inputs(name: str, config: JointConfig) -> int:
    """Inputs of the linear that one of the Bridge's weights or biases belongs to."""
    to_video = ".audio_to_video_conditioners." in name
    asking, answering = (config.video.dim, config.audio.dim)[:: 1 if to_video else -1]
    return asking if name.rpartition(".")[0].endswith((".inner.q", ".inner.o")) else answering


def _normals(stream: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements start to stop of a tensor of normal numbers."""
    return _drawn(stream, shape, start, stop, "standard_normal")


def _drawn(stream: str, shape: tuple[int, ...], start: int, stop: int, kind: str) -> Tensor:
    """Elements start to stop of a tensor of random numbers, of which only the blocks that they lie in are drawn."""
    row = math.prod(shape[1:])
    size = max(1, BLOCK // row) * row
    values = np.empty(stop - start, dtype=np.float32)
    for block in range(start // size, -(-stop // size)):
        digest = hashlib.sha256(f"{stream}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        first, last = max(start, block * size), min(stop, (block + 1) * size)
        drawn = getattr(generator, kind)(last - block * size, dtype=np.float32)
        values[first - start : last - start] = drawn[first - block * size :]
    return torch.from_numpy(values)


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
