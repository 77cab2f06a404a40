"""Hidden states that are wider than the weights (`keep_residual`): what they save of a deep network's exactness, and
that nothing changes where they are as wide as before."""

import copy

import pytest
import torch

from model.block import Block
from model.bridge import BridgeConfig, Conditioner
from model.fused import LayerNorm, add_gated, modulate
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig

LAYERS = 40  # of MOVA
EPS = 1e-6


def deep_config(layers=LAYERS, **bridge):
    sizes = dict(dim=64, num_heads=2, num_layers=layers, ffn_dim=96, text_dim=8, freq_dim=16)
    return JointConfig(
        video=TowerConfig(in_dim=36, out_dim=16, **sizes),
        audio=TowerConfig(in_dim=8, out_dim=8, patch_size=[1], rope="dac", **sizes),
        bridge=BridgeConfig(head_dim=32, **bridge),
        two_experts=False,
        text_length=4,
    )


def filled(config):
    """Random weights that keep the size of what they are given, as a trained network's do; rounded to bfloat16."""
    model, generator = JointTransformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(0.1 * drawn + name.endswith("weight"))
            else:
                p.copy_(drawn / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * drawn)
    return model.to(torch.bfloat16)


def ask(model, dtype, batch=1):
    """(video, audio, gradients of the weights and of the inputs) in float64, of inputs that bfloat16 can hold."""
    g = torch.Generator().manual_seed(1)
    shapes = {"video": (16, 2, 4, 6), "audio": (8, 9), "condition": (20, 2, 4, 6), "text": (4, 8)}
    given = {name: torch.randn(batch, *shape, generator=g).bfloat16().to(dtype) for name, shape in shapes.items()}
    given["video"].requires_grad_()
    t = torch.linspace(900.0, 200.0, batch, dtype=torch.float64)
    out = model(**given, t_video=t, t_audio=t.flip(0) / 2)
    pushes = [torch.randn(x.shape, generator=g) for x in (out.video, out.audio)]
    sum((x * push.to(x.dtype)).sum() for x, push in zip((out.video, out.audio), pushes, strict=True)).backward()
    gradients = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return out.video.detach().double(), out.audio.detach().double(), gradients, given["video"].grad.double()


@pytest.mark.slow
def test_forty_layers_in_bfloat16_lose_less():
    plain = filled(deep_config())
    wide, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    wide.keep_residual(torch.float32)
    true, rounded, kept = (
        ask(*one) for one in ((exact, torch.float64), (plain, torch.bfloat16), (wide, torch.bfloat16))
    )
    errors = [
        [((x - y).norm() / y.norm()).item() for x, y in zip(found, true, strict=True)] for found in (rounded, kept)
    ]
    for what, before, now in zip(("video", "audio", "weights' gradients", "input's gradient"), *errors, strict=True):
        print(f"{what}: {before:.2e} -> {now:.2e}, {before / now:.1f} times")
    for before, now in zip(*(row[:2] for row in errors), strict=True):
        assert 0.9e-2 < before < 2.5e-2 and now < 5.5e-3 and before > 2.7 * now
    for before, now in zip(*(row[2:] for row in errors), strict=True):
        assert before > 1.5 * now


def test_in_float64_it_changes_no_bit():
    config = deep_config(2, pooled_adaln=True, trainable_condition_scale=True)
    plain = filled(config).double()
    wide = copy.deepcopy(plain)
    wide.keep_residual(torch.float32)
    for a, b in zip(ask(plain, torch.float64, 2), ask(wide, torch.float64, 2), strict=True):
        assert torch.equal(a, b)


class SeenCore:
    """A core that notes what it is given."""

    def __init__(self, core, seen):
        self.core, self.seen = core, seen

    def start(self, x, after=None):
        return x

    def __call__(self, q, k, v, *more):
        self.seen.add(("attention", q.dtype))
        return self.core(q, k, v, *more)


def test_states_are_float32_and_linears_and_attention_bfloat16():
    model, seen = filled(deep_config(2, pooled_adaln=True)), set()
    model.keep_residual(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Block | Conditioner):
            module.register_forward_pre_hook(lambda m, given: seen.add(("state", given[0].dtype)))
        elif isinstance(module, torch.nn.Linear) and ".time_" not in name and "blocks" in name + "conditioners":
            module.register_forward_pre_hook(lambda m, given: seen.add(("linear", given[0].dtype)))
        if hasattr(module, "core"):
            module.core = SeenCore(module.core, seen)
    ask(model, torch.bfloat16, 2)
    assert {one for one in seen if one[0] != "linear"} == {("state", torch.float32), ("attention", torch.bfloat16)}
    assert ("linear", torch.bfloat16) in seen


@pytest.mark.parametrize("clips", [1, 2])
def test_elementwise_work_is_rounded_once(clips):
    """float32 in, bfloat16 out, and their gradients, against float64."""
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, shift, scale, y = draw(clips, 7, 32), draw(clips, 1, 32), draw(clips, 1, 32), draw(clips, 7, 32).bfloat16()
    norm = LayerNorm(32, eps=EPS).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(draw(32))
    push = draw(clips, 7, 32).bfloat16()

    def both(function, given, dtype):
        inputs = [one.detach().clone().requires_grad_() for one in given]
        out = function(*inputs)
        assert out.dtype == dtype
        return out, torch.autograd.grad(out, inputs, push.to(out.dtype))

    def plain(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()

    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    cases = (
        (
            lambda x, s, f: modulate(x, s, f, EPS, torch.bfloat16), lambda x, s, f: plain(x) * (1 + f) + s,
            (x, shift, scale), True,
        ),
        (norm, lambda x: plain(x) * weight + bias, (x,), True),
        (add_gated, lambda x, gate, y: x + gate * y, (x, scale, y), False),
    )  # fmt: skip
    for ours, definition, given, rounds in cases:
        out, gradients = both(ours, given, torch.bfloat16 if rounds else torch.float32)
        exact, true = both(definition, [one.double() for one in given], torch.float64)
        assert ((out - exact).abs() <= exact.abs() * (2**-8 if rounds else 1e-6) + 1e-5).all()
        for one, found, right in zip(given, gradients, true, strict=True):
            assert found.dtype == one.dtype
            assert (found - right).norm() <= right.norm() * (1e-6 if one.dtype == torch.float32 else 2**-8)
