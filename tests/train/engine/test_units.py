"""Units of FSDP2: each is gathered once in forward and once in backward, two ahead of what computes, and reduced once;
whatever runs of a unit's modules, gradients are those of one process. Expectations are written out by hand."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from model.joint import JointConfig
from tests.distributed import run_cases
from tests.train import cases
from tests.train.engine.test_frozen import ALONE
from train.monitor.counters import CollectiveCounter
from train.objective.objective import Objective, loss_share
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import build_model, fill_weights
from train.parallel.parts import ALL, tower_of
from train.step import forward_backward

TO_VIDEO, TO_AUDIO = (f"dual_tower_bridge.{way}_conditioners" for way in ("audio_to_video", "video_to_audio"))
# Four video blocks and three of audio, which meet in layers 0 and 2. What each unit holds, by a name of its own.
CONTENT = {
    "stem v": {"video_dit.patch_embedding", "video_dit.text_embedding"},
    "time v": {"video_dit.time_embedding", "video_dit.time_projection"},
    "stem a": {"audio_dit.patch_embedding", "audio_dit.text_embedding"},
    "time a": {"audio_dit.time_embedding", "audio_dit.time_projection"},
    "small 0": {f"{TO_VIDEO}.0", f"{TO_AUDIO}.0", "audio_dit.blocks.0"},
    "small 1": {"audio_dit.blocks.1"},
    "small 2": {f"{TO_VIDEO}.2", f"{TO_AUDIO}.2", "audio_dit.blocks.2"},
    **{f"video {i}": {f"video_dit.blocks.{i}"} for i in range(4)},
    "head v": {"video_dit.head"},
    "head a": {"audio_dit.head"},
}
APART = {  # where the sound of a layer learns beside a frozen Bridge
    **{name: content for name, content in CONTENT.items() if name not in ("small 0", "small 2")},
    **{f"bridge {i}": {f"{TO_VIDEO}.{i}", f"{TO_AUDIO}.{i}"} for i in (0, 2)},
    **{f"sound {i}": {f"audio_dit.blocks.{i}"} for i in (0, 2)},
}
SCALE = "dual_tower_bridge.condition_scale"  # of the root, which is gathered first and stays
ORDER = {  # in which a forward of each kind of clip meets them
    "both": "stem v, time v, stem a, time a, small 0, video 0, small 1, video 1, small 2, video 2, video 3, head v, "
            "head a",
    "video": "stem v, time v, video 0, video 1, video 2, video 3, head v",
    "audio": "stem a, time a, small 0, small 1, small 2, head a",
}  # fmt: skip
# In which they are reduced: where their backward ends, those without an input that has a gradient at the end.
REDUCED = {
    "both": "head a, head v, video 3, video 2, small 2, video 1, small 1, video 0, small 0, stem v, time v, stem a, "
            "time a",
    "video": "head v, video 3, video 2, video 1, video 0, stem v, time v",
    "audio": "head a, small 2, small 1, small 0, stem a, time a",
}  # fmt: skip
KINDS = [("none", "both"), ("none", "video"), ("none", "audio"), ("full", "both"), ("selective", "both")]


def config() -> JointConfig:
    tiny = cases.tiny_config(3, strategy="custom", trainable_condition_scale=True)
    return replace(tiny, video=replace(tiny.video, num_layers=4), audio=replace(tiny.audio, num_layers=3))


def make(trained: Any = ALL, dtype: str = "float64", **parallel: Any) -> tuple[Any, Any, Any]:
    """The model under a layout, the layout, and the model in one piece."""
    settings = ParallelConfig(compute_dtype=dtype, **parallel)
    layout = make_layout(settings, torch.device("cpu"))
    model = build_model(config(), settings, layout, seed=0, trained=trained)
    fill_weights(model, cases.busy_value)
    plain = cases.reference_model(config(), torch.float64)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(tower_of(name) in trained)
    return model, layout, plain


def module_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[1] == "blocks" or parts[1].endswith("conditioners") else 2])


def unit_of(modules: set[str], units: dict[str, set[str]]) -> str:
    """Of `units`, that which holds just these modules, of either expert."""
    modules = {module.replace("video_dit_2", "video_dit") for module in modules}
    return next((unit for unit, content in units.items() if content == modules), str(sorted(modules)))


@contextmanager
def recorded(model: Any, units: dict[str, set[str]] = CONTENT) -> Iterator[list[tuple[str, Any]]]:
    """("gather", unit) and ("reduce", modules) as they are issued, ("run" or "back", unit) as its first, or last,
    module computes."""
    events: list[tuple[str, Any]] = []
    gather, reduce = _fsdp_param_group.foreach_all_gather, _fsdp_param_group.foreach_reduce

    def gathering(given: Any, *rest: Any) -> Any:
        events.append(("gather", unit_of({module_of(one._param_fqn) for one in given}, units)))
        return gather(given, *rest)

    def reducing(given: Any, *rest: Any) -> Any:
        events.append(("reduce", {module_of(one._param_fqn) for one in given}))
        return reduce(given, *rest)

    def watch(name: str, module: torch.nn.Module) -> list[Any]:
        unit = next((unit for unit, held in units.items() if name.replace("dit_2", "dit") in held), None)
        if unit is None:
            return []

        def ran(_: Any, __: Any, out: Any) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: events.append(("back", unit)))

        before = module.register_forward_pre_hook(lambda *_: events.append(("run", unit)))
        return [before, module.register_forward_hook(ran)]

    hooks = [hook for name, module in model.named_modules() for hook in watch(name, module)]
    with (
        patch.object(_fsdp_param_group, "foreach_all_gather", gathering),
        patch.object(_fsdp_param_group, "foreach_reduce", reducing),
    ):
        yield events
    for hook in hooks:
        hook.remove()


def batch_of(step: int, given: str) -> Any:
    prepared = cases.global_batch(step, torch.float64)
    return replace(prepared, batch=Objective(ALONE[given], ("high", "low")).alone(prepared.batch))


def step(
    model: Any, layout: Any, plain: Any, number: int, given: str, expert: str, counter: Any = None
) -> tuple[float, str]:
    """The largest difference of a gradient from one process's; both are then moved along it."""
    prepared = batch_of(number, given)
    mine = cases.my_micro_batches(prepared, layout, 2)
    with counter or nullcontext():
        forward_backward(model, mine, ALONE[given], expert, layout)
    forward_backward(plain, [prepared], ALONE[given], expert, cases.ONE_PROCESS)
    there = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    found = cases.worst(cases.full({n: p.grad for n, p in model.named_parameters() if p.grad is not None}), there)
    for whole in (model, plain):
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        whole.zero_grad()
    return found


