"""Attention as torch's kernels compute it here, against its definition."""

import pytest
import torch

from model.attention import merge_attention
from model.backends.sdpa import Sdpa


def reference(q, k, v):
    """Attention by its definition, float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def qkv(dtype, lq=37, lk=53, heads=3, width=32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, heads, width, generator=g).to(dtype) for n in (lq, lk, lk)]


BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BARS)
def test_torch_s_kernel_equals_the_definition(dtype):
    q, k, v = qkv(dtype)
    expected, expected_lse = reference(q, k, v)
    out, lse = Sdpa().with_lse(q, k, v)
    for result in (out, Sdpa()(q, k, v)):
        assert result.shape == q.shape and result.dtype == dtype
        assert (result.double() - expected).abs().max() < BARS[dtype]
    assert lse.shape == (2, 3, 37) and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert (lse.double() - expected_lse).abs().max() < BARS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_of_the_keys_merge_by_log_sum_exp(dtype):
    q, k, v = qkv(dtype)
    halves = [Sdpa().with_lse(q, k[:, part], v[:, part]) for part in (slice(20), slice(20, None))]
    merged, lse = merge_attention(*halves[0], *halves[1])
    whole, whole_lse = reference(q, k, v)
    assert merged.dtype == torch.float32 and (merged.double() - whole).abs().max() < BARS[dtype]
    assert (lse.double() - whole_lse).abs().max() < BARS[dtype]


def test_gradients_by_blocks_of_keys_sum_to_those_of_the_whole():
    q, k, v = (x.requires_grad_() for x in qkv(torch.float64))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad(reference(q, k, v)[0], (q, k, v), grad)
    with torch.no_grad():
        out, lse = Sdpa().with_lse(q, k, v)
        halves = (slice(20), slice(20, None))
        parts = [Sdpa().backward(grad, q, k[:, half], v[:, half], out, lse) for half in halves]
    found = (parts[0][0] + parts[1][0], *(torch.cat([part[i] for part in parts], 1) for i in (1, 2)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
