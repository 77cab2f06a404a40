"""Invariant 17: every attention of a run goes through the one backend that was chosen, and that one computes right."""

from types import SimpleNamespace

import pytest
import torch

from core.errors import RunError
from model.backends.choice import Choice
from model.backends.sdpa import Sdpa
from tests.distributed import run_cases
from tests.train import cases
from tests.train.parallel import parity, spies
from train.parallel import attention, mesh
from train.parallel.attention import attention_shapes, check_attention, differences
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.workload import Workload

LAYOUTS = {"fsdp": {}, "ulysses": {"ulysses": 2}, "ring": {"ring": 2}}
PACKAGES = {
    "flash2, fsdp": ("flash2", {}),
    "flash2, ulysses": ("flash2", {"ulysses": 2}),
    "flash2, ring": ("flash2", {"ring": 2}),
    "old flash3, ring": ("old flash3", {"ring": 2}),
    "flash4, ring": ("flash4", {"ring": 2}),
    "flash4, fsdp": ("flash4", {}),
    "flash4, recomputed": ("flash4", {"recompute": "full"}),
    "flash4, recomputed but attention": ("flash4", {"recompute": "selective"}),
}


def chosen(rank_one: str) -> str:
    """What make_layout says on two ranks, where rank 1 would take another backend, or none."""

    def choose(asked, needs):
        if torch.distributed.get_rank() == 0:
            return Choice(Sdpa())
        if rank_one == "none":
            raise RuntimeError("attention backend 'flash2' cannot run here: no library")
        return Choice(Sdpa(rank_one))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mesh, "choose", choose)
        try:
            return make_layout(ParallelConfig(), torch.device("cpu")).attention.describe()
        except RunError as error:
            return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    parity.expected(folder, 5, "all")
    return run_cases(
        2,
        {
            **{name: (spies.watched, (parallel,)) for name, parallel in LAYOUTS.items()},
            **{
                name: (spies.with_package, (folder, package, parity.Case(5, 4, parallel, steps=1)))
                for name, (package, parallel) in PACKAGES.items()
            },
            **{f"rank 1: {other}": (chosen, (other,)) for other in ("sdpa", "cudnn", "none")},
        },
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_attention_goes_through_the_chosen_backend(found, name):
    """At least those of the audio tower, the text and what video asks of sound; in parts where tokens are shared."""
    for rank in found[name]:
        assert rank.keys() == {"training", "validation", "sampler"}
        for work, calls in rank.items():
            assert calls["forwards"] == 0 and calls["whole"] >= 5, work
            assert (calls["part"] > 0) == (name != "fsdp"), work
        training = rank["training"]
        assert training["backwards"] == training["whole"]  # by autograd, of what the spy did
        assert (training["backward of a part"] > 0) == (name != "fsdp")
        assert training["backward of a part"] == training["part"]


@pytest.mark.parametrize("name", PACKAGES)
def test_flash_packages_carry_layouts_ring_and_merges(found, name):
    for result in found[name]:
        assert result["loss"] < 1e-10 and result["gradient"][0] < 1e-10
        assert result["calls"] == {"forward", "backward"}
        assert result["deterministic"] == {True}


def test_selective_keeps_attention_that_shows_torch_nothing_of_its_kernel(found):
    """flash4 is a plain autograd function."""
    names = ("flash4, fsdp", "flash4, recomputed but attention", "flash4, recomputed")
    none, selective, full = (found[name][0]["forwards"] for name in names)
    assert none == selective > 0 and full == 2 * none


def test_ranks_that_would_compute_differently_do_not_start(found):
    assert found["rank 1: sdpa"] == ["sdpa", "sdpa"]
    for said in found["rank 1: cudnn"]:
        assert said.startswith("RankError: parallel.attention=auto would be ") and "install the same packages" in said
    first, second = found["rank 1: none"]
    assert first == "RunError: parallel.attention=auto cannot run on every rank"
    assert second == "RankError: parallel.attention=auto: attention backend 'flash2' cannot run here: no library"


# --- the comparison at the start -------------------------------------------------------------------------------------


class Wrong(Sdpa):
    """torch's kernel with one of its results changed by `change`."""

    def __init__(self, what, change):
        super().__init__()
        self.what, self.change = what, change

    def __call__(self, q, k, v):
        out = super().__call__(q, k, v)
        if self.what == "output":
            return self.change(out)
        if out.requires_grad and self.what in ("dq", "dk", "dv"):
            {"dq": q, "dk": k, "dv": v}[self.what].register_hook(self.change)
        return out

    def with_lse(self, q, k, v):
        out, lse = super().with_lse(q, k, v)
        return (
            (self.change(out), lse) if self.what == "part" else (out, self.change(lse) if self.what == "lse" else lse)
        )

    def backward(self, *given):
        names = ("dq of a part", "dk of a part", "dv of a part")
        parts = zip(names, super().backward(*given), strict=True)
        return tuple(self.change(x) if name == self.what else x for name, x in parts)


CHANGES = {
    "a scale": lambda x: x * 1.05,
    "a nan": lambda x: x.flatten().index_fill(0, torch.tensor(0), torch.nan).view_as(x),
    "the last token": lambda x: torch.cat((x[:, :-1], 0 * x[:, -1:]), 1),
}
RESULTS = ("output", "dq", "dk", "dv", "part", "lse", "dq of a part", "dk of a part", "dv of a part")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass_the_comparison(dtype):
    for shape in ((300, 300, 64), (65, 300, 16), (1, 77, 32), (300, 5, 16)):
        errors = differences(Sdpa(), shape, dtype, torch.device("cpu"), blocks=True)
        assert set(errors) == set(RESULTS)
        assert max(errors.values()) < attention.BOUNDS[dtype] / 2, (shape, errors)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", RESULTS)
def test_a_wrong_kernel_is_refused_with_its_shape(what, change, monkeypatch):
    monkeypatch.setattr(attention, "gather", list)
    change = CHANGES[change]
    config = cases.tiny_config(2, pooled_adaln=True)
    layout = SimpleNamespace(
        attention=Choice(Wrong(what, change)), device=torch.device("cpu"), compute=torch.bfloat16,
        sequence=SimpleNamespace(size=2, ulysses=1, position=0),
    )  # fmt: skip
    workload = Workload(1, (3, 4, 6), 7)
    shapes = attention_shapes(config, layout, workload)
    assert (9, 9, 48) in shapes and (9, 5, 48) in shapes and (7, 9, 48) in shapes and (1, 6, 96) in shapes
    with pytest.raises(RunError, match=rf"sdpa gives wrong results here: .* = \(\d+, \d+, \d+\): .*{what}"):
        check_attention(config, layout, workload)
    layout.attention = Choice(Sdpa())
    check_attention(config, layout, workload)


def test_a_kernel_that_raises_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "gather", list)

    def fail(x):
        raise RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    layout = SimpleNamespace(
        attention=Choice(Wrong("output", fail)), device=torch.device("cpu"), compute=torch.float32,
        sequence=SimpleNamespace(size=1, ulysses=1, position=0),
    )  # fmt: skip
    with pytest.raises(RunError, match=r"\(18, 18, 48\): no kernel image is available \("):
        check_attention(cases.tiny_config(), layout, Workload(1, (3, 4, 6), 7))
