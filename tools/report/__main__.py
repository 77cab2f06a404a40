"""One HTML page about a run, complete in itself: curves, speed, memory, restarts, checkpoints, data, layout, samples.

    python -m tools.report runs/try1                     # -> runs/try1/report.html; also run=runs/try1 out=report.html

It needs no network and fetches nothing: style, script, curves and clips (with sound) are inside. A run may be looked at
while it trains. What is missing or damaged is said on the page. docs/watching.md shows one.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import MISSING, DictConfig, OmegaConf

from tools.command import run_first, said_in_one_line
from tools.report import charts
from tools.report.charts import make_charts
from tools.report.facts import MOST_EVENTS, Facts, read_facts
from tools.report.history import read_history
from tools.report.timeline import make_timeline
from train.errors import RunError
from train.run_dir import RunDir, write_atomically

HERE = Path(__file__).parent


@dataclass
class ReportConfig:
    """conf/report.yaml. `run`: a run directory; `out`: the page (null: report.html in it). `samples`: so many of the
    newest clips, at most `sample_megabytes` together, which with a few MB for curves bounds the page's size."""

    run: str = MISSING
    out: str | None = None
    samples: int = 12
    sample_megabytes: float = 24.0

    def __post_init__(self) -> None:
        if self.samples < 0 or not 0 <= self.sample_megabytes < math.inf:
            raise ValueError(f"samples={self.samples} sample_megabytes={self.sample_megabytes}: give 0 or more")


def render(run: RunDir, samples: int, sample_bytes: int) -> str:
    """The page. RunError when the folder holds nothing of a run."""
    if not any(path.exists() for path in (run.config, run.metrics, run.status)):
        raise RunError(f"{run.root} is no run: it holds neither config.yaml nor metrics.jsonl; give runs/ID")
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
        described=f"{run.root}, looked at on {time.strftime('%Y-%m-%d at %H:%M')}",
        css=Markup((HERE / "page.css").read_text()), script=Markup((HERE / "page.js").read_text()),
        left=charts.LEFT, top=charts.TOP, plot_width=charts.WIDTH, plot_height=charts.HEIGHT,
        width=charts.LEFT + charts.WIDTH + 12, height=charts.TOP + charts.HEIGHT + charts.BOTTOM,
    )  # fmt: skip


def _tell_missing(facts: Facts, records: int, unreadable: int, not_finite: dict[str, int]) -> None:
    if not records:
        facts.missing.append("metrics.jsonl: no step was recorded, so there are no curves")
    if unreadable:
        facts.missing.append(f"metrics.jsonl: {unreadable:,} lines cannot be read (a run that died left them half)")
    if not_finite:
        what = ", ".join(f"{name} {count:,}" for name, count in sorted(not_finite.items()))
        facts.missing.append(f"values that were not finite, or that no sample of the step had: {what}")


@hydra.main(version_base=None, config_path="pkg://conf", config_name="report")
def _run(config: DictConfig) -> None:
    with said_in_one_line("python -m tools.report runs/ID"):
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, ReportConfig)
        run = RunDir(Path(typed.run))
        page = render(run, typed.samples, round(typed.sample_megabytes * 1e6))
        out = Path(typed.out) if typed.out is not None else run.root / "report.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
        print(f"{out}: {os.path.getsize(out) / 1e6:.1f} MB")


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)
    sys.argv[1:] = run_first(sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
