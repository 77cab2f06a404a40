"""Counts the memory of live tensors, on any device and for fake tensors, which have sizes but no memory.

with LiveMemory() as memory:
    out = block(x)
memory.live, memory.peak                           # bytes; kernels' workspaces and the allocator's slack not counted
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.parallel.sequence.operators import BODIES, run_body


class LiveMemory(TorchDispatchMode):
    """While entered, follows every storage that an operator returns until it is freed or resized."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        """Also count a tensor created before."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._add(storage, storage.nbytes())

    def counts(self, tensor: Tensor) -> bool:
        """Whether its storage is among the live ones: one that was there before it was entered is not."""
        return self._sizes.get(id(tensor.untyped_storage()), 0) > 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:
            return run_body(self, func, args, kwargs)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) not in self._sizes:
                # A view of something that was there before is nothing new.
                old = any(isinstance(x, Tensor) and x.untyped_storage() is storage for x in tree_leaves((args, kwargs)))
                self._add(storage, 0 if old else storage.nbytes())
        return out

    def __enter__(self) -> LiveMemory:
        # FSDP frees and refills gathered parameters by resizing their storages, which is no operator.
        self._resize = torch.UntypedStorage.resize_
        memory = self

        def resize(storage: Any, size: int) -> None:
            memory._resize(storage, size)
            memory._set(id(storage), size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        # The Python object of a storage lives as long as the storage, so its identity names it.
        key = id(storage)
        self._sizes[key] = 0
        weakref.finalize(storage, self._forget, key).atexit = False
        self._set(key, size)

    def _set(self, key: int, size: int) -> None:
        if key in self._sizes:
            self.live += size - self._sizes[key]
            self.peak = max(self.peak, self.live)
            self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
