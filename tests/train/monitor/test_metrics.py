"""The metrics of a step: against plain sums over a whole model, the same on one rank and on two, under both engines."""

import json
from collections import Counter

import pytest
import torch

from data.clip import Bucket, clip_seconds
from data.loader.state import Seen
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train import cases, runs
from tests.train.engine.zero_cases import STEADY, make_engine, whole
from train.monitor.log import MonitorConfig
from train.monitor.metrics import Metrics
from train.monitor.names import known_names
from train.monitor.throughput import peak_flops, peak_of
from train.objective.objective import Objective, loss_share
from train.parallel.flops import forward_flops
from train.parallel.step_sums import Flags, StepSignals
from train.step import forward_backward

pytestmark = pytest.mark.fast

LAYOUTS = {
    "fsdp2": {},
    "hsdp": {"dp_replicate": 2},
    "ulysses": {"ulysses": 2},
    "zero1": {"engine": "zero1"},
    "zero3": {"engine": "zero3"},
}
MEASURED = chosen(LAYOUTS, "fsdp2", "ulysses", "zero3")
TOWERS = {
    "video_high": "video_dit.",
    "video_low": "video_dit_2.",
    "audio": "audio_dit.",
    "bridge": "dual_tower_bridge.",
}
CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)


def norm(tensors: dict[str, torch.Tensor], start: str) -> float:
    parts = [value.double().square().sum() for name, value in tensors.items() if name.startswith(start)]
    return torch.stack(parts).sum().sqrt().item()


def measured(name: str) -> tuple[dict, dict]:
    """(metrics of the third step, what they must be)."""
    config = cases.tiny_config()
    engine, layout = make_engine(config, STEADY, **LAYOUTS[name])
    meter = Metrics(MonitorConfig(every=2, peak_tflops=0.5), config, engine, layout, Counter(), 100)
    objective, signals = Objective(cases.OBJECTIVE, config.experts), StepSignals()
    for step in range(3):
        before, expert = whole(engine), objective.expert(step)
        prepared = cases.global_batch(step, torch.float32)
        mine = cases.my_micro_batches(prepared, layout, 1)
        meter.begin(step)
        losses = forward_backward(engine.model, mine, cases.OBJECTIVE, expert, layout, engine.backward)
        total = engine.step(1.0, expert)
        signals.post(step, losses.share, losses.video, losses.audio, total, Flags(), meter.sums(step, losses))
        sums = signals.collect()
    assert sums is not None
    found = meter.read(sums, expert) | meter.host(2, mine, 2.0, Seen(8, 3600.0))
    return found, _expected(config, before, whole(engine), prepared, expert)


