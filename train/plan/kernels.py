"""Kernels of a step, their FLOPs and bytes, as operators of torch show them: of a GPU, on a machine without one.

with kernels_of(gpu=True), OpCounter() as counter:
    out = block(x)
counter.ops
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model import fused
from train.parallel import float8, recompute
from train.parallel.sequence.operators import BODIES, run_body
from train.parallel.sequence.ulysses import travelling
from train.plan.lines import Finder, SourceLine

# FLOPs of torch's attention on the CPU, which its registry lacks; backward computes the scores again.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 10,
}


def _float8_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


# Stands in for a product in float8 with the casts of its operands: their time is in its rate, and compiled blocks call
# it as a whole.
_LIBRARY = Library("mova_plan", "DEF")  # noqa: TOR901
_LIBRARY.define("float8_product(Tensor a, Tensor b) -> Tensor")
_LIBRARY.impl("float8_product", _float8_product, "CompositeExplicitAutograd")
register_fake("mova_plan::float8_product", _float8_product, lib=_LIBRARY)
FLOAT8: Any = torch.ops.mova_plan.float8_product.default


class Op(NamedTuple):
    """One kernel. kind: "gemm", "float8" (a product with the casts of its operands), "attention", "attention_backward"
    or "memory"; flops; bytes read and written."""

    kind: str
    flops: int
    bytes: int


class OpCounter(TorchDispatchMode):
    """Counts kernels, their FLOPs and bytes; by line too, if `finder` is given. Views, and collectives
    (CollectiveCounter's), are none. meanwhile: those that ran while tensors of an attention travelled."""

    entered: ClassVar[list[OpCounter]] = []

    def __init__(self, finder: Finder | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.finder = finder
        self.ops: Counter[Op] = Counter()
        self.meanwhile: Counter[Op] = Counter()
        self.lines: Counter[tuple[SourceLine, Op]] = Counter()

    def add(self, op: Op, line: SourceLine | None) -> None:
        """One more kernel."""
        self.ops[op] += 1
        self.meanwhile[op] += travelling()
        if line is not None:
            self.lines[line, op] += 1

    def __enter__(self) -> OpCounter:
        self.entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self.entered.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:
            return run_body(self, func, args, kwargs)
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace in ("c10d", "_c10d_functional", "prim"):
            return out
        name = func.overloadpacket.__name__
        line = self.finder.find(name) if self.finder else None
        read = {key: value for key, value in kwargs.items() if key != "out"}
        given = [leaf for leaf in tree_leaves((args, read)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        storages = {id(tensor.untyped_storage()) for tensor in given}
        in_place = name.endswith("_") and not name.startswith("_") or "out" in kwargs
        if not in_place and all(id(tensor.untyped_storage()) in storages for tensor in made):
            return out  # a view, or nothing
        if name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"):
            return out
        moved = sum(_moved(tensor) for tensor in given) + sum(_moved(tensor) for tensor in made)
        if func == FLOAT8:  # both operands are read, written in float8 and read again
            moved += sum(2 * tensor.numel() for tensor in given)
        self.add(Op(*_kind_and_flops(func.overloadpacket, args, kwargs, out), moved), line)
        return out


def _kind_and_flops(operator: Any, args: Any, kwargs: Any, out: Any) -> tuple[str, int]:
    name = operator.__name__
    kind = "gemm"
    if operator is FLOAT8.overloadpacket:
        return "float8", 2 * args[0].numel() * args[1].shape[1]
    if "attention" in name or "flash" in name:
        kind = "attention_backward" if "backward" in name else "attention"
    if name in ATTENTION:
        q, k = args[1:3] if "backward" in name else args[:2]  # [B, H, L, D]
        return kind, ATTENTION[name] * q.numel() * k.shape[2]
    counted = flop_registry.get(operator)
    if counted is None:
        return "memory", 0
    return kind, int(counted(*args, **kwargs, out_val=out))


def _moved(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that repeats itself, what is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def kernels_of(gpu: bool) -> Iterator[None]:
    """While entered, what a GPU does in one kernel and a CPU in several: RMSNorm, and the backward of a modulation; and
    what it multiplies in float8."""
    with ExitStack() as stack:
        if gpu:
            stack.enter_context(patch.object(fused.RMSNorm, "forward", _rms_norm))
            stack.enter_context(patch.object(fused, "sums_in_kernel", lambda x: True))
            stack.enter_context(patch.object(float8, "scaled_product", lambda a, b: FLOAT8(a, b)))
            stack.enter_context(patch.dict(recompute.PRODUCTS, {FLOAT8: 0}))
        yield


def _rms_norm(module: fused.RMSNorm, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return nn.RMSNorm.forward(module, x)
    out: Tensor = _FusedNorm.apply(x, module.weight)  # type: ignore[no-untyped-call]
    return out


class _FusedNorm(torch.autograd.Function):
    """In the memory and time of the fused kernel: keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        out = torch.empty_like(x)
        _note(Op("memory", 0, x.nbytes + weight.nbytes + out.nbytes))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        _note(Op("memory", 0, gradient.nbytes + x.nbytes + x.nbytes))
        _note(Op("memory", 0, weight.nbytes))  # sums of the weight's gradient
        return torch.empty_like(x), torch.empty_like(weight)


def _note(op: Op) -> None:
    for counter in OpCounter.entered:
        counter.add(op, counter.finder.find("rms_norm") if counter.finder else None)
