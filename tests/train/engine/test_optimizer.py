"""The protocol of an optimizer (train/optimizer/protocol.py), with one that is defined here alone: the engines train,
suppress, save, resume and measure with it as with AdamW."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import RunError
from data.loader.state import DataState
from tests.distributed import run_cases
from tests.selection import chosen
from tests.train import cases
from tests.train.cases import CONFIG, OPTIM, global_batch, reference_model, tiny_config
from tests.train.engine.zero_cases import relative, steps, whole
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import build_engine
from train.engine.zero_memory import zero_bytes
from train.optimizer.protocol import LocalShard
from train.parallel.host_memory import host_bytes
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import fill_weights
from train.parallel.parts import GROUPS

SETTINGS = replace(OPTIM, weight_decay=0.0, lr_tower=0.5, lr_bridge=1.0)
LAYOUTS = {
    "fsdp2": {},
    "hsdp": {"dp_replicate": 2},
    "host": {"optimizer_state": "host"},
    **{f"zero{stage}": {"engine": f"zero{stage}"} for stage in (1, 2, 3)},
}
TRAINED = chosen(LAYOUTS, "fsdp2", "host", "zero1", "zero3")


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum: one tensor for each weight, betas[0] its decay."""

    KEYS = ("velocity",)
    SHARD = "elements"

    @classmethod
    def make(cls, groups: list[dict[str, Any]], settings: Any) -> "Momentum":
        return cls(groups, {"momentum": settings.betas[0]})

    def step(self, closure: Any = None) -> None:
        self.update(torch.zeros(()))

    @torch.no_grad()
    def update(self, suppressed: torch.Tensor) -> None:
        for group in self.param_groups:
            for shard in (shard for shard in group["params"] if shard.grad is not None):
                state = self.state[shard]
                if not state:
                    state |= {"step": torch.zeros((), dtype=torch.float32), "velocity": torch.zeros_like(shard)}
                velocity = group["momentum"] * state["velocity"] + shard.grad
                state["velocity"].copy_(torch.where(suppressed > 0, state["velocity"], velocity))
                shard.copy_(torch.where(suppressed > 0, shard, shard - group["lr"] * velocity))
                state["step"] += 1 - suppressed

    def moved(self, shards: Sequence[LocalShard]) -> torch.Tensor:
        moves = [shard.state["velocity"].flatten() * shard.lr for shard in shards if shard.state is not None]
        return torch.linalg.vector_norm(torch.cat(moves)).double()


class Matrix(Momentum):
    """One that would have to see whole matrices."""

    SHARD = "all"


class Rows(Momentum):
    SHARD = "rows"


def make(layout_name: str, kind: Any = Momentum) -> Any:
    settings = ParallelConfig(**LAYOUTS[layout_name])
    layout = make_layout(settings, torch.device("cpu"))
    engine: Any = build_engine(tiny_config(), settings, SETTINGS, layout, seed=0, kind=kind)
    if settings.engine == "fsdp2":
        fill_weights(engine.model, cases.busy_value)
    else:
        engine.fill(cases.busy_value)
    return engine, layout


def trained(layout_name: str) -> dict:
    """Three steps, both experts in turn, against torch's own optimizer and clipping on one process; then one with a
    NaN; and what the engine says of its last update."""
    plain = reference_model(tiny_config(), torch.float32)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    groups = [
        {"params": [p for n, p in plain.named_parameters() if n.startswith("dual_tower") == bridge], "lr": lr}
        for bridge, lr in ((False, SETTINGS.lr_tower), (True, SETTINGS.lr_bridge))
    ]
    sgd = torch.optim.SGD(groups, momentum=SETTINGS.betas[0])
    for step in range(3):
        cases.backward(plain, [global_batch(step, torch.float32)], step)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), SETTINGS.clip)
        sgd.step()
        sgd.zero_grad()
    engine, layout = make(layout_name)
    steps(engine, layout, range(2))
    before = whole(engine)
    steps(engine, layout, range(2, 3))
    after, squares = whole(engine), engine.group_squares()["update"]
    torch.distributed.all_reduce(squares)
    walked = {tower: 0.0 for tower in GROUPS}
    for name in start:
        walked[name.split(".")[0]] += (after[f"model.{name}"] - before[f"model.{name}"]).double().square().sum().item()
    counts = engine.update_counts()
    steps(engine, layout, range(3, 4), nan=True)
    still = whole(engine)
    # The idle expert's is that of its own last update.
    active = [place for place, tower in enumerate(GROUPS) if tower != "video_dit_2"]
    said, true = squares.sqrt(), torch.tensor(list(walked.values())).sqrt()
    return {
        "moved": relative(
            {name: after[f"model.{name}"] - start[name] for name in start},
            {name: p.detach() - start[name] for name, p in plain.named_parameters()},
        ),
        "kept": {key.rsplit(".", 1)[1] for key in after if key.startswith("optim.")},
        "counts": {name.split(".")[0]: count for name, count in counts.items()},
        "suppressed": all(torch.equal(after[key], still[key]) for key in after) and counts == engine.update_counts(),
        "norm": max(abs(said[place] / true[place] - 1).item() for place in active),
        "tensors": after,
    }


