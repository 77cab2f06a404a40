"""Faults that trainers of this kind have had, planted inside the ranks: parity.py must catch each of them."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from train.engine import engine
from train.objective import noise
from train.parallel import mesh
from train.parallel.sequence import cores, merge, ring


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Run what is inside with this fault of FAULTS."""
    target, name, value = FAULTS[fault]()
    with patch.object(target, name, value):
        yield


Patch = tuple[Any, str, Any]


def _data_ranks_for_ranks() -> Patch:
    """A factor of 1/sp in every gradient: the engine averages over all ranks, the loss is multiplied by data ranks."""
    return mesh.Layout, "world", property(lambda self: self.dp_world)


def _mean_in_merge() -> Patch:
    """A factor of 1/sp where gradients of merged answers are summed over the group."""
    right = merge._sum
    return merge, "_sum", lambda grad, group: right(grad, group) / dist.get_world_size(group)


def _own_part_in_merge() -> Patch:
    """The gradient of merged answers taken from this rank's use of them only."""
    return merge, "_sum", lambda grad, group: grad.clone()


def _attended_pad() -> Patch:
    """Keys padded to a number that the ranks divide, and attended to."""

    class Padded(cores.DenseCore):
        def __call__(self, q: Any, k: Any, v: Any) -> Any:
            missing = -k.shape[1] % 4
            return super().__call__(q, *(pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v)))

    return cores, "DenseCore", Padded


def _no_bridge_gradient() -> Patch:
    """What sound wants of the picture does not reach the picture."""
    right = merge.MERGE_BACKWARD

    def gradients(*given: Any) -> Any:
        dq, dk, dv = right(*given)
        return dq, torch.zeros_like(dk), torch.zeros_like(dv)

    return merge, "MERGE_BACKWARD", gradients


def _ring_backward(altered: Callable[[Any], Callable[..., Any]]) -> Patch:
    """A ring whose backward calls `altered(backend.backward)` for each block."""
    right = ring._ring_backward

    def backward(*given: Any) -> Any:
        kernel = altered(ring.backend_of(given[-1]).backward)
        with patch.object(ring, "backend_of", lambda _: SimpleNamespace(backward=kernel)):
            return right(*given)

    return ring, "RING_BACKWARD", backward


def _first_block_again() -> Patch:
    """A ring whose backward takes the first block's keys and values in every turn."""

    def altered(right: Any) -> Any:
        first: list[Any] = []

        def again(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
            first[:] = first or [k, v]
            length = k.shape[1]  # blocks may differ by one token
            k, v = (torch.cat((a[:, :length], b[:, a.shape[1] :]), 1) for a, b in zip(first, (k, v), strict=True))
            return right(grad, q, k, v, out, lse)

        return again

    return _ring_backward(altered)


def _skipped_block() -> Patch:
    """A ring whose backward leaves out the second block."""

    def altered(right: Any) -> Any:
        turns = itertools.count()
        return lambda *given: [x * (next(turns) < 3) for x in right(*given)]

    return _ring_backward(altered)


def _lost_micro_batch() -> Patch:
    """Gradients of the last micro-batch only."""
    right = engine.backward_sharded

    def backward(model: Any, loss: Any, last: bool, accumulate: str) -> None:
        right(model, loss if last else 0 * loss, last, accumulate)

    return engine, "backward_sharded", backward


def _noise_keyed(key: Callable[[int, int], tuple[int, int]]) -> Patch:
    right = noise.generator

    def generator(seed: int, purpose: str, sample: int) -> Any:
        seed, sample = key(seed, sample)
        return right(seed, purpose, sample)

    return noise, "generator", generator


def _shared_noise() -> Patch:
    """Noise counted by each data rank for itself: the samples of one step share it over two data ranks."""
    return _noise_keyed(lambda seed, sample: (seed, sample // 2))


def _noise_by_rank() -> Patch:
    """Noise seeded by the rank: it differs within a sequence-parallel group."""
    return _noise_keyed(lambda seed, sample: (seed + dist.get_rank(), sample))


FAULTS: dict[str, Callable[[], Patch]] = {
    "factor of sp": _data_ranks_for_ranks,
    "factor of sp in a merge": _mean_in_merge,
    "sum left out of a merge": _own_part_in_merge,
    "attended pad": _attended_pad,
    "dropped bridge gradient": _no_bridge_gradient,
    "ring that reuses the first block": _first_block_again,
    "ring that leaves out a block": _skipped_block,
    "lost micro-batch": _lost_micro_batch,
    "noise shared by data ranks": _shared_noise,
    "noise that differs within a group": _noise_by_rank,
}
