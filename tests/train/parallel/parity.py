"""What the ranks of test_layouts.py compare: five training steps of a layout against the same steps of one process.

One process takes the whole global batch in one forward, in float64, with torch's own clipping and optimizer. Its
numbers are made once (`expected`) and read by every rank of every case. A case draws its own noise for its own slots,
as the trainer does. What rounding alone makes of a step in float32 or bfloat16 is measured on one process as well, on
the machine that judges (`rounding`): kernels differ from CPU to CPU.
"""

import copy
import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.clip import Bucket
from model.bridge import BridgeConfig
from model.joint import JointConfig, Velocities
from model.tower import TowerConfig
from tests.train import cases
from tests.train.cases import TEXT, TEXT_DIM, convert, full, reference_model, some
from tests.train.planted import planted
from train.engine.engine import ShardedEngine
from train.engine.optim_config import OptimConfig
from train.objective.noise import Prepared, draw
from train.objective.objective import Objective
from train.parallel.float8 import convert_linears, large_linears
from train.parallel.mesh import ParallelConfig
from train.step import forward_backward

STEPS, SEED, SLOTS = 5, 12, 4
OBJECTIVE = replace(cases.OBJECTIVE, clean_video_prob=0.1, clean_audio_prob=0.1, paired_prob=0.2, noise_floor=0.3)
EXPERTS = Objective(OBJECTIVE, ("high", "low"))
# Steps this large change every parameter visibly; the clip binds in all of them.
OPTIM = OptimConfig(lr_tower=15.0, lr_bridge=30.0, clip=0.01, warmup=0)
# 15 video tokens in frames of 5: neither 2 nor 4 ranks divide them, and their borders cut frames.
BUCKET = Bucket(frames=3, height=2, width=10, audio_steps=403, fps=24.0, has_video=True, has_audio=True)

# Layouts of products in float8.
FLOAT8: dict[str, dict[str, Any]] = {
    "fsdp, compiled": {"compile": "aot_eager"},
    "ulysses 2, recomputed": {"ulysses": 2, "recompute": "full"},
    "ring 2": {"ring": 2},
}


class Case(NamedTuple):
    """`heads` of the video, `micro`: slots a rank takes at a time, `asked`: see `Asking`, and a ParallelConfig.

    `steps`: STEPS, or two for a quick one: both experts' gradients.
    """

    heads: int
    micro: int
    parallel: dict[str, Any]
    asked: str = "all"
    steps: int = STEPS


class Linear(torch.optim.SGD):
    """An optimizer of the engine whose steps are linear in the gradient."""

    KEYS = ()

    def update(self, suppressed: torch.Tensor) -> None:
        self.step()