def resumed(folder: Path, layout_name: str) -> dict:
    """Saved after three steps, loaded into another engine: two more steps give the bits of five in a row."""
    engine, layout = make(layout_name)
    steps(engine, layout, range(3))
    state = TrainState(engine, DataState.start("f" * 8, [4], 0, 2), step=3)
    state.data.position = 3
    (folder / layout_name).mkdir(parents=True, exist_ok=True)
    saver = Saver(folder / layout_name, CheckpointConfig(), CONFIG, layout.describe())
    saver.begin(state)
    saver.finish()
    steps(engine, layout, range(3, 5))
    fresh, layout = make(layout_name)
    path = checkpoint.newest(folder / layout_name)
    assert path is not None
    checkpoint.load(TrainState(fresh, DataState.start("f" * 8, [4], 0, 2)), path, CONFIG, {})
    steps(fresh, layout, range(3, 5))
    unbroken, found = whole(engine), whole(fresh)
    return {
        "same": unbroken.keys() == found.keys() and all(torch.equal(unbroken[key], found[key]) for key in found),
        "counts": engine.update_counts() == fresh.update_counts(),
    }


def refused(layout_name: str, kind: Any) -> str:
    try:
        make(layout_name, kind)
    except RunError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    two = {name: (trained, (name,)) for name in TRAINED}
    two |= {f"resumed {name}": (resumed, (folder / "two", name)) for name in ("fsdp2", "zero3")}
    two |= {
        "matrix": (refused, ("fsdp2", Matrix)), "rows": (refused, ("fsdp2", Rows)), "cut": (refused, ("zero1", Rows)),
    }  # fmt: skip
    one = {"fsdp2": (trained, ("fsdp2",)), "resumed": (resumed, (folder / "one", "fsdp2"))}
    return run_cases(1, one | {"matrix": (refused, ("fsdp2", Matrix))}), run_cases(2, two)


def check(result: dict) -> None:
    assert result["moved"] <= 1e-5 and result["norm"] <= 1e-4
    assert result["kept"] == {"velocity"} and result["suppressed"]
    assert result["counts"] == {"video_dit": 2, "video_dit_2": 1, "audio_dit": 3, "dual_tower_bridge": 3}


@pytest.mark.parametrize("name", TRAINED)
def test_another_optimizer_trains_under_every_engine(ranks, name):
    """The updates of one process, the step that is not finite suppressed, the norm of the update as the weights say."""
    for result in ranks[1][name]:
        assert "norm" in result
        if name == "host":  # its state would have to visit the device for the norm; on a CPU it lies there
            result = result | {"norm": 0.0}
        check(result)
    check(ranks[0]["fsdp2"][0])


def test_its_state_on_the_host_changes_no_bit(ranks):
    device, host = (ranks[1][name][0]["tensors"] for name in ("fsdp2", "host"))
    assert device.keys() == host.keys() and all(torch.equal(device[key], host[key]) for key in device)


def test_it_resumes_bit_for_bit(ranks):
    for result in [*ranks[0]["resumed"], *ranks[1]["resumed fsdp2"], *ranks[1]["resumed zero3"]]:
        assert result["same"] and result["counts"]


def test_an_engine_that_cannot_give_what_it_needs_refuses(ranks):
    one, two = ranks
    assert one["matrix"] == [""] and two["rows"] == ["", ""]
    assert two["matrix"][1] == "Matrix needs all of each parameter, of which FSDP2 gives each rank some rows"
    assert two["cut"][0] == "Rows needs rows of each parameter, ZeRO cuts them anywhere: parallel=fsdp2"


def test_memory_is_planned_by_what_it_keeps():
    config, parallel = tiny_config(), ParallelConfig(optimizer_state="host")
    adamw, momentum = (host_bytes(config, parallel, 4, True, *kind) for kind in ((), (Momentum,)))
    assert adamw["moments"] == 2 * momentum["moments"] > 0
    assert adamw["copy for checkpoints"] / momentum["copy for checkpoints"] == pytest.approx(4 / 3)
    assert zero_bytes(1, 100, 60, 4, 2, False, Momentum)["moments"] == 100
