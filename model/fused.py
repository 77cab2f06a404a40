"""Elementwise work of the network in as few passes over memory as eager torch allows, forward and backward.

Each function has a formula of plain operators. torch.compile is given that formula, which it fuses itself; in eager
mode an autograd function computes the same with fewer kernels, and keeps less for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (a·cos - b·sin, a·sin + b·cos) for pairs of channels of x [B, L, H, D]; cos and sin [L, R/2].

    Pairs are (2j, 2j+1) if `interleaved`, else (j, j + R/2), of the first R channels; the others stay. Computed in at
    least the dtype of the tables, rounded once, to x's dtype.
    """
    if torch.compiler.is_compiling():
        return turn_formula(x, cos, sin, interleaved)
    out: Tensor = _Turn.apply(x, cos, sin, interleaved, False)  # type: ignore[no-untyped-call]
    return out


def turn_formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`turn_pairs` by its definition."""
    turned = 2 * cos.shape[-1]
    head, rest = x[..., :turned], x[..., turned:]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]  # [1, L, 1, R/2]
    # To the wider dtype and back behind the split and before the join: a compiler writes a tensor that is joined as it
    # is, in forward and in backward.
    wide = torch.promote_types(x.dtype, cos.dtype)
    pair = head.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else head.chunk(2, dim=-1)
    a, b = (half.to(wide) for half in pair)
    first, second = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    head = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


class _Turn(torch.autograd.Function):
    """Backward turns the other way; nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.form = interleaved, back
        turned = 2 * cos.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if turned < x.shape[-1]:
            out[..., turned:] = x[..., turned:]
        sin = -sin if back else sin
        turn = _turn_adjacent if interleaved else _turn_halves
        turn(x[..., :turned], cos[None, :, None, :], sin[None, :, None, :], out[..., :turned])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        interleaved, back = ctx.form
        turned = _Turn.apply(gradient, *ctx.saved_tensors, interleaved, not back)  # type: ignore[no-untyped-call]
        return turned, None, None, None, None


def _turn_adjacent(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Pairs as complex numbers: one product."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    table = torch.complex(cos, sin).to(wide.to_complex())
    pairs = x.to(wide)
    even = all(stride % 2 == 0 for stride in pairs.stride()[:-1]) and pairs.storage_offset() % 2 == 0
    if not even or pairs.stride(-1) != 1:  # not to be had as a view
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
    if wide == x.dtype:
        torch.mul(pairs, table, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(pairs.mul_(table)).flatten(-2))


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Both halves are written to their places, without one tensor of them all."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    cos, sin = cos.to(wide), sin.to(wide)
    a, b = x.chunk(2, dim=-1)
    for mine, other, sign, half in zip((a, b), (b, a), (-1, 1), out.chunk(2, dim=-1), strict=True):
        if wide == x.dtype:
            torch.mul(mine, cos, out=half).addcmul_(other, sin, value=sign)
        else:
            torch.addcmul(mine * cos, other, sin, value=sign, out=half)


class RMSNorm(nn.RMSNorm):
    """torch's, whose kernel is one on a GPU. On a CPU torch composes it of many, which keep several tensors for
    backward; here the input and a number for each row are kept, as on the GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> x / rms(x) · weight, computed in at least float32."""
        assert self.eps is not None
        out: Tensor
        if x.is_cuda or torch.compiler.is_compiling():
            out = super().forward(x)
        else:
            out = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        out: Tensor = (x.to(wide) * rstd).mul_(weight).to(x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        wide, width = rstd.dtype, x.shape[-1]
        g, z = (tensor.reshape(-1, width).to(wide) for tensor in (gradient, x))  # [N, d]
        r, w = rstd.reshape(-1), weight.to(wide)
        product = g * z
        of_weight = torch.mv(product.t(), r)
        along = torch.mv(product, w) * r.pow(3) / width  # [N]
        torch.mul(g, w, out=product).mul_(r[:, None]).addcmul_(z, along[:, None], value=-1)
        return product.view(x.shape).to(x.dtype), of_weight.to(weight.dtype), None


class LayerNorm(nn.LayerNorm):
    """torch's, computed in the dtype of its input where that is wider than its weights; the result has the weights'
    dtype, which is that of the linear behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> LN(x) · weight + bias [..., d]."""
        assert self.weight is not None and self.bias is not None
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm without weights, then ·(1 + scale) + shift, rounded to `dtype` at the end. x [B, L, d]; shift and scale
    broadcast to it and have its dtype."""
    if torch.compiler.is_compiling():
        return (layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype)
    out: Tensor = _Modulate.apply(x, shift, 1 + scale, eps, dtype)  # type: ignore[no-untyped-call]
    return out


class _Modulate(torch.autograd.Function):
    """Keeps its input and two numbers for each row. Of one sample, shift and factor are the bias and weight of torch's
    own kernel, which has no tensor between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, factor: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1:]
        ctx.eps, ctx.of_one = eps, factor.numel() == shift.numel() == width.numel()
        weight, bias = (factor.flatten(), shift.flatten()) if ctx.of_one else (None, None)
        out, mean, rstd = torch.native_layer_norm(x, width, weight, bias, eps)
        ctx.save_for_backward(x, shift, factor, mean, rstd)
        if ctx.of_one:
            return out.to(dtype)
        if dtype == x.dtype:
            return torch.addcmul(shift, out, factor)
        return torch.addcmul(shift, out, factor, out=torch.empty_like(out, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, shift, factor, mean, rstd = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        width, backward = x.shape[-1:], torch.ops.aten.native_layer_norm_backward
        if ctx.of_one and sums_in_kernel(x):
            weights, all_three = (factor.flatten(), shift.flatten()), [True, True, True]
            of_x, of_factor, of_shift = backward(gradient, x, width, mean, rstd, *weights, all_three)
            return of_x, of_shift.view(shift.shape), of_factor.view(factor.shape), None, None
        normed = torch.native_layer_norm(x, width, None, None, ctx.eps)[0]
        of_factor = normed.mul_(gradient).sum_to_size(factor.shape)
        of_shift = gradient.sum_to_size(shift.shape)
        scaled = torch.mul(gradient, factor)
        of_x = backward(scaled, x, width, mean, rstd, None, None, [True, False, False])[0]
        return of_x, of_shift, of_factor, None, None


def sums_in_kernel(x: Tensor) -> bool:
    """Whether torch's backward of a LayerNorm adds up its weights' gradients in at least float32.

    On a CPU it does so in the dtype of x: in bfloat16 the sum over 4,000 tokens is off by 9 %.
    """
    return x.is_cuda or x.dtype.itemsize >= 4


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y, rounded once, to the dtype of x. x and y [B, L, d]; gate broadcasts to them. x may be wider than
    y."""
    if torch.compiler.is_compiling():
        return x + gate * y
    out: Tensor = _AddGated.apply(x, gate, y)  # type: ignore[no-untyped-call]
    return out


class _AddGated(torch.autograd.Function):
    """torch's own backward of addcmul multiplies y by its factor of 1 first, and by gradients that nobody needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y if ctx.needs_input_grad[1] else None)
        ctx.of_y = y.dtype
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        gate, y = ctx.saved_tensors
        of_gate = (gradient * y).sum_to_size(gate.shape) if ctx.needs_input_grad[1] else None
        return gradient, of_gate, (gradient * gate).to(ctx.of_y)