class Asking:
    """A model that is asked for more, or less, than the trainer asks for, on one process and under a layout alike.

    "given": other text for the sound, and a factor of its own for each sample's Bridge; "mute": no sound; "blind": no
    video.
    """

    def __init__(self, model: Any, asked: str) -> None:
        self.model, self.asked = model, asked
        self.config, self.token_range = model.config, model.token_range

    def __call__(self, **inputs: Any) -> Velocities:
        video, audio = inputs["video"], inputs["audio"]
        if self.asked == "given":
            scale = 0.3 + 0.5 * inputs["bridge_scale"] + inputs["t_audio"] / 2000
            inputs |= {"text_audio": 2 * inputs["text"].flip(1), "bridge_scale": scale}
        elif self.asked == "mute":
            out = self.model(**inputs | {"audio": None})
            return Velocities(out.video, torch.zeros_like(audio))
        elif self.asked == "blind":
            out = self.model(**inputs | {"video": None})
            tokens = self.token_range(video[0, 0].numel() // 4)
            return Velocities(video.new_zeros(len(video), tokens.stop - tokens.start, 64), out.audio)
        return self.model(**inputs)


def config_of(heads: int) -> JointConfig:
    """Three video blocks, two of which meet sound (what the second Bridge sends back goes through the first), heads of
    8. Pooled AdaLN with 3 and 5 heads; with 12 the released form without. With 5 the heads predict clean latents."""
    pooled = heads != 12
    return JointConfig(
        video=TowerConfig(
            dim=8 * heads, num_heads=heads, num_layers=3, ffn_dim=50, in_dim=36, out_dim=16, text_dim=TEXT_DIM,
            freq_dim=16,
        ),
        audio=TowerConfig(
            dim=16, num_heads=2, num_layers=2, ffn_dim=30, in_dim=128, out_dim=128, text_dim=TEXT_DIM, freq_dim=16,
            patch_size=[1], rope="dac",
        ),
        bridge=BridgeConfig(head_dim=8, pooled_adaln=pooled, trainable_condition_scale=pooled),
        text_length=TEXT, prediction="sample" if heads == 5 else "velocity",
    )  # fmt: skip


def global_batch(step: int) -> Batch:
    """Four slots: one with both modalities, one without sound, one left over (weight 0), one without video."""
    g = torch.Generator().manual_seed(100 + step)
    rand = lambda *shape: torch.randn(*shape, generator=g).bfloat16()  # noqa: E731
    return Batch(
        step=step, bucket=BUCKET, keys=[f"k{i}" for i in range(SLOTS)],
        sample_numbers=np.arange(SLOTS, dtype=np.int64) + SLOTS * step,
        video=rand(SLOTS, 16, 3, 2, 10), audio=rand(SLOTS, 128, 403), condition=rand(SLOTS, 20, 3, 2, 10),
        text=rand(SLOTS, TEXT, TEXT_DIM), empty_text=rand(TEXT, TEXT_DIM), weight=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        video_weight=torch.tensor([1.0, 1.0, 1.0, 0.0]), audio_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        total_weight=3.0,
    )  # fmt: skip


def micro_batches(step: int, micro: int, rank: int, world: int, dtype: torch.dtype) -> list[Prepared]:
    """What data rank `rank` of `world` takes in this step, with the draws that it makes for it."""
    slots = list(range(SLOTS))[rank::world]
    batches = [some(global_batch(step), slots[i : i + micro]) for i in range(0, len(slots), micro)]
    return [Prepared(batch, convert(draw(batch, EXPERTS, SEED), dtype)) for batch in batches]


def moments(losses: Any) -> Tensor:
    """[5]: share of the loss, and the metrics by modality; sums over ranks describe the global batch."""
    return torch.cat([losses.share.view(1), losses.video, losses.audio]).double()


def expected(
    folder: Path, heads: int, asked: str, dtype: torch.dtype = torch.float64, wide_states: bool = False
) -> None:
    """Write what one process finds that computes in `dtype` (its weights in at least float32, with `wide_states` its
    hidden states too): losses and norms of every step, the first two gradients (one of each expert), and the parameters
    before and after each."""
    wide = torch.promote_types(dtype, torch.float32)
    model = reference_model(config_of(heads), wide)
    rates = ((False, OPTIM.lr_tower), (True, OPTIM.lr_bridge))
    sgd = torch.optim.SGD(
        [
            {"params": [p for n, p in model.named_parameters() if n.startswith("dual_tower") == bridge], "lr": rate}
            for bridge, rate in rates
        ],
        weight_decay=OPTIM.weight_decay,
    )
    found: dict[str, Any] = {"start": _parameters(model), "losses": [], "norms": [], "gradients": [], "after": []}
    for step in range(STEPS):
        computing = in_dtype(model, dtype)
        if wide_states:
            computing.keep_residual(torch.float32)
        batches = micro_batches(step, SLOTS, 0, 1, wide)
        expert = EXPERTS.expert(step)
        losses = forward_backward(Asking(computing, asked), batches, OBJECTIVE, expert, cases.ONE_PROCESS)
        for weights, computed in zip(model.parameters(), computing.parameters(), strict=True):
            weights.grad = None if computed.grad is None else computed.grad.to(wide)
        found["losses"].append(moments(losses))
        if step < 2:
            found["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            assert all(gradient.norm() > 0 for gradient in found["gradients"][step].values()), "a part plays no role"
        found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip).double())
        sgd.step()
        sgd.zero_grad()
        found["after"].append(_parameters(model))
    torch.save(found, recording(folder, heads, asked, dtype, wide_states))


def recording(
    folder: Path, heads: int, asked: str, dtype: torch.dtype = torch.float64, wide_states: bool = False
) -> Path:
    """Where `expected` writes."""
    return folder / f"{heads}-{asked}-{dtype}{'-wide' * wide_states}.pt".replace("torch.", "")


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """A copy that computes in `dtype`, and in at least float32 along the time path, as the engines do."""
    computing = copy.deepcopy(model).to(dtype)
    for name, module in computing.named_modules():
        if name.endswith(("time_embedding", "time_projection")):
            module.to(torch.promote_types(dtype, torch.float32))
    return computing


@functools.cache
def rounding(folder: Path, heads: int, dtype: torch.dtype, steps: int, wide_states: bool) -> dict[str, Any]:
    """By how much one process that computes in `dtype` differs from float64: see `compare`."""
    found, true = (
        torch.load(recording(folder, heads, "all", *kind), weights_only=True)
        for kind in ((dtype, wide_states), (torch.float64,))
    )
    pairs = [list(zip(found[key], true[key], strict=True))[:steps] for key in ("losses", "gradients")]
    return {
        "loss": max(worst_of(*pair) for pair in pairs[0]),
        "gradients": larger(*(by_part(*pair) for pair in pairs[1])),
        "moved": together(moves(found["after"][steps - 1], true), moves(true["after"][steps - 1], true)),
    }


def parity(folder: Path, case: Case, fault: str | None = None) -> dict[str, Any]:
    """`compare`, with a planted fault when one is named."""
    with planted(fault) if fault else nullcontext():
        return compare(folder, case)


