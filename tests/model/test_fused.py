"""Elementwise work in few passes (model/fused.py) against its definition in float64, forward and backward."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn.functional import layer_norm, rms_norm
from torch.utils.checkpoint import checkpoint

from model.attention import Attention
from model.block import Block
from model.bridge import Bridge, BridgeConfig
from model.fused import RMSNorm, add_gated, modulate, turn_formula, turn_pairs
from model.rope import Rotary
from train.parallel.memory import LiveMemory
from train.plan.kernels import OpCounter

EPS = 1e-6


def draw(*shape, dtype=torch.float64, seed=0, learned=True):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_(learned)


def tables(positions=5, pairs=4, dtype=torch.float32):
    angles = draw(positions, pairs, seed=9, learned=False)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x, cos, sin, interleaved):
    """Each head times the matrix of its rotation, in float64."""
    turned, width = 2 * cos.shape[1], x.shape[-1]
    matrices = torch.eye(width, dtype=torch.float64).repeat(x.shape[1], 1, 1)  # [L, D, D]
    for j in range(turned // 2):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + turned // 2)
        matrices[:, a, a] = matrices[:, b, b] = cos[:, j].double()
        matrices[:, b, a], matrices[:, a, b] = sin[:, j].double(), -sin[:, j].double()
    return torch.einsum("lij,blhj->blhi", matrices, x.double())


def normed(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS) ** -0.5 * weight


def modulated(x, shift, scale):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift


def gated(x, gate, y):
    return x + gate * y


def norm(x, weight):
    module = RMSNorm(x.shape[-1], eps=EPS)
    return torch.func.functional_call(module, {"weight": weight}, x)


def turn(form):
    """(ours, as it was before, definition) of one form: (interleaved, pairs that turn of the 4 that there are)."""
    interleaved, pairs = form
    cos, sin = tables(pairs=pairs)
    return (
        lambda x: turn_pairs(x, cos, sin, interleaved),
        lambda x: turn_formula(x, cos, sin, interleaved),
        lambda x: rotated(x, cos, sin, interleaved),
    )


# name: (ours, operators as they were before, definition, shapes). Rows near zero show eps.
CASES = {
    f"turn, {'adjacent' if form[0] else 'halves'}{'' if form[1] == 4 else ', partly'}": (*turn(form), [(2, 5, 3, 8)])
    for form in ((True, 4), (False, 4), (True, 3), (False, 3))
} | {
    "RMSNorm": (norm, lambda x, w: rms_norm(x, (x.shape[-1],), w, EPS), normed, [(2, 5, 16), (16,)]),
    "gate": (add_gated, gated, gated, [(2, 5, 16), (2, 1, 16), (2, 5, 16)]),
    "gate, one number a clip": (add_gated, gated, gated, [(2, 5, 16), (2, 1, 1), (2, 5, 16)]),
} | {
    f"modulation, {name}": (
        lambda x, shift, scale: modulate(x, shift, scale, EPS, x.dtype),
        lambda x, shift, scale: layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift,
        modulated,
        [(clips, 5, 16), (clips, steps, 16), (clips, steps, 16)],
    )
    for name, clips, steps in (("one clip", 1, 1), ("two clips", 2, 1), ("by step", 1, 5))
}  # fmt: skip


def given(name, dtype=torch.float64):
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(CASES[name][3])]
    with torch.no_grad():
        inputs[0][:, 1] *= 1e-3  # of the size of eps
    return [x.detach().to(dtype).requires_grad_() for x in inputs]


def both(function, inputs):
    """What it gives, and the gradients of a product with fixed numbers."""
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, draw(*out.shape, seed=7, learned=False).to(out.dtype))


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_definition(name):
    ours, before, definition, _ = CASES[name]
    found, old, expected = (both(function, given(name)) for function in (ours, before, definition))
    for a, b, c in zip(found, old, expected, strict=True):
        assert a.dtype == torch.float64 and a.shape == c.shape
        scale = c.abs().max()
        assert (a - c).abs().max() <= 1e-14 * scale
        assert (a - b).abs().max() <= 1e-14 * scale
    assert gradcheck(ours, given(name))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("turn")])
def test_a_turn_is_what_it_was(name):
    ours, before, _, _ = CASES[name]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for a, b in zip(both(ours, given(name, dtype)), both(before, given(name, dtype)), strict=True):
            assert a.dtype == dtype
            if dtype == torch.bfloat16:  # rounded once from float32, whose last bit may turn it over
                assert (a != b).double().mean() < 0.01
            else:
                assert (a - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_turn_takes_any_strides(interleaved):
    """Of heads before positions, of a part of a wider tensor that begins at an odd place, of a sum's gradient."""
    cos, sin = tables()
    wide = draw(2, 5, 3, 19, learned=False)
    for x in (draw(2, 3, 5, 8, learned=False).transpose(1, 2), wide[..., 1:9], wide[..., ::2][..., :8]):
        for dtype in (torch.float64, torch.bfloat16):
            found = turn_pairs(x.to(dtype), cos, sin, interleaved)
            expected = turn_formula(x.to(dtype), cos, sin, interleaved)
            assert found.is_contiguous() and (found - expected).abs().max() <= torch.finfo(dtype).eps * 4
    x = draw(2, 5, 3, 8)
    turn_pairs(x, cos, sin, interleaved).sum().backward()
    ones = torch.ones(2, 5, 3, 8)
    torch.testing.assert_close(x.grad, rotated(ones, cos, -sin, interleaved), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_loses_no_more_than_before(name):
    ours, before, definition, shapes = CASES[name]
    shapes = [tuple(64 if n == 16 else 37 if n == 5 and not name.startswith("turn") else n for n in s) for s in shapes]
    inputs = [draw(*shape, dtype=torch.bfloat16, seed=i).detach() for i, shape in enumerate(shapes)]
    if name == "RMSNorm":
        inputs[1] = inputs[1] + 1
    results = {}
    for key, function in (("ours", ours), ("before", before), ("exact", definition)):
        dtype = torch.float64 if key == "exact" else torch.bfloat16
        results[key] = both(function, [x.to(dtype).requires_grad_() for x in inputs])
    for ours_, before_, exact in zip(*results.values(), strict=True):
        assert ours_.dtype == torch.bfloat16
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (ours_, before_)]
        assert errors[0] <= 1.02 * errors[1] + 1e-12 and errors[0] < 1e-2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_without_values_shapes_and_dtypes_are_the_same(name, kind):
    ours, _, _, shapes = CASES[name]
    expected = both(ours, given(name, torch.bfloat16))
    if kind == "meta" and name.startswith("turn"):
        cos, sin = (table.to("meta") for table in tables(pairs=3 if name.endswith("partly") else 4))
        inputs = [torch.empty(*shapes[0], dtype=torch.bfloat16, device="meta", requires_grad=True)]
        out = turn_pairs(inputs[0], cos, sin, "adjacent" in name)
        found = out, *torch.autograd.grad(out.sum(), inputs)
    elif kind == "meta":
        inputs = [torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
        module = RMSNorm(16, eps=EPS, device="meta", dtype=torch.bfloat16)
        out = module(inputs[0]) if name == "RMSNorm" else ours(*inputs)
        found = out, *torch.autograd.grad(out.sum(), [inputs[0], module.weight] if name == "RMSNorm" else inputs)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
            out = ours(*inputs)
            found = out, *torch.autograd.grad(out.sum(), inputs)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def block_inputs(clips=1):
    torch.manual_seed(0)
    block = Block(32, 4, 48, EPS).double()
    torch.nn.init.normal_(block.modulation)
    for part in (block.self_attn, block.cross_attn):
        torch.nn.init.uniform_(part.norm_q.weight)
    time = draw(clips, 6, 32, seed=3)
    return block, [draw(clips, 5, 32), draw(clips, 3, 32, seed=2), time, Rotary(*tables(), interleaved=True)]


def run_block(block, inputs, how=lambda forward, *inputs: forward(*inputs)):
    block.zero_grad()
    out = how(block, *inputs)
    learned = [*inputs[:3], *block.parameters()]
    return out, *torch.autograd.grad(out.square().sum(), learned)


@pytest.mark.parametrize("clips", [1, 2])
def test_a_block_compiled_whole_or_checkpointed_gives_the_same(clips):
    block, inputs = block_inputs(clips)
    expected = run_block(block, inputs)
    again = run_block(block, inputs, lambda f, *given: checkpoint(f, *given, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = run_block(block, inputs, lambda _, *given: compiled(*given))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def kept(function, inputs):
    """Bytes that a forward leaves for backward, its result not counted."""
    with LiveMemory() as memory:
        out = function(*inputs)
        return memory.live - out.untyped_storage().nbytes()


def test_nothing_between_is_kept_for_backward():
    numbers = 2 * 5 * 16 * 4
    for name, bytes_kept in {
        "turn, adjacent": 0, "turn, halves": 0, "RMSNorm": 2 * 5 * 4, "gate": 0, "modulation, one clip": 2 * 5 * 4 + 64,
        "modulation, two clips": 2 * (2 * 5 * 4 + 64),
    }.items():  # fmt: skip
        inputs = given(name, torch.float32)
        assert kept(CASES[name][0], inputs) <= bytes_kept < numbers, name
    for name in ("RMSNorm", "modulation, two clips"):  # what torch composes
        assert kept(CASES[name][1], given(name, torch.float32)) >= numbers


def moved(function, inputs):
    """Bytes read and written in forward and backward, in tensors of the size of the first input."""
    gradient = torch.ones_like(function(*inputs))
    with OpCounter() as counter:
        torch.autograd.grad(function(*inputs), inputs, gradient)
    total = sum(op.bytes * times for op, times in counter.ops.items())
    return total / (inputs[0].numel() * inputs[0].element_size())


# Forward and backward together, in tensors: one pass reads one and writes one. Ours, and before.
MOVED = {
    "turn, adjacent": (5.2, 19.6), "turn, halves": (10.9, 19.6), "RMSNorm": (17.5, 30), "gate": (9.1, 11),
    "gate, one number a clip": (9.1, 11), "modulation, one clip": (5.2, 16), "modulation, two clips": (16.2, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_how_much_memory_is_read_and_written(name):
    ours, before, _, shapes = CASES[name]
    sizes = {16: 48} if not name.startswith("turn") else {2: 1, 3: 6}  # six heads share a table's row
    sizes[5] = 5 if name.startswith("turn") else 200
    inputs = [draw(*(sizes.get(n, n) for n in shape), dtype=torch.float32) for shape in shapes]
    assert moved(ours, inputs) <= MOVED[name][0] and moved(before, inputs) >= MOVED[name][1]


def test_the_bridge_adds_its_factors_product():
    torch.manual_seed(0)
    bridge = Bridge(BridgeConfig(head_dim=8, trainable_condition_scale=True), 32, 16, 1).double()
    with torch.no_grad():
        bridge.condition_scale.fill_(0.3)
    video, audio = draw(2, 6, 32), draw(2, 4, 16, seed=1)
    scale = torch.tensor([0.5, 0.0], dtype=torch.float64)
    plain = bridge.audio_to_video_conditioners["0"](video, audio, None, None, 2)
    out, sound = bridge(0, video, audio, None, None, 2, scale)
    torch.testing.assert_close(out, video + 0.3 * scale.view(-1, 1, 1) * plain, rtol=1e-14, atol=1e-14)
    assert torch.equal(out[1], video[1]) and torch.equal(sound[1], audio[1])
    (gradient,) = torch.autograd.grad(out.sum(), bridge.condition_scale)
    torch.testing.assert_close(gradient, (scale.view(-1, 1, 1) * plain).sum()[None])


def test_names_of_weights_are_as_before():
    assert {"norm_q.weight", "norm_k.weight"} <= Attention(32, 4, EPS).state_dict().keys()
