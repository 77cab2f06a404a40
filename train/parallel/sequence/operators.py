"""Attention over shared tokens as operators of torch: each is one whole for checkpointing, compiler and fake tensors.

    EXCHANGE = define("exchange", "(Tensor x, str group) -> Tensor", body, fake)

torch.compile gives wrong gradients for collectives within an autograd function (torch 2.11); an operator with a
backward that is an operator too is nothing it looks into, so a block with its exchanges is one graph. An operator takes
tensors, numbers and texts: a process group goes by its name, a backend by its key.

Dispatch modes that count kernels, bytes or memory look inside: see `run_body`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import Library, register_fake
from torch.utils._python_dispatch import TorchDispatchMode

LIBRARY = Library("mova_sequence", "DEF")  # noqa: TOR901
BODIES: dict[Any, Callable[..., Any]] = {}  # of every operator that is defined here


def define(name: str, signature: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A new operator. `signature`: in torch's schema language; `body`: computes it, on any device, without gradients,
    into tensors that are contiguous and alias no input; `fake`: its outputs' shapes."""
    LIBRARY.define(name + signature)
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    operator: Any = getattr(getattr(torch.ops, LIBRARY.ns), name).default
    BODIES[operator] = body
    return operator


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


def run_body(mode: TorchDispatchMode, operator: Any, args: Any, kwargs: Any) -> Any:
    """For a dispatch mode that was handed one of BODIES: compute it such that the mode sees each operator within."""
    with _entered(mode):
        return BODIES[operator](*args, **(kwargs or {}))


@contextmanager
def _entered(mode: TorchDispatchMode) -> Iterator[None]:
    """Not by the mode's own `__enter__`, which may begin a count anew."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)
