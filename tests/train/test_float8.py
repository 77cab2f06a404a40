"""Products in float8: what its grid and scales do, by first principles and against torchao's own emulation; which
linears have them; what is refused; and the conversion, on a device that is only said to be there."""

import dataclasses
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import RunError
from model.joint import JointTransformer
from tests.model.test_residual import ask, deep_config, filled
from train.config import compose_train
from train.parallel import float8
from train.parallel.float8 import EmulatedLinear, convert_linears, large_linears, obstacle, rounded
from train.parallel.mesh import ParallelConfig, check_linear

# All values of e4m3 by its definition: exponent bias 7, 3 bits of mantissa, subnormals from 2^-9, no infinity, and the
# largest code is no number.
GRID = np.array(
    sorted({2.0**-6 * m / 8 for m in range(8)} | {2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)})
)[:-1]
# A value m·2^e with m in [1, 2) is off by up to 2^e/16, evenly spread: 1/sqrt(768) of 2^e. Mantissas of random numbers
# are spread as 1/m, so that the mean of m² is 3 / (2 ln 2).
ONE = math.sqrt(1 / 768 / (3 / (2 * math.log(2))))  # relative error of one operand, 2.45 %


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(x, dim):
    """float8 by its definition, in float64: the nearest value of the grid, the even one of two."""
    x = x.double().numpy()
    largest = np.abs(x).max(axis=dim, keepdims=True)
    scale = 2.0 ** np.floor(np.log2(448 / np.maximum(largest, 1e-12)))
    scaled = np.abs(x * scale)
    above = np.clip(np.searchsorted(GRID, scaled), 1, len(GRID) - 1)
    low, high = GRID[above - 1], GRID[above]
    nearer = np.where(scaled - low < high - scaled, above - 1, above)
    nearer = np.where(scaled - low == high - scaled, above - (above % 2), nearer)
    return torch.from_numpy(np.sign(x) * GRID[nearer] / scale)


@pytest.mark.parametrize("dim", [0, 1])
def test_values_are_the_nearest_of_the_grid(dim):
    assert len(GRID) == 127 and GRID[-1] == 448 and GRID[1] == 2.0**-9
    x = normal(40, 48) * torch.logspace(-8, 6, 48) * torch.logspace(0, 3, 40)[:, None]
    x[3], x[:, 5], x[7, 7] = 0.0, 0.0, 448.0
    x[8, :16] = torch.tensor([17 / 16, 19 / 16, 9 / 8, 1.0] * 4)  # halfway between two values
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = x.to(dtype)
        assert torch.equal(rounded(given, dim).double(), on_grid(given.float(), dim))