def compare(folder: Path, case: Case) -> dict[str, Any]:
    """The first steps of `expected` under a layout. Relative differences of all that it wrote; `own_norm`: of the
    engine's norm from that of the gradients that it holds; `graphs`: compiled graphs after each step, none without
    compile.
    """
    true = torch.load(recording(folder, case.heads, case.asked), weights_only=True)
    parallel = ParallelConfig(**{"compute_dtype": "float64", **case.parallel})
    if parallel.compile != "none":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    model, layout = cases.sharded_model(config_of(case.heads), parallel)
    engine = ShardedEngine(model, OPTIM, layout, parallel.accumulate)
    # The engine's own clipping and LR groups, with steps that are linear in the gradient.
    engine.optimizer.inner = Linear(engine.optimizer.inner.param_groups)  # type: ignore[assignment]
    dtype = torch.float64 if parallel.compute_dtype == "float64" else torch.float32
    result: dict[str, Any] = {"loss": 0.0, "norm": 0.0, "gradient": (0.0, ""), "gradients": {}, "graphs": []}
    result["own_norm"] = 0.0
    result["clipped"] = min(true["norms"]).item() > OPTIM.clip
    for step in range(case.steps):
        batches = micro_batches(step, case.micro, layout.dp_rank, layout.dp_world, dtype)
        expert = EXPERTS.expert(step)
        losses = forward_backward(Asking(model, case.asked), batches, OBJECTIVE, expert, layout, engine.backward)
        sums = moments(losses)
        dist.all_reduce(sums)
        result["loss"] = max(result["loss"], worst_of(sums, true["losses"][step]))
        found = full({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if step < len(true["gradients"]):
            result["gradient"] = max(result["gradient"], cases.worst(found, true["gradients"][step]))
            result["gradients"] = larger(result["gradients"], by_part(found, true["gradients"][step]))
        norm = engine.step(1.0, expert)
        own = torch.cat([gradient.flatten().double() for gradient in found.values()]).norm()
        result["own_norm"] = max(result["own_norm"], abs(norm.item() / own.item() - 1))
        result["norm"] = max(result["norm"], abs(norm.item() / true["norms"][step].item() - 1))
        if parallel.compile != "none":
            result["graphs"].append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    end, true_end = _parameters(model), true["after"][case.steps - 1]
    result["parameters"] = cases.worst(end, true_end)
    result["moved"] = together(moves(end, true), moves(true_end, true))
    return result


def float8_parity(degrees: dict[str, Any]) -> dict[str, float]:
    """Products in float8 (emulated) under a layout and on one process. Largest relative differences in float64: of the
    loss, of gradients of the weights of float8 linears, and of all others."""
    config = cases.tiny_config(2)
    config = replace(config, video=replace(config.video, ffn_dim=64))
    prepared = cases.global_batch(0, torch.float64)
    one = cases.reference_model(config, torch.float64)
    convert_linears(one, "float8_emulated")
    true = cases.backward(one, [prepared], 0).share.item()
    parallel = ParallelConfig(compute_dtype="float64", linear="float8_emulated", **degrees)
    model, layout = cases.sharded_model(config, parallel)
    share = cases.backward(model, cases.my_micro_batches(prepared, layout, 4), 0, layout).share.clone()
    dist.all_reduce(share)
    found, expected = (
        full({name: p.grad for name, p in network.named_parameters() if p.grad is not None}) for network in (model, one)
    )
    inside = {f"{name}.weight" for name, _ in large_linears(one)} & expected.keys()
    parts = {"float8": inside, "others": expected.keys() - inside}
    result = {
        part: cases.worst({n: found[n] for n in names}, {n: expected[n] for n in names})[0]
        for part, names in parts.items()
    }
    return result | {"loss": abs(share.item() / true - 1)}


def together(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Relative L2 difference of all values together."""
    a, b = (torch.cat([values[name].flatten().double() for name in true]) for values in (found, true))
    return ((a - b).norm() / b.norm()).item()


def moves(end: dict[str, Tensor], recorded: dict[str, Any]) -> dict[str, Tensor]:
    """How far each parameter went from the start."""
    return {name: values - recorded["start"][name] for name, values in end.items()}


def by_part(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """`together` for each tower and the Bridge, where they have values."""
    assert found.keys() == true.keys()
    parts = sorted({name.split(".")[0] for name in true})
    return {part: together(found, {n: x for n, x in true.items() if n.split(".")[0] == part}) for part in parts}


def larger(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """The larger value of every key."""
    return {key: max(a.get(key, 0.0), b.get(key, 0.0)) for key in a | b}


def worst_of(found: Tensor, true: Tensor) -> float:
    """Largest relative difference of single values."""
    return ((found - true).abs() / true.abs().clamp(min=1e-12)).max().item()


def _parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return full(dict(model.named_parameters()))