def gathered(model: Any) -> list[str]:
    """Parameters that lie whole on this rank."""
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def a_step(kind: str, given: str) -> dict[str, Any]:
    """What the second step of an expert issues, in order, and its gradient."""
    model, layout, plain = make(recompute=kind)
    found: dict[str, Any] = {"first": step(model, layout, plain, 0, given, "high")}
    counter = CollectiveCounter(layout)
    with recorded(model) as events:
        found["second"] = step(model, layout, plain, 2, given, "low", counter)
    return found | {"events": events, "calls": counter.calls["fsdp", "all_gather"], "whole": gathered(model)}


def of_frozen(trained: set[str]) -> dict[str, Any]:
    model, layout, plain = make(trained)
    with recorded(model, APART if trained == {"audio_dit"} else CONTENT) as events:
        return {"gradient": step(model, layout, plain, 0, "both", "high"), "events": events}


def in_turn() -> dict[str, Any]:
    """Steps with and without a modality, forwards without backward between them, one that is broken off, and one whose
    loss does not depend on the sound of the last layers."""
    model, layout, plain = make()
    found: dict[str, Any] = {"whole": []}

    def forward(given: str) -> None:
        with torch.no_grad():
            [mine] = cases.my_micro_batches(batch_of(9, given), layout, 2)
            loss_share(model, mine.batch, mine.draws, ALONE[given], "high", 1)
        found["whole"].append(gathered(model))

    def fail(*_: Any) -> None:
        raise InterruptedError

    for number, given in enumerate(("both", "audio", "both", "video", "both", "audio")):
        found[f"{number}: {given}"] = step(model, layout, plain, number, given, "high")
        forward("audio")
        forward("both")
    for place in (model.dual_tower_bridge.video_to_audio_conditioners["2"], model.audio_dit.blocks[0].ffn):
        hook = place.register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            step(model, layout, plain, 7, "both", "high")
        hook.remove()
        for module in model.modules():  # as where a checkpoint is then restored
            if isinstance(module, FSDPModule):
                module.reshard()
        found[f"after {len(found)}"] = step(model, layout, plain, 8, "both", "high")
    with patch.dict(ALONE, both=replace(ALONE["both"], audio_weight=0.0)):
        found["weight 0"] = step(model, layout, plain, 10, "both", "high")
    losses = []
    for whole, (place, prepared) in ((model, (layout, batch_of(11, "both"))), (plain, (None, batch_of(11, "both")))):
        rows = cases.my_micro_batches(prepared, place, 4)[0] if place else prepared
        batch, draws = rows.batch, rows.draws
        out = whole(
            video=draws.noise_video, audio=draws.noise_audio, condition=batch.condition.double(),
            text=batch.text.double(), t_video=draws.t_video, t_audio=draws.t_audio,
        )  # fmt: skip
        losses.append(out.video.square().sum())
        (losses[-1] * (layout.world if place else 1)).backward()
    there = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {"video alone": cases.worst(cases.full(mine), there)}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[Any]]:
    return run_cases(
        2,
        {
            **{f"{kind}, {given}": (a_step, (kind, given)) for kind, given in KINDS},
            "bridge": (of_frozen, ({"dual_tower_bridge"},)),
            "audio": (of_frozen, ({"audio_dit"},)),
            "in turn": (in_turn, ()),
        },
    )


