"""What chance decided in a real run: the draws that reach the training step on every rank."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tests.train import runs
from tests.train.planted import planted
from train import loop

Record = list[dict[int, dict[str, torch.Tensor]]]  # a step: sample number -> its draws


def record(root: Path, data: Path, run_id: str, *overrides: str, fault: str | None = None) -> Record:
    """A run through `train.loop.run`; returns what this rank's steps were given."""
    steps: Record = []
    right = loop.forward_backward

    def watched(model: Any, micro_batches: Any, *rest: Any) -> Any:
        seen = {}
        for prepared in micro_batches:
            for row, number in enumerate(prepared.batch.sample_numbers.tolist()):
                draws = prepared.draws
                seen[number] = {f.name: getattr(draws, f.name)[row].clone() for f in fields(draws)}
        steps.append(seen)
        return right(model, micro_batches, *rest)

    loop.forward_backward = watched  # type: ignore[assignment]
    try:
        with planted(fault) if fault else nullcontext():
            ended = runs.train(root, data, run_id, *overrides)
        assert ended.get("ending") == "finished", ended
    finally:
        loop.forward_backward = right  # type: ignore[assignment]
    return steps


def disagreements(ranks: list[Record], group: int) -> set[str]:
    """What is wrong in a run whose neighbours, `group` ranks each, share their samples. Empty when all is well."""
    wrong = set()
    leaders = ranks[::group]
    for rank, mine in enumerate(ranks):
        for step, (found, expected) in enumerate(zip(mine, ranks[rank // group * group], strict=True)):
            if found.keys() != expected.keys():
                wrong.add(f"step {step}: a group's ranks have different samples")
            elif not all(same(found[number], expected[number]) for number in found):
                wrong.add("a group's ranks have different draws")
    for step in range(len(ranks[0])):
        numbers = [number for leader in leaders for number in leader[step]]
        if len(numbers) != len(set(numbers)):
            wrong.add(f"step {step}: two data ranks have the same sample")
    noises: dict[bytes, int] = {}
    for leader in leaders:
        for step_draws in leader:
            for number, draws in step_draws.items():
                for name in ("noise_video", "noise_audio"):
                    if noises.setdefault(draws[name].numpy().tobytes(), number) != number:
                        wrong.add("two samples share noise")
    return wrong


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether two samples' draws are equal to the last bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def by_sample(ranks: list[Record]) -> dict[int, dict[str, torch.Tensor]]:
    """The draws of every sample of a run, wherever it was taken."""
    return {number: draws for rank in ranks for step in rank for number, draws in step.items()}
