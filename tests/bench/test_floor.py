"""bench/step/floor.py on a tiny model: which kernels it finds, and what it makes of their times."""

from collections import Counter

import pytest

from bench.step import floor
from data.clip import Bucket
from model.bridge import BridgeConfig
from model.joint import JointConfig
from model.tower import TowerConfig
from tests.distributed import run_cases
from train.parallel.workload import Workload

MODEL = JointConfig(
    TowerConfig(dim=64, num_heads=2, num_layers=2, ffn_dim=96, in_dim=36, out_dim=16, text_dim=24),
    TowerConfig(
        dim=32, num_heads=1, num_layers=1, ffn_dim=48, in_dim=128, out_dim=128, text_dim=24, patch_size=[1], rope="dac"
    ),
    BridgeConfig(head_dim=32),
    two_experts=False,
    text_length=7,
)
CLIP = Bucket(frames=2, height=4, width=6, audio_steps=11, fps=24.0, has_video=True, has_audio=True)
VIDEO, AUDIO, TEXT = 2 * 2 * 3, 11, 7  # tokens, rows


def measured() -> dict:
    floor.MODEL, floor.CLIP, floor.LEAST = MODEL, CLIP, 1e-4  # of a process of this test's own
    floor.WORKLOAD = Workload(1, (CLIP.frames, CLIP.height, CLIP.width), CLIP.audio_steps)
    return floor.measure(floor.FloorBench(rounds=1))  # all that the record has by default


@pytest.fixture(scope="module")
def found() -> dict:
    (one,) = run_cases(1, {"measured": (measured, ())})["measured"]
    return one


def test_the_kernels_are_those_counted_by_hand(found):
    calls = found["calls"]
    # A block has q, k, v, o twice and two of its feed-forward; a tower a stem, two of text, three of time, a head.
    linear = 2 * 10 + 7 + 10 + 7 + 2 * 4
    assert sum(times for call, times in calls.items() if call.name == "linear") == linear
    attention = Counter()
    for call, times in calls.items():
        if call.name == "attention":
            (_, heads, queries, _), (_, _, keys, _), _ = call.shapes
            attention[heads, queries, keys] += times
    assert attention == {
        (2, VIDEO, VIDEO): 2, (2, VIDEO, TEXT): 2, (1, AUDIO, AUDIO): 1, (1, AUDIO, TEXT): 1, (2, VIDEO, AUDIO): 1,
        (1, AUDIO, VIDEO): 1,
    }  # fmt: skip
    sizes = Counter(call.shapes[1] for call in calls.elements() if call.name == "linear")
    assert sizes[64, 64] == 2 * 8 + 2 + 2 + 1  # blocks; q and o of the Bridge; second ones of text and time; head


def test_a_model_takes_longer_than_its_kernels(found):
    seconds = found["seconds"]
    kernels = sum(one for (one,) in found["kernels"].values())
    assert set(seconds) == {"none", "full", "attention", "outputs", "selective", "half"} and kernels > 0
    assert all(len(rounds) == 1 for rounds in seconds.values())
    assert seconds["none"][0] / kernels > 1 and seconds["full"][0] / kernels > 1
    assert found["kept"]["full"] < found["kept"]["half"] <= 0.5 * found["kept"]["none"]
    rows = dict(floor.table(found, (1.0, 2.0)))
    assert rows["kernels of a step, distinct ones"] == f"{found['calls'].total()}, {len(found['calls'])}"
    assert rows["`none` over the floor"].startswith(f"{seconds['none'][0] / kernels:.3f} ")
    assert rows["`full` over `none`"].startswith(f"{seconds['full'][0] / seconds['none'][0]:.3f} ")