def _expected(config, before, after, prepared, expert) -> dict:
    """By plain arithmetic on a model in one piece, whose Bridge is asked for what it adds."""
    plain = cases.reference_model(config, torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(before[f"model.{name}"])
    sums = torch.zeros(4, dtype=torch.float64)

    def look(_, inputs, outputs) -> None:
        for i in range(2):
            sums[2 * i] += (outputs[i] - inputs[i + 1]).double().square().sum().item()
            sums[2 * i + 1] += inputs[i + 1].double().square().sum().item()

    plain.dual_tower_bridge.register_forward_hook(look)
    batch, draws = prepared.batch, prepared.draws
    parts = loss_share(plain, batch, draws, cases.OBJECTIVE, expert)
    parts.share.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    weights = {name: after[f"model.{name}"] for name in gradients}
    steps = {
        name: weights[name] - before[f"model.{name}"] * (1 - _rate(name) * STEADY.weight_decay) for name in weights
    }
    expected = {
        "train/bridge_video": (sums[0] / sums[1]).sqrt().item(),
        "train/bridge_audio": (sums[2] / sums[3]).sqrt().item(),
        "perf/mfu": 3 * 3 * forward_flops(config, (3, 4, 6), 7).total / (2.0 * 0.5e12),
    }
    for group, start in TOWERS.items():
        expected[f"train/param_norm_{group}"] = norm(after, f"model.{start}")
        if group != "video_low":
            expected[f"train/grad_norm_{group}"] = norm(gradients, start)
            expected[f"train/update_ratio_{group}"] = norm(steps, start) / norm(weights, start)
    for modality, mse, present, t in (
        ("video", parts.video, batch.video_weight, draws.t_video),
        ("audio", parts.audio, batch.audio_weight, draws.t_audio),
    ):
        weight = batch.weight * present
        for place in range(10):
            inside = weight * ((t >= 100 * place) & ((t < 100 * (place + 1)) | (place == 9)))
            if inside.sum() > 0:
                expected[f"train/loss_{modality}_noise_{place / 10:.1f}"] = ((inside * mse).sum() / inside.sum()).item()
    return expected


def _rate(name: str) -> float:
    return STEADY.lr_bridge if name.startswith("dual_tower") else STEADY.lr_tower


def lines_of(root, run_id: str) -> list[dict]:
    return [json.loads(line) for line in (root / run_id / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("metrics")
    make_dataset(root / "data", [(CLIP, 9), (CLIP, 6)])
    make_dataset(root / "valid", [(CLIP, 4)], seed=1)
    keys = (f"data.valid_path={root / 'valid'}", "steps=4", "monitor.every=2", "ema.decay=0.5", "validation.samples=4")
    keys = (*keys, "monitor.count_collectives=2", "optim.parts.audio.lr=1e-3", "objective.balance=true")
    return root, run_cases(
        2,
        {
            **{name: (measured, (name,)) for name in MEASURED},
            "run": (runs.train, (root, root / "data", "run", *keys)),
        },
    )


@pytest.mark.parametrize("name", MEASURED)
def test_what_ranks_add_up_is_what_the_whole_model_has(ranks, name):
    for found, expected in ranks[1][name]:
        wanted = expected | {"perf/mfu": expected["perf/mfu"] / 2}  # two ranks, each with such a peak
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=2e-3), key
        told = ("train/param", "train/grad_norm_", "train/update", "train/bridge", "train/loss_video_noise")
        assert {key for key in found if key.startswith(told)} <= wanted.keys()  # nothing of the idle expert
        assert found["perf/hfu"] == found["perf/mfu"] and found["data/epoch"] == 0.08 and found["data/hours"] == 1.0


def test_names_are_grouped_and_costly_ones_come_when_they_are_due(ranks):
    root, results = ranks
    assert results["run"][0].get("ending") == "finished", results["run"]
    training, valid = runs.metrics(root, "run")
    names = {name for record in training + valid for name in record} - {"step"}
    assert {name.split("/")[0] for name in names} == {"train", "data", "valid"}
    assert {name for record in lines_of(root, "run") for name in record} - {"step"} <= known_names()
    assert ["train/param_norm_bridge" in record for record in training] == [True, False, True, False]
    assert [record["data/samples"] for record in training] == [4, 8, 12, 16]
    assert training[-1]["data/epoch"] == pytest.approx(16 / 15)
    assert training[-1]["data/hours"] == pytest.approx(16 * clip_seconds(CLIP) / 3600)
    assert training[0]["train/loss_video_high"] == training[0]["train/loss_video"]


def test_validation_tells_experts_apart_from_raw_and_averaged_weights(ranks):
    _, valid = runs.metrics(ranks[0], "run")
    last = valid[-1]
    for kind in ("valid", "valid/ema"):
        for modality in ("video", "audio"):
            high, low = last[f"{kind}/{modality}_high"], last[f"{kind}/{modality}_low"]
            assert last[f"{kind}/{modality}"] == pytest.approx((high + 5 * low) / 6)  # five of six levels are below 0.9
            assert high != low
    assert last["valid/ema/video_high"] != last["valid/video_high"]


def test_the_peak_is_asked_for_or_unknown():
    assert peak_flops(torch.device("cpu"), None) is None and peak_flops(torch.device("cpu"), 2.0) == 2e12


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250), ("NVIDIA GB300", 2500), ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA H800", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307), ("NVIDIA RTX A1000", None),
        ("NVIDIA H2000", None), ("", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_by_the_name_that_torch_reports(name: str, tera: float | None) -> None:
    assert peak_of(name) == (None if tera is None else 1e12 * tera)
