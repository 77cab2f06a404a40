"""A rank alone that casts nothing trains plain parameters, without FSDP2's copies; its checkpoints fit any layout."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.distributed import run_cases
from tests.train import cases
from train.parallel.mesh import Layout, ParallelConfig
from train.parallel.parallelize import build_model


def kept_as(dtype: str) -> dict:
    """How a rank alone, or one of several, holds its parameters, and what a step makes of them."""
    model, layout = cases.sharded_model(cases.tiny_config(), ParallelConfig(compute_dtype=dtype))
    found = {
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "shards": {isinstance(parameter, DTensor) for parameter in model.parameters()},
        "dtypes": {parameter.dtype for parameter in model.parameters()},
        "alone": layout.alone,
    }
    built = build_model(cases.tiny_config(), ParallelConfig(compute_dtype=dtype), layout, seed=0)
    return found | {"built": {isinstance(parameter, DTensor) for parameter in built.parameters()}}


def as_sharded() -> float:
    """The largest difference between a step without FSDP2 and one with it, and that all weights moved alike."""
    states = []
    for alone in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not alone:
                patch.setattr(Layout, "alone", property(lambda layout: False))
            state, layout = cases.new_state(ParallelConfig(compute_dtype="float64"))
            assert isinstance(state.engine.model, FSDPModule) is not alone
            cases.train_steps(state.engine.model, state.engine.optimizer, layout, range(3))
            states.append(cases.whole_state(state))
    assert states[0].keys() == states[1].keys()
    return max((a - states[1][key]).abs().max().item() for key, a in states[0].items())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    dtypes = {dtype: (kept_as, (dtype,)) for dtype in ("float32", "float64", "bfloat16")}
    one = run_cases(1, dtypes | {"sharded": (as_sharded, ()), "saved": (cases.save_checkpoint, (folder, 1))})
    two = run_cases(2, {"float32": dtypes["float32"], "loaded": (cases.load_checkpoint, (folder, 1))})
    again = run_cases(1, {"loaded": (cases.load_checkpoint, (folder, 1))})
    return {name: result[0] for name, result in one.items()}, two, again["loaded"][0]


def test_only_a_rank_alone_that_casts_nothing_is_without_fsdp(found):
    one, two, _ = found
    for dtype in ("float32", "float64"):
        assert one[dtype]["alone"] and one[dtype]["units"] == 0
        assert one[dtype]["shards"] == one[dtype]["built"] == {False}
        assert one[dtype]["dtypes"] == {getattr(torch, dtype)}
    for other in (one["bfloat16"], *two["float32"]):
        assert not other["alone"] and other["units"] > 10 and other["shards"] == other["built"] == {True}
        assert other["dtypes"] == {torch.float32}


def test_three_steps_are_those_of_fsdp(found):
    assert found[0]["sharded"] < 1e-14


def test_a_checkpoint_of_one_rank_loads_bit_for_bit_on_two(found):
    one, two, again = found
    saved = one["saved"]
    for loaded in (*two["loaded"], again):
        assert loaded["tensors"].keys() == saved.keys() and loaded["step"] == 3
        assert all(torch.equal(loaded["tensors"][key], saved[key]) for key in saved)
    for key, value in again["after"].items():  # two more steps
        torch.testing.assert_close(two["loaded"][0]["after"][key], value, rtol=1e-4, atol=1e-6)
