"""Starting weights: each rank makes its own rows, the same numbers at every layout; nothing is drawn that is read."""

import hashlib
import math

import numpy as np
import pytest
import torch

from data.clip import Bucket
from model.init import BLOCK, STD, initial_part, initial_value
from model.joint import JointTransformer
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.cases import tiny_config
from tests.train.engine import start_cases as cases

LAYOUTS = {
    "shards": {}, "replicas": {"dp_replicate": 2}, "copies": {"dp_replicate": 4}, "ulysses": {"ulysses": 2},
    "zero1": {"engine": "zero1"}, "zero2": {"engine": "zero2"}, "zero3": {"engine": "zero3"},
}  # fmt: skip


def launch(name):
    return cases.weights(**LAYOUTS[name])


@pytest.fixture(scope="module")
def four():
    return run_cases(4, {name: (launch, (name,)) for name in LAYOUTS})


def normals(name: str, shape: tuple[int, ...], seed: int, block: int) -> torch.Tensor:
    """From first principles: every block of rows has a Philox stream of its own."""
    rows = max(1, block // math.prod(shape[1:]))
    parts = []
    for number, first in enumerate(range(0, shape[0], rows)):
        key = hashlib.sha256(f"init/{seed}/{name}/{number}".encode()).digest()[:16]
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        count = min(rows, shape[0] - first)
        parts.append(generator.standard_normal((count, *shape[1:]), dtype=np.float32))
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_the_same_numbers_at_every_layout(four, name):
    """Bit for bit, where shards and partitions end within blocks: 48 columns, blocks of 2 rows, 50 rows on 4 ranks."""
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in JointTransformer(tiny_config()).named_parameters()}
    for result in four[name]:
        assert result.keys() == shapes.keys()
        drawn = 0
        for key, value in result.items():
            if key.endswith(("self_attn.q.weight", "ffn.0.weight")):
                expected = normals(key, shapes[key], cases.SEED, cases.SMALL_BLOCK).mul_(STD)
                assert torch.equal(value, expected), key
                drawn += 1
        assert drawn == 10
        assert all(torch.equal(value, four["shards"][0][key]) for key, value in result.items())


@pytest.mark.parametrize("shape", [(100, 1000), (3, BLOCK + 7), (70_000,), (1, 6, 48)])
def test_any_cut_of_a_parameter_gives_the_numbers_of_the_whole(shape):
    whole = initial_value("w.weight", shape, 3, 2)
    assert torch.equal(whole, normals("w.weight", shape, 3, BLOCK).mul_(STD))
    size = math.prod(shape)
    for pieces in (2, 3, 7, 64):
        ends = [size * piece // pieces for piece in range(pieces + 1)]
        parts = [initial_part("w.weight", shape, a, b, 3, 2) for a, b in zip(ends, ends[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole.flatten()), pieces


def test_blocks_differ():
    value = initial_value("w.weight", (8, BLOCK), 3, 2)
    assert len({row.sum().item() for row in value}) == 8


def test_what_is_read_is_not_drawn(tmp_path):
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(tmp_path / "data", [(bucket, 8)], dim=6)
    (found,) = run_cases(1, {"drawn": (cases.drawn_by_runs, (tmp_path, tmp_path / "data"))})["drawn"]
    assert [outcome.get("ending") for _, outcome in found.values()] == ["finished"] * 4, found
    counts = {name: count for name, (count, _) in found.items()}
    assert counts["fresh"] > 100_000
    assert counts == {"fresh": counts["fresh"], "resumed": 0, "from weights": 0, "zero from weights": 0}
