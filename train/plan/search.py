"""Layouts of the same run beside each other: which fit, which is the fastest, and why the others are slower.

In two rounds. The first tries how many ranks share a clip, how many hold a copy of the model, and what backward
computes again; what a unit does depends on the first of these alone, so few counts serve many layouts. The second
varies the best of them: recomputation fitted to the memory that is left, more clips in a micro-batch, gradients summed
whole; and, where nothing fits, moments on the host.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from core.errors import RunError
from core.terminal import clock
from train.parallel.mesh import ParallelConfig
from train.parallel.workload import Workload
from train.plan.count import Counts, count_step
from train.plan.plan import GIB, Key, KnownCounts, Plan, key_of, plan_run, resolved
from train.plan.question import Question
from train.plan.timing import PART_NAMES

KINDS = ("none", "selective", "attention", "full")
COUNTED = (*KINDS, "outputs")  # which a budget may choose; alone it is no candidate
RINGS = (1, 2, 4)
BEST = 10  # layouts that are shown
VARIED = 3  # of the fastest layouts, those that the second round varies
FITS = 2  # times that a budget is raised by what its plan leaves over
ROOM_GIB = 2.0  # less memory is not worth a budget of its own

Progress = Callable[[str], None]


def search(
    question: Question, counted: KnownCounts, processes: int = 2, progress: Progress = lambda _: None
) -> list[Plan]:
    """Plans of all layouts that this many GPUs allow, those that fit first, the fastest first."""
    asked = [with_layout(question, layout) for layout in candidates(question)]
    plans = _round(asked, KINDS, counted, processes, progress, "layouts")
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        more = [one for plan in fitting[:VARIED] for one in variations(plan)]
    else:
        more = [_changed(plan.question, optimizer_state="host") for plan in plans if plan.layout["recompute"] == "full"]
    kinds = {plan.layout["recompute"] for plan in fitting[:VARIED]} or {"full"}
    varied = _round(more, kinds | {"outputs"}, counted, processes, progress, "variations")
    for _ in range(FITS):
        again = [one for plan in varied if (one := with_budget(plan)) and plan.layout["recompute"] == "budget"]
        plans, varied = [*plans, *varied], _round(again, (), counted, processes, progress, "budgets")
    plans = sorted([*plans, *varied], key=_order)
    progress(f"{len(plans)} layouts, {sum(plan.fits for plan in plans)} of them fit")
    return plans


def _order(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.step.seconds if plan.fits else sum(plan.memory.values())


def candidates(question: Question) -> Iterator[ParallelConfig]:
    """Layouts to try: how many ranks share a clip, hold a copy of the model, and what is computed again."""
    given, world = question.config.parallel, question.world
    heads, node = question.config.model.video.num_heads, min(question.gpu.node_gpus, question.per_node)
    for ulysses in _powers(min(node, heads)):
        for ring in RINGS:
            shared = ulysses * ring
            if world % shared or world // shared > question.config.data.batch_size:
                continue
            for shards in _powers(world):
                if world % shards or shards % shared or shards < min(world, node):
                    continue
                for kind in KINDS:
                    if kind == "selective" and ulysses == 1:
                        continue  # nothing is exchanged: the same as "attention"
                    yield dataclasses.replace(
                        given, engine="fsdp2", dp_replicate=world // shards, dp_shard=-1, ring=ring, ulysses=ulysses,
                        recompute=kind, recompute_gib=None,
                    )  # fmt: skip


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    found = [2**n for n in range(most.bit_length()) if 2**n < most]
    return [*found, most]


def variations(plan: Plan) -> Iterator[Question]:
    """The layout of a plan that fits, changed a little."""
    question = plan.question
    if plan.layout["recompute"] != "none" and (fitted := with_budget(plan)):
        yield fitted
    if plan.what["micro_batches"] > 1:
        data = question.config.data
        yield dataclasses.replace(
            question,
            config=dataclasses.replace(
                question.config, data=dataclasses.replace(data, micro_batch=2 * data.micro_batch)
            ),
        )
        yield _changed(question, accumulate="unsharded")


def with_budget(plan: Plan) -> Question | None:
    """Its layout with less recomputation, by what it leaves of the memory; None where that is little. A run reckons
    with the kernels of a CPU, which keep more than those of a GPU, so that a budget may be raised once more."""
    left = plan.question.gpu.memory_gib - sum(plan.memory.values()) / GIB
    if left < ROOM_GIB:
        return None
    kept = plan.layout["recompute_gib"] or plan.what["kept_gib"]
    budget = round(kept + left / (1 + plan.question.assumed.slack) - ROOM_GIB / 2, 1)
    return _changed(plan.question, recompute="budget", recompute_gib=budget)


def with_layout(question: Question, layout: ParallelConfig) -> Question:
    """The question of another layout."""
    return dataclasses.replace(question, config=dataclasses.replace(question.config, parallel=layout))


def _changed(question: Question, **settings: Any) -> Question:
    return with_layout(question, dataclasses.replace(question.config.parallel, **settings))


def _round(
    asked: Iterable[Question],
    kinds: Collection[str],
    counted: KnownCounts,
    processes: int,
    progress: Progress,
    what: str,
) -> list[Plan]:
    """Plans, after counting what they need in some processes side by side."""
    asked = [*asked]
    count_all(asked, kinds, counted, processes, progress)
    plans, told = [], time.monotonic()
    for number, one in enumerate(asked):
        try:
            plans.append(plan_run(one, counted))
        except RunError:
            continue  # degrees that do not divide, a batch that is too small
        if time.monotonic() - told > 3:
            told = time.monotonic()
            progress(f"planned {number + 1} of {len(asked)} {what}")
    return sorted(plans, key=_order)


def count_all(
    asked: list[Question], kinds: Collection[str], counted: KnownCounts, processes: int, progress: Progress
) -> None:
    """Count the units of all these layouts with these kinds of checkpointing, in some processes side by side."""
    wanted: dict[Key, tuple[Question, ParallelConfig]] = {}
    for question in asked:
        layout = resolved(question.config.parallel, question.on_gpus)
        slots = -(-question.config.data.batch_size // (question.world // (layout.ring * layout.ulysses)))
        clips = min(question.config.data.micro_batch, slots)
        workload = Workload(clips, question.clip.grid, question.clip.audio_steps)
        wanted[key_of(layout, workload, question.on_gpus)] = question, layout
    work = []
    for key, (question, layout) in wanted.items():
        if missing := [kind for kind in COUNTED if kind in kinds and kind not in counted.known.get(key, {})]:
            work.append((key, (question.config.model, layout, key[3], missing, key[4])))
    work.sort(key=lambda one: one[0][:2], reverse=True)  # long rings take the longest
    if processes < 2 or len(work) < 3:
        _take(len(work), ((key, count_step(*one)) for key, one in work), counted, progress)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them: this process ends the others
    with multiprocessing.get_context("spawn").Pool(min(processes, len(work)), signal.signal, ignore) as pool:
        _take(len(work), pool.imap_unordered(_count, work), counted, progress)


def _count(work: tuple[Key, tuple[Any, ...]]) -> tuple[Key, dict[str, Counts]]:
    key, arguments = work
    return key, count_step(*arguments)


def _take(
    number: int, found: Iterable[tuple[Key, dict[str, Counts]]], counted: KnownCounts, progress: Progress
) -> None:
    begin = time.monotonic()
    for done, (key, counts) in enumerate(found, start=1):
        counted.known.setdefault(key, {}).update(counts)
        left = (time.monotonic() - begin) / done * (number - done)
        words = f", about {clock(left)} left" if done < number else ""
        progress(f"counted {done} of {number} ways to share a clip{words}")


def cheapest_change(plans: list[Plan]) -> Plan | None:
    """Of the plans of a search, the fastest that fits."""
    return plans[0] if plans and plans[0].fits else None


def reason(plan: Plan, best: Plan) -> str:
    """Why a layout is not the best one: what it lacks, or where its time goes."""
    if not plan.fits:
        over = sum(plan.memory.values()) / GIB - plan.question.gpu.memory_gib
        largest = max(plan.peak.parts, key=lambda part: plan.peak.parts[part])
        return f"does not fit: {over:.1f} GiB too much, {largest} {plan.peak.parts[largest] / GIB:.1f} GiB"
    if plan is best:
        return "the fastest that fits"
    more = {part: seconds - best.step.parts.get(part, 0.0) for part, seconds in plan.step.parts.items()}
    part = max(more, key=lambda name: more[name])
    slower = plan.step.seconds / best.step.seconds - 1
    if plan.step.host > plan.step.device:
        return f"{slower:.0%} slower: the host issues kernels for {plan.step.host:.2f} s"
    return f"{slower:.0%} slower: {more[part]:.2f} s more of {PART_NAMES.get(part, part)}"


def row(plan: Plan, best: Plan) -> dict[str, Any]:
    """One layout for plan.json."""
    return {
        **{key: value for key, value in plan.layout.items() if key != "units"},
        "fits": plan.fits,
        "peak_gib": sum(plan.memory.values()) / GIB,
        "step_seconds": plan.step.seconds,
        "mfu": plan.mfu,
        "days": plan.total_days,
        "reason": reason(plan, best),
    }
