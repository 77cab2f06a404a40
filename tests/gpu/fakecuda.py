"""The program on a GPU that is not there: fake tensors on cuda:0, a fake process group, streams that are none.

    with fake_cuda(world=8) as device:
        layout = make_layout(parallel, device)             # meshes are true
        with fake_tensors(), Watch() as watch:
            forward_backward(...)
    watch.found                                            # what waits for the device, or should not be there

Shapes, dtypes and devices are true, values are not there: every number that comes to the host is 1. Autograd's engine
refuses such tensors; `walk_backward` takes its place. For a process of its own: what is replaced in torch holds until
`fake_cuda` is left, and rank 0 of the group is all that there is.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.parallel.sequence.operators import BODIES, run_body

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(str(ROOT / name) for name in ("model", "data", "train", "tools", "launch"))
# Operators whose result's values or shape the host must know.
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "bincount")
NAME = "NVIDIA H100 80GB HBM3"


class Finding(NamedTuple):
    """What should not be there without a reason. `kind`: "sync" (the host waits for the device), "copy" (between host
    and device), "mixed" (an operator of tensors on both), "float64"; `what`: operator or direction; `where`: function
    of the project; `line`: its text (of "float64" both are empty)."""

    kind: str
    what: str
    where: str
    line: str


def place(depth: int = 1) -> tuple[str, str]:
    """The innermost function of the project that is being called, and the text of its line."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGES):
        frame = frame.f_back
    if frame is None:
        return "outside of the project", ""
    file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{file}:{frame.f_code.co_qualname}", line


class Watch(TorchDispatchMode):
    """Lists what happens on the device while it is entered."""

    current: Watch | None = None  # for the stand-ins of torch.cuda, which are called from anywhere
    _locked: dict[int, Tensor] = {}  # tensors in page-locked memory by their storages, kept: an identity names one only

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.found: Counter[Finding] = Counter()  # how often; of "float64": numbers in the largest tensor

    def note(self, kind: str, what: str) -> None:
        """One more finding at this place."""
        self.found[Finding(kind, what, *place(2))] += 1

    def __enter__(self) -> Watch:
        self._outer, Watch.current = Watch.current, self
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        Watch.current = self._outer
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:
            return run_body(self, func, args, kwargs)
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # x.device, asked all the time
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if name == "_local_scalar_dense":  # .item(), .tolist(), float(): the fake has no value
            if "cuda" in devices:
                self.note("sync", name)
            return 1.0 if args[0].is_floating_point() else 1
        if name == "is_pinned":
            return self._is_locked(args[0])
        if name == "_pin_memory" or kwargs.pop("pin_memory", False):  # fake tensors know nothing of it
            out = torch.empty_like(args[0]) if name == "_pin_memory" else func(*args, **kwargs)
            self._locked[out.untyped_storage()._cdata] = out
            return out
        if "cuda" in devices and name in SYNCS:
            self.note("sync", name)
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        elif name == "_foreach_copy_":
            for target, source in zip(*args[:2], strict=True):
                self._copy("copy_", (target, source, *args[2:]), kwargs)
        elif {"cuda", "cpu"} <= devices:
            self.note("mixed", str(func))
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if "cuda" in devices or any(result.device.type == "cuda" for result in results):
            self.ops[str(func)] += 1
            wide = [r.numel() for r in results if r.dtype == torch.float64 and r.device.type == "cuda"]
            if wide:
                finding = Finding("float64", "", place()[0], "")
                self.found[finding] = max(self.found[finding], *wide)
        return out

    @classmethod
    def lock(cls, whole: Tensor) -> None:
        """In the place of train/parallel/host_memory.py's: this memory, and all views of it, is page-locked."""
        cls._locked[whole.untyped_storage()._cdata] = whole

    def _is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._locked

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "_to_copy":
            source, asked = args[0], kwargs.get("device")
            target = torch.device(asked).type if asked is not None else source.device.type
            waits = not kwargs.get("non_blocking", False)
        else:
            source, target = args[1], args[0].device.type
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device.type != target and "meta" not in (source.device.type, target):
            on_host = source if target == "cuda" else args[0] if name == "copy_" else None
            how = "waiting" if waits or on_host is None or not self._is_locked(on_host) else "without waiting"
            self.note("copy", f"{source.device.type} to {target}, {how}")


class _Stream:
    priority = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _noted("stream.synchronize")


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        _noted("event.synchronize")


def _noted(what: str) -> None:
    if Watch.current is not None:
        Watch.current.found[Finding("sync", what, *place(3))] += 1


def _tolist(tensor: Tensor) -> Any:
    """All numbers come to the host at once."""
    if tensor.device.type == "cuda":
        _noted("tolist")
    return np.ones(tuple(tensor.shape), dtype=float if tensor.is_floating_point() else int).tolist()


