"""One attention function: every backend that runs here, its log-sum-exp, and the messages when one cannot run."""

import pytest
import torch

from model.attention import BACKENDS, attention, merge_attention, select_backend


def reference(q, k, v):
    """Attention by its definition, float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def runnable(device, dtype):
    capability = torch.cuda.get_device_capability()[0] if device == "cuda" else 0
    names = []
    for name in BACKENDS:
        try:
            select_backend(name, device, dtype, capability)
        except RuntimeError:
            continue
        names.append(name)
    return names


def qkv(device, dtype, lq=37, lk=53, heads=3, width=32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, heads, width, generator=g).to(device, dtype) for n in (lq, lk, lk)]


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_backend_that_runs_here_equals_the_definition(device, dtype):
    q, k, v = qkv(device, dtype)
    expected, expected_lse = reference(q, k, v)
    names = runnable(device, dtype)
    assert {"auto", "sdpa"} <= set(names)
    for name in names:
        out, lse = attention(q, k, v, backend=name, return_lse=True)
        for result in (out, attention(q, k, v, backend=name)):
            assert result.shape == q.shape and result.dtype == dtype
            assert (result.double() - expected).abs().max() < BARS[dtype], name
        assert lse.shape == (2, 3, 37)
        assert (lse.double() - expected_lse).abs().max() < BARS[dtype], name


@pytest.mark.parametrize("device", DEVICES)
def test_two_halves_of_the_keys_merge_by_log_sum_exp(device):
    q, k, v = qkv(device, torch.float32)
    first = attention(q, k[:, :20], v[:, :20], return_lse=True)
    second = attention(q, k[:, 20:], v[:, 20:], return_lse=True)
    merged, lse = merge_attention(*first, *second)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_attention_with_log_sum_exp():
    q, k, v = (x.requires_grad_() for x in qkv("cpu", torch.float64))
    out, _ = attention(q, k, v, return_lse=True)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(reference(q, k, v)[0].square().sum(), (q, k, v))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "requested,device,dtype,capability,message",
    [
        ("flash2", "cpu", torch.bfloat16, 0, "needs a CUDA device, the tensors are on cpu"),
        ("cudnn", "cuda", torch.float32, 9, "needs bfloat16 or float16"),
        ("flash3", "cuda", torch.bfloat16, 8, r"compute capabilities \(9,\), this device has 8.x"),
    ],
)
def test_a_backend_that_cannot_run_says_why(requested, device, dtype, capability, message):
    with pytest.raises(RuntimeError, match=message):
        select_backend(requested, device, dtype, capability)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'flash9' is not one of auto, sdpa"):
        select_backend("flash9", "cpu", torch.float32, 0)


def test_auto_prefers_the_newest_flash_that_is_installed(monkeypatch):
    installed = {"flash_attn", "flash_attn_interface"}
    monkeypatch.setattr("model.attention._installed", lambda package: package in installed)
    pick = select_backend.__wrapped__
    assert pick("auto", "cuda", torch.bfloat16, 9) == "flash3"
    assert pick("auto", "cuda", torch.bfloat16, 8) == "flash2"
    assert pick("auto", "cuda", torch.float32, 9) == "sdpa"
    installed.clear()
    assert pick("auto", "cuda", torch.bfloat16, 9) == "cudnn"
    with pytest.raises(RuntimeError, match="'flash_attn' is not installed"):
        pick("flash2", "cuda", torch.bfloat16, 9)