def expected(order: list[str], back: bool) -> list[tuple[str, str]]:
    """Units gathered in this order, each before the unit computes that stands two before it."""
    events: list[tuple[str, str]] = []
    waiting = [*order]
    for place, unit in enumerate(order):
        while waiting and order.index(waiting[0]) <= place + 2:
            events.append(("gather", waiting.pop(0)))
        events.append(("back" if back else "run", unit))
    return events


def passes(events: list[tuple[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Events of forward and of backward, each unit's first computation alone."""
    turn = next(i for i, (what, _) in enumerate(events) if what == "back")
    while events[turn - 1][0] == "gather":
        turn -= 1
    return tuple(
        [one for i, one in enumerate(part) if one[0] == "gather" or one not in part[:i]]
        for part in (events[:turn], [one for one in events[turn:] if one[0] in ("gather", "back")])
    )  # type: ignore[return-value]


@pytest.mark.parametrize("kind,given", KINDS)
def test_units_are_gathered_two_ahead_in_the_order_of_each_pass(ranks: Any, kind: str, given: str) -> None:
    order = ORDER[given].split(", ")
    for result in ranks[f"{kind}, {given}"]:
        assert max(result["first"][0], result["second"][0]) <= 1e-10
        there, back = passes(result["events"])
        assert there[0] == ("gather", str([SCALE]))
        assert there[1:] == expected(order, back=False)
        # Stems and time paths end in another order than they begin, when all of them are there or on their way.
        blocks = [unit for unit in order if unit.split()[0] not in ("stem", "time")]
        assert [one for one in back if one[0] == "gather"] == [("gather", unit) for unit in reversed(order)]
        ahead = expected(order[::-1], back=True)
        assert back[: ahead.index(("back", blocks[0])) + 1] == ahead[: ahead.index(("back", blocks[0])) + 1]
        assert result["calls"] == 2 * len(order) + 1
        assert result["whole"] == []


@pytest.mark.parametrize("kind,given", KINDS)
def test_what_took_part_is_reduced_once(ranks: Any, kind: str, given: str) -> None:
    for result in ranks[f"{kind}, {given}"]:
        reduced = [content for what, content in result["events"] if what == "reduce"]
        there = [{m.replace("video_dit", "video_dit_2") for m in CONTENT[u]} for u in REDUCED[given].split(", ")]
        if given == "audio":
            there = [{module for module in content if module.startswith("audio_dit")} for content in there]
        if given == "both":
            assert {SCALE} in reduced
            reduced.remove({SCALE})
        assert reduced == there


@pytest.mark.parametrize("trained", ["bridge", "audio"])
def test_what_is_frozen_is_gathered_again_only_for_what_learns(ranks: Any, trained: str) -> None:
    order, units = ORDER["both"].split(", "), CONTENT
    tower, begins = {"bridge": ("dual_tower_bridge", "small 0"), "audio": ("audio_dit", "stem a")}[trained]
    if trained == "audio":
        units = APART
        order = [
            part
            for unit in order
            for part in ([unit] if unit in APART else [f"bridge {unit[-1]}", f"sound {unit[-1]}"])
        ]
    met = order[order.index(begins) :]
    for result in ranks[trained]:
        assert result["gradient"][0] <= 1e-10
        there, back = passes(result["events"])
        assert there[1:] == expected(order, back=False)
        assert [unit for what, unit in back if what == "gather"] == met[::-1]
        reduced = [content for what, content in result["events"] if what == "reduce"]
        learns = [{module for module in units[unit] if module.startswith(tower)} for unit in met]
        assert sorted(map(sorted, reduced)) == sorted(
            sorted(content) for content in [*learns, {SCALE} if trained == "bridge" else set()] if content
        )


def test_any_sequence_of_forwards_and_steps_has_the_gradients_of_one_process(ranks: Any) -> None:
    for result in ranks["in turn"]:
        assert result.pop("whole") == [[SCALE]] * 12
        assert len(result) == 10 and {name: found for name, found in result.items() if not found[0] <= 1e-10} == {}
