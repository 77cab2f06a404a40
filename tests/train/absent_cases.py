"""What the ranks of test_absent.py do: steps on datasets whose clips all have both modalities, no sound, or no picture.

The batches come from the real stream; what they must give is written out on a model in one piece whose other tower is
never called.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Sample, assemble
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.loader.state import DataState
from data.loader.stream import Stream
from tests.train import cases
from tests.train.cases import TEXT, convert, full, reference_model, tiny_config
from tests.train.engine.zero_cases import whole
from train.engine.engine import Engine, ShardedEngine, build_engine
from train.engine.optim_config import OptimConfig
from train.objective.noise import Prepared, draw, generator
from train.objective.objective import Objective, ObjectiveConfig
from train.objective.validate import NOISE_SEED, ValidationConfig, Validator
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights
from train.step import forward_backward

SLOTS, SEED, STEPS = 4, 7, 2
# 15 video tokens, which two ranks do not divide. "mute" has no sound, "blind" no picture.
BUCKETS = {
    name: Bucket(frames=3, height=2, width=10, audio_steps=7, fps=24.0, has_video=video, has_audio=audio)
    for name, (video, audio) in {"full": (True, True), "mute": (True, False), "blind": (False, True)}.items()
}
# Of every sample that has both, something is given or paired.
OBJECTIVE = ObjectiveConfig(
    text_dropout=0.3, image_dropout=0.3, bridge_dropout=0.3, clean_video_prob=0.5, clean_audio_prob=0.4, paired_prob=0.1
)
EXPERTS = Objective(OBJECTIVE, ("high", "low"))
OPTIM = OptimConfig(lr_tower=1e-3, lr_bridge=2e-3, weight_decay=0.1, clip=0.05, warmup=0)
ABSENT = {"mute": ("audio_dit.", "dual_tower_bridge."), "blind": ("video_dit.", "video_dit_2.", "dual_tower_bridge.")}


def batches(
    folder: Path, kind: str, steps: int, micro: int, layout: Any, dtype: torch.dtype
) -> Iterator[list[Prepared]]:
    """This rank's micro-batches of the first steps over the dataset of a kind."""
    index = DatasetIndex.open(folder / kind)
    state = DataState.start(index.fingerprint, [SLOTS], seed=5, window=2)
    with Stream(
        index, state, dp_rank=layout.dp_rank, dp_world=layout.dp_world, micro_batch=micro, text_length=TEXT, workers=0,
        transform=lambda batch: Prepared(batch, convert(draw(batch, EXPERTS, SEED), dtype)),
    ) as stream:  # fmt: skip
        for _ in range(steps):
            yield next(stream)


def make_engine(ema_decay: float = 0.0, **parallel: Any) -> tuple[Engine, Layout]:
    """An engine over the tiny model with busy values; every part of the Bridge, its trained scale too."""
    settings, config = ParallelConfig(**parallel), model_config()
    layout = make_layout(settings, torch.device("cpu"))
    engine: Any = build_engine(config, settings, OPTIM, layout, seed=0, ema_decay=ema_decay)
    if isinstance(engine, ShardedEngine):
        fill_weights(engine.model, cases.busy_value)
        if engine.optimizer.average is not None:
            engine.optimizer.average.restart()
    else:
        engine.fill(cases.busy_value)
    return engine, layout


def model_config() -> Any:
    return tiny_config(pooled_adaln=True, trainable_condition_scale=True)


