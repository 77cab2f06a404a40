"""A ring rounds no more than attention on one device does: what sums its parts is float32."""

import math

import pytest
import torch

from model.backends.operator import key_of
from model.backends.sdpa import Sdpa
from tests.train.parallel.sequence.ring import run_ring
from train.parallel.attention import definition
from train.parallel.sequence import ring as rings

RANKS, LENGTHS, HEADS, WIDTH = 8, [65, 64, 64, 64, 64, 63, 64, 64], 4, 64
BACKEND = key_of(Sdpa())
NAMES = ("output", "dq", "dk", "dv")


@pytest.fixture(scope="module")
def inputs():
    """q, k, v and the gradient of the output, in bfloat16; what they give in float64."""
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(1, sum(LENGTHS), HEADS, WIDTH, generator=g).bfloat16() for _ in range(4)]
    return given, definition(*(x.double() for x in given))


def relative(found, true):
    return [((a.double() - true[name]).norm() / true[name].norm()).item() for name, a in zip(NAMES, found, strict=True)]


def on_one_device(given):
    q, k, v = (x.clone().requires_grad_() for x in given[:3])
    out = Sdpa()(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


def on_a_ring(given):
    pieces = [x.split(LENGTHS, dim=1) for x in given]

    def one_rank(rank):
        q, k, v = (x[rank].clone().requires_grad_() for x in pieces[:3])
        out = rings.ring_attention(q, k, v, LENGTHS, "", BACKEND)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), pieces[3][rank])]

    return [torch.cat(parts, dim=1) for parts in zip(*run_ring(RANKS, one_rank), strict=True)]


def allowed(one, true):
    """Errors of one device; where a ring sums answers of the kernel that are rounded already (it knows no other), that
    rounding is added in quadrature: keys that are split in eight are as far from the whole as one rounding of it."""
    once = relative([true[name].bfloat16() for name in NAMES], true)
    summed = {"output", "dq"}
    return [1.05 * (math.hypot(a, b) if n in summed else a) for n, a, b in zip(NAMES, one, once, strict=True)]


def test_eight_ranks_round_as_one_device_does(inputs):
    given, true = inputs
    ring = on_a_ring(given)
    assert all(x.dtype == torch.bfloat16 for x in ring)
    bounds, errors = allowed(relative(on_one_device(given), true), true), relative(ring, true)
    assert all(0 < error <= bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)


def test_sums_in_bfloat16_would_be_seen(inputs, monkeypatch):
    given, true = inputs
    monkeypatch.setattr(rings, "_wide", lambda dtype: dtype)
    right = rings.merge_attention

    def rounded(out, *rest):
        merged, lse = right(out, *rest)
        return merged.to(out.dtype), lse

    monkeypatch.setattr(rings, "merge_attention", rounded)
    bounds, errors = allowed(relative(on_one_device(given), true), true), relative(on_a_ring(given), true)
    assert all(error > bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)
