"""The plan as one HTML page, complete in itself: what fits, where memory and time are, a layer's timeline."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from core.terminal import clock
from tools.plan.text import digits, layout_words, remedy, verdict
from train.plan.plan import GIB, Plan
from train.plan.search import BEST, reason
from train.plan.timing import PART_NAMES, Span

HERE = Path(__file__).parent
COLOURS = (
    "#3b6fb6", "#c9803a", "#4f9d69", "#8a5fae", "#b3584f", "#6b7885", "#2f9c9c", "#a3913c", "#d0799e", "#546a9a",
)  # fmt: skip
STREAMS = {"compute": "#3b6fb6", "gather": "#4f9d69", "reduce": "#c9803a"}
SHORTER = re.compile(r"dual_tower_bridge\.|video_dit\.|_conditioners")  # what labels leave out
WIDTH, BAR, LANE = 1000, 34, 26  # pixels


def render_page(plan: Plan, why: str, plans: Sequence[Plan], change: Plan | None) -> str:
    """The page; arguments as of tools.plan.text.render_text."""
    found, question = plan.as_dict(), plan.question
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    clip = question.clip
    layouts = [
        {
            "words": layout_words(one), "seconds": digits(one.step.seconds), "mfu": f"{one.mfu:.1%}",
            "gib": f"{sum(one.memory.values()) / GIB:.1f}", "reason": reason(one, plans[0]),
        }
        for one in plans[:BEST]
    ]  # fmt: skip
    return environment.get_template("page.html").render(
        title=f"Plan: {question.world:,} x {question.gpu.title}",
        rate=question.rate,
        layout=layout_words(plan),
        fits=plan.fits,
        verdict=verdict(plan),
        change=None if plan.fits else remedy(change),
        moment=plan.peak.when,
        facts=[
            ("seconds a step", digits(plan.step.seconds)), ("MFU", f"{plan.mfu:.1%}"), ("HFU", f"{plan.hfu:.1%}"),
            ("for the run", clock(plan.total_days * 86400)), ("GPU-days", f"{found['gpu_days']:,.0f}"),
            ("clips a day", f"{found['clips_per_day']:,.0f}"),
        ],
        memory=bar({name: size / GIB for name, size in plan.memory.items()}, "GiB", question.gpu.memory_gib),
        step=bar({PART_NAMES.get(name, name): value for name, value in plan.step.parts.items()}, "s"),
        timeline=timeline(plan.step.spans, plan.what["micro_batches"]),
        run=[
            ("clips", f"{clip.frames} frames of {clip.height} x {clip.width} ({why}), {question.steps:,} steps of "
                      f"{question.config.data.batch_size}"),
            *((f"time for {name}", clock(value * 86400)) for name, value in plan.days.items()),
            ("data", f"{found['storage_tb']:,.1f} TB at most, read at {found['read_gb_per_s']['total']:.3g} GB/s"),
            ("encoding before it", f"{found['encoding_gpu_hours']:,.0f} GPU-hours"),
            ("a checkpoint", f"{found['checkpoint_gib']['total']:,.1f} GiB, one every "
                             f"{clock(found['checkpoint_interval_seconds'])}"),
            ("failures", f"one in {clock(found['failure_seconds'])}: {found['goodput']:.1%} of the time trains; "
                         f"a checkpoint every {clock(found['best_interval_seconds'])} would cost the least"),
            ("host memory of a node", f"{found['host_gib']['total']:,.0f} of {question.gpu.host_gib:,.0f} GiB"),
            ("GB sent by a rank a step", ", ".join(f"{axis} {digits(n)}" for axis, n in found["sent_gb"].items())),
        ],
        layouts=layouts,
        assumed=[(name, value) for name, value in dataclasses.asdict(question.assumed).items() if value is not None],
    )  # fmt: skip


def bar(parts: Mapping[str, float], unit: str, limit: float | None = None) -> Markup:
    """One stacked bar with its legend; `limit`: drawn as a line, in the same unit."""
    shown = [(name, value) for name, value in sorted(parts.items(), key=lambda one: -one[1]) if value > 0]
    total = sum(value for _, value in shown)
    scale = WIDTH / max(total, limit or 0.0, 1e-9)
    drawn, legend, x = [], [], 0.0
    for number, (name, value) in enumerate(shown):
        colour, width = COLOURS[number % len(COLOURS)], value * scale
        drawn.append(f'<rect x="{x:.1f}" y="14" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        row, column = divmod(number, 3)
        left, top = column * WIDTH / 3, BAR + 36 + 20 * row
        legend.append(f'<rect x="{left:.0f}" y="{top - 10}" width="11" height="11" fill="{colour}"/>')
        legend.append(f'<text x="{left + 17:.0f}" y="{top}">{escape(name)}: {value:.3g} {unit}</text>')
        x += width
    if limit is not None:
        at = min(limit * scale, WIDTH - 1)
        drawn.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{BAR + 20}" stroke="#1c2430" stroke-width="2"/>')
        drawn.append(f'<text x="{at - 4:.1f}" y="11" text-anchor="end">{limit:g} {unit} of a GPU</text>')
    height = BAR + 40 + 20 * -(-len(shown) // 3)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{"".join(drawn + legend)}</svg>')


def timeline(spans: Sequence[Span], micro_batches: int) -> Markup:
    """The streams while the middle two video blocks compute, in forward and in backward of the last micro-batch."""
    blocks = [span for span in spans if span.stream == "compute" and span.name.startswith("video_dit.blocks.")]
    layers = len({span.name for span in blocks})
    if layers < 3:
        return Markup("<p>The model has too few layers for this picture.</p>")
    last = blocks[-(len(blocks) // micro_batches) :]
    pictures = []
    for title, part in (("forward", last[:layers]), ("backward", last[layers:])):
        if len(part) >= 3:  # what is frozen has no backward
            middle = len(part) // 2
            pictures.append(_lanes(title, spans, part[middle - 1].start, part[middle + 1].start))
    return Markup("").join(pictures)


def _lanes(title: str, spans: Sequence[Span], start: float, end: float) -> Markup:
    scale = (WIDTH - 90) / (end - start)
    drawn = [f'<text x="0" y="12">{title}, {1e3 * (end - start):.3g} ms</text>']
    for lane, (stream, colour) in enumerate(STREAMS.items()):
        top = 20 + lane * (LANE + 4)
        drawn.append(f'<text x="0" y="{top + 17}">{stream}</text>')
        for span in spans:
            if span.stream == stream and span.end > start and span.start < end:
                left, right = max(span.start, start), min(span.end, end)
                x, width = 90 + (left - start) * scale, max((right - left) * scale - 1, 0.5)
                label = SHORTER.sub("", span.name)
                drawn.append(
                    f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{LANE}" fill="{colour}">'
                    f"<title>{escape(span.name)}: {1e3 * (span.end - span.start):.3g} ms</title></rect>"
                )
                if width > 7 * len(label):
                    drawn.append(f'<text x="{x + 4:.1f}" y="{top + 17}" fill="#fff">{escape(label)}</text>')
    height = 24 + len(STREAMS) * (LANE + 4)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{"".join(drawn)}</svg><br>')