def tower_alone(folder: Path, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two steps, one of each expert, of the tower that a kind of clip has, with torch's own AdamW and clipping over
    that tower alone: gradients by step, norms, weights at the end."""
    model = reference_model(model_config(), dtype)
    adamw: dict[str, torch.optim.Optimizer] = {}
    found: dict[str, Any] = {"gradients": [], "norms": [], "losses": []}
    one = type("Whole", (), {"dp_rank": 0, "dp_world": 1})
    for step, [prepared] in enumerate(batches(folder, kind, STEPS, SLOTS, one, dtype)):
        expert = EXPERTS.expert(step)
        tower = {"mute": model.expert(expert), "blind": model.audio_dit}[kind]
        loss = sum(sample_alone(model, cases.part(prepared, [slot]), kind, expert) for slot in range(SLOTS)) / SLOTS
        loss.backward()
        found["losses"].append(loss.item())
        found["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert all(g.norm() > 0 for g in found["gradients"][-1].values()), "a part plays no role"
        found["norms"].append(torch.nn.utils.clip_grad_norm_(tower.parameters(), OPTIM.clip).item())
        if tower not in adamw:
            settings = {"betas": tuple(OPTIM.betas), "eps": OPTIM.eps, "weight_decay": OPTIM.weight_decay}
            adamw[tower] = torch.optim.AdamW(tower.parameters(), lr=OPTIM.lr_tower, **settings)
        adamw[tower].step()
        model.zero_grad(set_to_none=True)
    return found | {"after": {n: p.detach().clone() for n, p in model.named_parameters()}}


def sample_alone(model: Any, one: Prepared, kind: str, expert: str) -> Tensor:
    """The loss of a sample, from a model that is given its one modality."""
    batch, draws = one.batch, one.draws
    dtype = draws.noise_video.dtype
    text = batch.text if draws.keep_text.item() else batch.empty_text[None]
    absent = {"video": None, "audio": None, "condition": None, "t_video": None, "t_audio": None}
    if kind == "mute":
        t, noise, clean, weight = draws.t_video, draws.noise_video, batch.video.to(dtype), OBJECTIVE.video_weight
        given = {"condition": batch.condition.to(dtype) * draws.keep_image, "t_video": t}
    else:
        t, noise, clean, weight = draws.t_audio, draws.noise_audio, batch.audio.to(dtype), OBJECTIVE.audio_weight
        given = {"t_audio": t}
    assert t.item() > 0, "a clip of one modality was held as given"
    sigma, name = t.to(dtype) / 1000, {"mute": "video", "blind": "audio"}[kind]
    noisy = (1 - sigma) * clean + sigma * noise
    out = model(**absent | given | {name: noisy}, text=text, fps=24.0, expert=expert)
    # Weights are float32, as those of a batch are.
    return torch.tensor(weight).to(dtype) * (getattr(out, name) - (noise - clean)).square().mean()


def as_alone(folder: Path, kind: str, micro: int, **parallel: Any) -> dict[str, Any]:
    """The same two steps under a layout, against `tower_alone` (in `folder`). Relative differences."""
    engine, layout = make_engine(**parallel)
    exact = parallel.get("compute_dtype") == "float64"
    true = torch.load(folder / f"{kind}.pt", weights_only=True)
    start = whole(engine)
    result: dict[str, Any] = {"norm": 0.0, "loss": 0.0, "gradient": (0.0, "")}
    dtype = torch.float64 if exact else torch.float32
    for step, mine in enumerate(batches(folder, kind, STEPS, micro, layout, dtype)):
        expert = EXPERTS.expert(step)
        losses = forward_backward(engine.model, mine, OBJECTIVE, expert, layout, engine.backward)
        torch.distributed.all_reduce(losses.share)
        result["loss"] = max(result["loss"], abs(losses.share.item() / true["losses"][step] - 1))
        if isinstance(engine, ShardedEngine):
            found = full({n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None})
            result["gradient"] = max(result["gradient"], cases.worst(found, true["gradients"][step]))
        norm = engine.step(1.0, expert).item()
        result["norm"] = max(result["norm"], abs(norm / true["norms"][step] - 1))
    end = whole(engine)
    moved = {n: end[f"model.{n}"].double() - start[f"model.{n}"].double() for n in true["after"]}
    expected = {n: true["after"][n].double() - start[f"model.{n}"].double() for n in true["after"]}
    a, b = (torch.cat([x[n].flatten() for n in expected]) for x in (moved, expected))
    return result | {"moved": ((a - b).norm() / b.norm()).item()}


def untouched(folder: Path, steps: int, **parallel: Any) -> dict[str, Any]:
    """Two steps on full clips, so that everything has moments; some soundless ones; two on full clips; some pictureless
    ones. For each of the two kinds: which tensors of what was absent changed, and which of what was there did not."""
    engine, layout = make_engine(ema_decay=0.9, **parallel)
    result: dict[str, Any] = {}
    for kind in ("mute", "blind"):
        _train(engine, layout, folder, "full", 2)
        before, counts, averages = whole(engine), engine.update_counts(), engine.average_counts()
        _train(engine, layout, folder, kind, steps)
        after = whole(engine)
        assert before.keys() == after.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        absent = {key for key in before if key.partition(".")[2].startswith(ABSENT[kind])}
        again = engine.update_counts()
        stepped = {name.split(".")[0]: again[name] - counts[name] for name in again}
        averaged = {tower: count - averages[tower] for tower, count in engine.average_counts().items()}
        kinds = {key.split(".")[0] for key in absent}
        result[kind] = {
            "moved": sorted(changed & absent), "of": len(absent), "kinds": kinds, "stepped": stepped,
            "averaged": averaged, "still": sorted(before.keys() - absent - changed),
        }  # fmt: skip
    return result


def _train(engine: Engine, layout: Layout, folder: Path, kind: str, steps: int) -> None:
    for step, mine in enumerate(batches(folder, kind, steps, 2, layout, torch.float32)):
        expert = EXPERTS.expert(step)
        forward_backward(engine.model, mine, OBJECTIVE, expert, layout, engine.backward)
        engine.step(1.0, expert)


SIGMAS = [0.2, 0.95]


def validated(folder: Path, **parallel: Any) -> dict[str, dict[str, float]]:
    """Validation on clips of all kinds: what it says, and the means over the samples that have a modality, from a model
    that is given only what a sample has."""
    engine, layout = make_engine(**parallel)
    index = DatasetIndex.open(folder / "mixed")
    config = ValidationConfig(samples=len(index), sigmas=SIGMAS)
    objective = Objective(replace(OBJECTIVE, clean_video_prob=0, clean_audio_prob=0), ("high", "low"))
    found = Validator(index, config, objective, layout, TEXT).run(engine.model)
    plain, errors = reference_model(model_config(), torch.float32), {}
    for row in range(len(index)):
        clip, bucket, text = index.read_clip(row), index.bucket_of(row), index.read_text(row, "plain")
        batch = assemble(0, bucket, [Sample("", row, 1.0, clip, text)], index.empty_text(), TEXT, 1.0)
        for sigma in SIGMAS:
            inputs: dict[str, Any] = {"video": None, "audio": None, "condition": None, "t_video": None, "t_audio": None}
            targets = {}
            for modality, present in (("video", bucket.has_video), ("audio", bucket.has_audio)):
                if present:
                    clean = getattr(batch, modality).float()
                    shape, purpose = clean.shape[1:], f"validation/{modality}"
                    noise = torch.from_numpy(generator(NOISE_SEED, purpose, row).standard_normal(shape, "float32"))
                    inputs[modality] = (1 - sigma) * clean + sigma * noise
                    inputs[f"t_{modality}"] = torch.tensor([1000 * sigma])
                    targets[modality] = noise - clean
            if bucket.has_video:
                inputs["condition"] = batch.condition.float()
            expert = objective.expert_at(1000 * sigma)
            with torch.no_grad():
                out = plain(**inputs, text=batch.text, fps=bucket.fps, expert=expert)
            for modality, target in targets.items():
                error = (getattr(out, modality) - target).square().mean().item()
                for name in (modality, f"{modality}_{expert}"):
                    errors.setdefault(name, []).append(error)
    expected = {name: sum(values) / len(values) for name, values in errors.items()}
    expected["loss"] = OBJECTIVE.video_weight * expected["video"] + OBJECTIVE.audio_weight * expected["audio"]
    return {"found": found, "expected": expected}