def products(kind, x, weight, push):
    """(output, gradients of input and weight) of a linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone())
    linear.__class__ = kind
    x = x.clone().requires_grad_()
    out = linear(x)
    out.backward(push)
    return out.detach().double(), x.grad.double(), linear.weight.grad.double()


def test_all_three_products_are_those_of_rounded_operands():
    """Each along its own sum, and as far off as two operands with errors of 2.45 % make them."""
    x, weight, push = normal(2, 96, 256), normal(80, 256, seed=1), normal(2, 96, 80, seed=2)
    rows, pushed = x.flatten(0, 1), push.flatten(0, 1)
    found = products(EmulatedLinear, x, weight, push)
    expected = (
        on_grid(rows, 1) @ on_grid(weight.t(), 0),
        on_grid(pushed, 1) @ on_grid(weight, 0),
        on_grid(pushed.t(), 1) @ on_grid(rows, 0),
    )
    exact = products(nn.Linear, x.double(), weight.double(), push.double())
    for mine, defined, true in zip(found, expected, exact, strict=True):
        assert (mine - defined.view(mine.shape)).norm() <= 1e-6 * defined.norm()
        error = ((mine - true).norm() / true.norm()).item()
        assert error == pytest.approx(math.sqrt(2) * ONE, rel=0.1), error


def test_one_large_value_spoils_its_own_row_alone():
    x, weight = normal(64, 256), normal(48, 256, seed=1)
    x[5, 9] = 1e6
    out, _, _ = products(EmulatedLinear, x, weight, torch.ones(64, 48))
    errors = (out - x.double() @ weight.double().t()).norm(dim=1) / (x.double() @ weight.double().t()).norm(dim=1)
    others = torch.arange(64) != 5
    assert errors[others].max() < 2 * math.sqrt(2) * ONE
    # One scale for all rows, of 2^-12, would take all below 4 to 0: half of the least value is 2^-10.
    assert (on_grid(x.flatten()[None], 1).view(64, 256)[others] == 0).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchaos_own_emulation_bit_for_bit(dtype):
    pytest.importorskip("torchao", reason="pip install torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True, pad_inner_dim=True)
    x = (normal(2, 37, 64) * torch.logspace(-6, 3, 37)[:, None]).to(dtype)
    x[0, 3] = 0
    found = []
    for convert in (lambda m: convert_to_float8_training(m, config=recipe), _emulated):
        linear = nn.Linear(64, 48)
        linear.weight, linear.bias = nn.Parameter(normal(48, 64, seed=1)), nn.Parameter(normal(48, seed=2))
        model = convert(nn.Sequential(linear).to(dtype))
        given = x.clone().requires_grad_()
        model(given).backward(normal(2, 37, 48, seed=3).to(dtype))
        found.append((model(x).detach(), given.grad, *(p.grad for p in model.parameters())))
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


def _emulated(model):
    model[0].__class__ = EmulatedLinear
    return model


def test_the_linears_are_those_that_see_video_tokens():
    """By what each is given: rows as many as the picture has tokens."""
    model = filled(deep_config(2)).float()
    tokens, given = 2 * 2 * 3, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, x, name=name: given.__setitem__(name, x[0].shape[-2]))
    ask(model, torch.float32)
    of_video = {name for name, rows in given.items() if rows == tokens}
    assert (
        of_video - {"video_dit.head.head"} == {name for name, _ in large_linears(model)} and len(of_video) == 2 * 12 + 1
    )


@pytest.mark.slow
def test_they_are_most_of_what_a_step_of_mova_multiplies():
    model = compose_train(["model=mova_360p", "run.id=x", "data.path=none"])[0].model
    with torch.device("meta"):
        names = [name for name, _ in large_linears(JointTransformer(model))]
    assert len(names) == 2 * 40 * 8 + 30 * 4  # both experts, and both directions of 30 Bridge layers


def test_a_network_learns_the_same_with_it_and_keeps_its_names():
    plain = filled(deep_config(2)).float()
    emulated = filled(deep_config(2)).float()
    convert_linears(emulated, "float8_emulated")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in emulated.named_parameters()]
    true, found = ask(plain, torch.float32), ask(emulated, torch.float32)
    for x, y in zip(found, true, strict=True):
        assert 1e-3 < (x - y).norm() / y.norm() < 0.12


def test_what_cannot_be_done_is_refused_in_one_line(monkeypatch):
    cuda = torch.device("cuda")
    assert obstacle(torch.device("cpu"), torch.bfloat16) == "needs a CUDA device, not cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert obstacle(cuda, torch.bfloat16) == "needs compute capability 8.9 or more, this device has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert obstacle(cuda, torch.float32) == "needs parallel.compute_dtype=bfloat16, not float32"
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    assert "needs torchao" in obstacle(cuda, torch.bfloat16) and "pip install torchao" in obstacle(cuda, torch.bfloat16)
    with pytest.raises(RunError, match="parallel.linear=float8 needs torchao"):
        convert_linears(filled(deep_config(1)), "float8")
    with pytest.raises(ValueError, match="parallel.linear=float8 needs parallel.compile=inductor"):
        ParallelConfig(linear="float8")
    with pytest.raises(ValueError, match="parallel.linear=float8 needs parallel.compute_dtype=bfloat16, not float32"):
        ParallelConfig(linear="float8", compile="inductor", compute_dtype="float32")
    with pytest.raises(ValueError, match="parallel.linear=float8_emulated needs fsdp2, not zero2"):
        ParallelConfig(linear="float8_emulated", engine="zero2")
    with pytest.raises(ValueError, match="parallel.linear 'fp8' is not one of compute, float8, float8_emulated"):
        ParallelConfig(linear="fp8")
    with pytest.raises(RunError, match="float8 needs GPUs of compute capability 8.9 or more"):
        check_linear(ParallelConfig(linear="float8", compile="inductor"), on_gpus=False)
    odd = deep_config(1)
    odd.video.ffn_dim = 50
    with pytest.raises(RunError, match="video_dit.blocks.0.ffn.0 is 50 x 64, and float8 units need multiples of 16"):
        convert_linears(JointTransformer(odd), "float8_emulated")


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """The interface of torchao's that is used here."""

    recipe: str
    pad_inner_dim: bool = False

    @staticmethod
    def from_recipe_name(name):
        return FakeConfig(name)


def test_on_a_device_that_has_it_torchao_converts_those_linears(monkeypatch):
    asked = {}

    def convert(model, *, module_filter_fn, config):
        asked["names"] = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module_filter_fn(module, name)
        }
        asked["config"] = config

    module = types.ModuleType("torchao.float8")
    module.Float8LinearConfig, module.convert_to_float8_training = FakeConfig, convert
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert obstacle(torch.device("cuda"), torch.bfloat16) == ""
    model = filled(deep_config(2))
    convert_linears(model, "float8")
    assert asked["names"] == {name for name, _ in large_linears(model)}
    assert asked["config"] == FakeConfig("rowwise", pad_inner_dim=True)


def test_torchaos_own_conversion_keeps_names_and_weights():
    pytest.importorskip("torchao", reason="pip install torchao")
    from torchao.float8.float8_linear import Float8Linear

    with torch.device("meta"):
        model = JointTransformer(deep_config(2))
        before = {name: parameter for name, parameter in model.named_parameters()}
        convert_linears(model, "float8")
    assert {name: parameter for name, parameter in model.named_parameters()} == before
    converted = {name for name, one in model.named_modules() if isinstance(one, Float8Linear)}
    assert converted == {name for name, _ in large_linears(model)}
    config = model.video_dit.blocks[0].ffn[0].config
    assert config.pad_inner_dim and config.round_scales_to_power_of_2
    assert config.cast_config_grad_output.target_dtype == float8.E4M3 and not config.enable_fsdp_float8_all_gather
