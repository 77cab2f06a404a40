"""Options of the FSDP2 engine that must change no bit, and the comparison of replicas."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from core.errors import RunError
from tests.distributed import run_cases
from tests.train import cases
from train.engine.engine import Engine, build_engine
from train.engine.optim import local
from train.faults.replica_check import bit_hash, compare_replicas, outvoted
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights
from train.step import forward_backward


def engine_of(**parallel) -> tuple[Engine, Layout]:
    settings = ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    engine = build_engine(cases.tiny_config(), settings, cases.OPTIM, layout, seed=0)
    fill_weights(engine.model, cases.busy_value)
    return engine, layout


def steps(engine: Engine, layout: Layout, which: range) -> None:
    """Training steps of both experts in turn, each of two micro-batches."""
    for step in which:
        mine = cases.my_micro_batches(cases.global_batch(step, torch.float32), layout, 1)
        expert = ("high", "low")[step % 2]
        forward_backward(engine.model, mine, cases.OBJECTIVE, expert, layout, engine.backward)
        engine.step(1.0, expert)


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    return cases.full(engine.tensors())


def host_state() -> dict:
    """Moments on the host: the bits of moments on the device, also after a restore."""
    plain, layout = engine_of()
    steps(plain, layout, range(3))
    hosted, _ = engine_of(optimizer_state="host")
    steps(hosted, layout, range(3))
    expected, found = tensors(plain), tensors(hosted)
    fresh, _ = engine_of(optimizer_state="host")
    saved = hosted.tensors()

    def read(places: dict[str, torch.Tensor]) -> None:
        assert places.keys() == saved.keys()
        for key, place in places.items():
            local(place).copy_(local(saved[key]))

    fresh.restore(hosted.update_counts(), read)
    steps(fresh, layout, range(3, 5))
    steps(plain, layout, range(3, 5))
    later, expected_later = tensors(fresh), tensors(plain)
    return {
        "same": expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected),
        "after_load": all(torch.equal(expected_later[k], later[k]) for k in expected_later),
        "moments": sum(key.endswith("exp_avg") for key in found),
        "whole": all(
            torch.equal(value.full_tensor(), expected_later[key])
            for key, value in plain.tensors().items()
            if isinstance(value, DTensor)
        ),
    }


def accumulation() -> dict:
    """Summed in shards or whole: the same gradient."""
    results = []
    for accumulate in ("sharded", "unsharded"):
        engine, layout = engine_of(accumulate=accumulate, dp_replicate=2, compute_dtype="float64")
        mine = cases.my_micro_batches(cases.global_batch(0, torch.float64), layout, 1)
        forward_backward(engine.model, mine * 2, cases.OBJECTIVE, "high", layout, engine.backward)
        results.append(cases.full({n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}))
    return {"worst": cases.worst(*results), "count": len(results[0])}


def flipped_bit(replicate: int) -> list[str]:
    """What is said when one bit of one rank's moments is flipped; equal replicas say nothing."""
    engine, layout = engine_of(dp_replicate=replicate)
    steps(engine, layout, range(2))
    compare_replicas(engine, layout, 2)
    if torch.distributed.get_rank() == 3:
        moment = local(engine.tensors()["optim.audio_dit.head.head.weight.exp_avg"])
        moment.view(torch.int32).view(-1)[5] ^= 1
    try:
        compare_replicas(engine, layout, 3)
    except RunError as error:
        return [str(error), str(error.retry)]
    return []


@pytest.fixture(scope="module")
def ranks():
    return run_cases(
        4,
        {
            "host": (host_state, ()),
            "accumulation": (accumulation, ()),
            "of four": (flipped_bit, (4,)),
            "of two": (flipped_bit, (2,)),
        },
    )


def test_optimizer_state_on_the_host_changes_no_bit(ranks):
    for result in ranks["host"]:
        assert result["same"] and result["after_load"] and result["moments"] > 50
        assert result["whole"]  # what the tests put together is what torch does


def test_gradients_of_micro_batches_sum_to_the_same_in_shards_and_whole(ranks):
    for result in ranks["accumulation"]:
        assert result["worst"][0] < 1e-12 and result["count"] > 50


def test_a_flipped_bit_is_found_on_every_rank_and_its_node_named(ranks):
    for said, retry in ranks["of four"]:
        assert said.count("rank ") == 1 and "rank 3 on " in said and "audio_dit.head.head.weight.exp_avg" in said
        assert "step 3" in said and retry == "True"
    for said, _ in ranks["of two"]:  # nobody can tell which of two is right
        assert "rank 1 on " in said and "rank 3 on " in said and said.count("rank ") == 2


def test_a_majority_outvotes_and_a_tie_names_both():
    hashes = torch.tensor([[1, 5, 9], [1, 5, 8], [1, 4, 9], [1, 4, 9]])
    assert [outvoted(hashes, place) for place in range(4)] == [[1], [1, 2], [1], [1]]


def test_the_hash_sees_bits_and_places():
    a = torch.tensor([1.0, 2.0, -0.0])
    assert bit_hash(a) == bit_hash(a.clone())
    assert bit_hash(a) != bit_hash(torch.tensor([2.0, 1.0, -0.0]))
    assert bit_hash(a) != bit_hash(torch.tensor([1.0, 2.0, 0.0]))
