"""Write a self-contained HTML page about a run: curves, speed, memory, restarts, checkpoints, data, layout, samples.

    mova report runs/try1                     # -> runs/try1/report.html; also run=runs/try1 out=report.html

It needs no network and fetches nothing: style, script, curves and clips (with sound) are inside. The run may still
be training. The page lists what is missing or damaged. docs/watching.md shows one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import MISSING

from core.compose import Schema
from core.durable import write_atomically
from core.errors import RunError
from core.program import Call, Program
from core.ranges import bounded
from core.run_dir import RunDir
from tools.report import charts
from tools.report.charts import make_charts
from tools.report.facts import MOST_EVENTS, Facts, read_facts
from tools.report.history import read_history
from tools.report.timeline import make_timeline

HERE = Path(__file__).parent


@dataclass
class ReportConfig:
    """The run, and limits on the page's size.

    run: a run directory; `run=` may be omitted for the first argument
    out: file of the page (null: report.html in the run directory)
    samples: number of clips on the page, the newest ones
    sample_megabytes: their largest total size in MB, which with a few MB for curves bounds the page's size
    """

    run: str = MISSING
    out: str | None = None
    samples: int = bounded(12, "[0, inf)")
    sample_megabytes: float = bounded(24.0, "[0, inf)")


def render(run: RunDir, samples: int, sample_bytes: int) -> str:
    """The page. RunError if the folder holds nothing of a run."""
    if not any(path.exists() for path in (run.config, run.metrics, run.status)):
        raise RunError(f"{run.root} is not a run: it has neither config.yaml nor metrics.jsonl; give runs/ID")
    history = read_history(run.metrics)
    facts = read_facts(run, history.done, samples, sample_bytes)
    _tell_missing(facts, history.records, history.unreadable, dict(history.not_finite))
    drawn = make_charts(history, facts.resumed)
    parts = {
        "Samples": facts.clips, **drawn, "Events": facts.events or facts.attempts, "Checkpoints": facts.checkpoints,
        "Data": facts.datasets, "Layout": facts.layout, "Config": facts.config, "Missing": facts.missing,
    }  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clock_time"] = lambda when: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    return environment.get_template("page.html").render(
        facts=facts, charts=drawn, timeline=make_timeline(facts), most_events=MOST_EVENTS,
        sections=[name for name, part in parts.items() if part],
        thinned=any(curve.thinned for curve in history.curves.values()),
        described=f"{run.root}, as of {time.strftime('%Y-%m-%d at %H:%M')}",
        css=Markup((HERE / "page.css").read_text()), script=Markup((HERE / "page.js").read_text()),
        left=charts.LEFT, top=charts.TOP, plot_width=charts.WIDTH, plot_height=charts.HEIGHT,
        width=charts.LEFT + charts.WIDTH + 12, height=charts.TOP + charts.HEIGHT + charts.BOTTOM,
    )  # fmt: skip


def _tell_missing(facts: Facts, records: int, unreadable: int, not_finite: dict[str, int]) -> None:
    if not records:
        facts.missing.append("metrics.jsonl: no step was recorded, so there are no curves")
    if unreadable:
        facts.missing.append(f"metrics.jsonl: {unreadable:,} lines cannot be read (truncated when the run died)")
    if not_finite:
        what = ", ".join(f"{name} {count:,}" for name, count in sorted(not_finite.items()))
        facts.missing.append(f"values that were not finite, or that no sample of the step had: {what}")


def _run(call: Call[ReportConfig]) -> None:
    config = call.config
    run = RunDir(Path(config.run))
    page = render(run, config.samples, round(config.sample_megabytes * 1e6))
    out = Path(config.out) if config.out is not None else run.root / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    print(f"{out}: {os.path.getsize(out) / 1e6:.1f} MB")


PROGRAM = Program("report", __doc__, _run, schema=Schema("report", ReportConfig, ()), first="run")

if __name__ == "__main__":
    PROGRAM.start()