def _asked_by_project() -> bool:
    """There is a GPU for the project; torch's own code, told the same, would call the driver."""
    return sys._getframe(1).f_code.co_filename.startswith(PACKAGES)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's choice of a kernel asks the driver; this is what it would choose on an H100."""
    aten, kept = torch.ops.aten, q.requires_grad or k.requires_grad or v.requires_grad
    if q.device.type == "cpu":
        return scaled_dot_product_attention(q, k, v)
    if q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, kept)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, kept)[0]


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called without fake tensors: meshes are made of true ones."""

    def call(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return call


@contextlib.contextmanager
def fake_cuda(world: int = 8, capability: tuple[int, int] = (9, 0)) -> Iterator[torch.device]:
    """Let torch believe in `world` ranks and a GPU of this capability. This is rank 0."""
    current = _Stream()
    stand_ins = {
        "Stream": _Stream, "Event": _Event, "stream": _nothing, "device": _nothing,
        "current_stream": lambda *_: current, "default_stream": lambda *_: current, "set_stream": lambda *_: None,
        "is_available": _asked_by_project, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: 8, "current_device": lambda: 0, "set_device": lambda *_: None,
        "synchronize": lambda *_: _noted("cuda.synchronize"), "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: NAME, "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "is_bf16_supported": lambda *_, **__: True,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        stack.enter_context(patch("train.parallel.host_memory.lock_pages", Watch.lock))
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
        stack.enter_context(patch.object(torch, "_fused_sdp_choice", lambda *_, **__: cudnn))
        for attribute in ("__init__", "_flatten", "__getitem__"):
            stack.enter_context(patch.object(DeviceMesh, attribute, outside(getattr(DeviceMesh, attribute))))
        stack.enter_context(patch.object(FakeTensor, "tolist", _tolist))
        stack.enter_context(patch.object(DeviceMesh, "mesh", property(outside(DeviceMesh.mesh.fget))))
        for original, stand_in in (
            (init_device_mesh, outside(init_device_mesh)), (scaled_dot_product_attention, _attention),
        ):  # fmt: skip
            for module in [m for m in sys.modules.values() if vars(m).get(original.__name__) is original]:
                stack.enter_context(patch.object(module, original.__name__, stand_in))
        yield torch.device("cuda", 0)


def fake_tensors() -> FakeTensorMode:
    """While entered, tensors have no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@torch.no_grad()
def walk_backward(loss: Tensor) -> Counter[str]:
    """Call every function of the graph behind a scalar, in an order that autograd's engine may take; gradients of
    parameters are left out, and with them FSDP's reductions. Returns how often each kind was called."""
    root = loss.grad_fn
    assert root is not None
    waits: Counter[Any] = Counter()  # of each function: gradients that are still to come
    seen, open_ends = {root}, [root]
    while open_ends:
        for following, _ in open_ends.pop().next_functions:
            if following is not None:
                waits[following] += 1
                if following not in seen:
                    seen.add(following)
                    open_ends.append(following)
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready, called = [root], Counter[str]()
    task = id(loss)  # a backward has a number, by which checkpoints know that they have computed again
    with patch.object(torch._C, "_current_graph_task_id", lambda: task):
        _walk(ready, gradients, waits, called)
    return called


def _walk(ready: list[Any], gradients: dict[Any, dict[int, Tensor]], waits: Counter[Any], called: Counter[str]) -> None:
    while ready:
        node = ready.pop()
        known = gradients.pop(node, {})
        name = node.name()
        if "AccumulateGrad" in name:
            continue
        called[name] += 1
        given = [
            known[place] if place in known else torch.zeros(m.shape, dtype=m.dtype, device=m.device)
            for place, m in enumerate(node._input_metadata)
        ]
        for (following, place), gradient in zip(node.next_functions, _gradients(node, given), strict=True):
            if following is None:
                continue
            if gradient is not None:
                expected = following._input_metadata[place]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)  # as the engine does
                sums = gradients.setdefault(following, {})
                sums[place] = sums[place] + gradient if place in sums else gradient
            waits[following] -= 1
            if waits[following] == 0:
                ready.append(following)


def _gradients(node: Any, given: list[Tensor]) -> list[Tensor | None]:
    """What a function of the graph makes of its gradients, one for each tensor that it was given in forward."""
    if "RegisterPostBackward" in node.name():  # FSDP's, which reduces what has come so far
        return list(given)
    called = node(*given) if callable(node) else node.apply(*given)
    outputs = list(called) if isinstance(called, tuple) else [called]
    while len(outputs) > len(node.next_functions) and outputs[-1] is None:
        outputs.pop()  # of arguments that are no tensors; they come last
    return outputs
