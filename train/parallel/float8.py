"""Linears that multiply in float8: those of a video expert and of the Bridge's video side, which see all video tokens.

Each of a linear's three products (its output, the gradient of its input, the gradient of its weight) takes both
operands as float8 e4m3, with one scale for every row of the left and every column of the right one: the power of two
at or below 448 over the largest value, found anew each time. This is torchao's recipe "rowwise" (float8/config.py of
torchao 0.18). Weights stay as the engine gives them: masters, gathers and reductions are those of any other run.

- `float8`: torchao's linears, whose products run on the matrix units of the GPU.
- `float8_emulated`: the same roundings on any device, multiplied in float32. It is slower than no float8 at all, and
  shows what float8 does to a model before a GPU that has it is rented.

The gradient of a weight has its scales along the tokens of one rank, and so differs between layouts that split clips
differently: by little (2e-6 in a small model), since powers of two change the rounding only of what lies below the
least normal value. All else is the same in every layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from core.errors import RunError
from model.block import Block
from model.bridge import Conditioner
from model.joint import JointTransformer
from train.parallel.recompute import shape_of

LINEARS = ("compute", "float8", "float8_emulated")
FLOAT8_FROM = (8, 9)  # least compute capability whose matrix units multiply float8
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
LEAST = 1e-12  # a row of zeros is scaled as if this were its largest value
MULTIPLE = 16  # of a linear's widths, which the units need; torchao pads the number of tokens
INSTALL = "pip install torchao"
# By shape of a unit: its linears that are applied to video tokens. Keys and values of captions come from 512 rows.
LARGE = {
    "video": (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2",
    ),
    "audio": (),
    "to_video": ("inner.q", "inner.o"),
    "to_audio": ("inner.k", "inner.v"),
}  # fmt: skip


def convert_linears(model: JointTransformer, kind: str) -> None:
    """Give the large linears products of this kind of LINEARS, in place; parameters keep their names. Call before
    checkpointing, compile and FSDP. RunError for widths that the units cannot multiply, or without torchao."""
    if kind == "compute":
        return
    large = dict(large_linears(model))
    for name, one in large.items():
        if one.in_features % MULTIPLE or one.out_features % MULTIPLE:
            raise RunError(
                f"parallel.linear={kind}: {name} is {one.out_features} x {one.in_features}, and float8 units need "
                f"multiples of {MULTIPLE}; choose other widths, or parallel.linear=compute"
            )
    if kind == "float8":
        _convert_by_torchao(model, set(large))
        return
    for one in large.values():
        one.__class__ = EmulatedLinear  # in place, as FSDP2 makes its modules: weights and hooks stay


def large_linears(model: JointTransformer) -> Iterator[tuple[str, nn.Linear]]:
    """(name, linear) of those that are applied to video tokens in blocks and Bridge directions. Stem and head are
    left out: they are small, and at the ends of the network."""
    for name, unit in model.named_modules():
        if isinstance(unit, Block | Conditioner):
            for path in LARGE[shape_of(name)]:
                one = unit.get_submodule(path)
                assert isinstance(one, nn.Linear)
                yield f"{name}.{path}", one


def obstacle(device: torch.device, compute: torch.dtype) -> str:
    """Why this process cannot multiply in float8, in a few words; empty if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_FROM:
        needed, found = (".".join(map(str, version)) for version in (FLOAT8_FROM, capability))
        return f"needs compute capability {needed} or more, this device has {found}"
    if compute != torch.bfloat16:
        return f"needs parallel.compute_dtype=bfloat16, not {str(compute).removeprefix('torch.')}"
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        return f"needs torchao ({error}): {INSTALL}"
    return ""


def _convert_by_torchao(model: JointTransformer, names: set[str]) -> None:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise RunError(f"parallel.linear=float8 needs torchao ({error}): {INSTALL}") from None
    # The gradient of a weight sums over tokens, whose number is that of the clip.
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in names)


class EmulatedLinear(nn.Linear):
    """A linear with the roundings of float8 products; its bias is added to what they give."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out: Tensor = _Products.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Products(torch.autograd.Function):
    """Keeps its operands as they are given, as torchao's does: they are rounded along another dimension in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # [N, out]
        of_x = scaled_product(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = scaled_product(rows.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], both rounded to float8 along K, multiplied and summed in at least float32. In the dtype
    of a."""
    return linear(rounded(a, 1), rounded(b, 0).t()).to(a.dtype)


def rounded(x: Tensor, dim: int) -> Tensor:
    """x as float8 holds it with one scale along `dim`, in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    largest = x.abs().amax(dim, keepdim=True).to(torch.float64)
    scale = (LARGEST / largest.clamp(min=LEAST)).to(torch.float32)
    scale = torch.exp2(torch.floor(torch.log2(scale)))
    bits = (x.to(torch.float32) * scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return bits.to(wide) / scale.to(wide)
