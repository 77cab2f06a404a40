"""report.html of a dataset, in one self-contained file: hours in and out, filters, histograms, samples, and more."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.durable import write_atomically
from data.windows.filter import Filter, rule_name
from data.windows.table import SCORES, batches, read_columns, score_columns

REPORT = "report.html"
BINS = 40
SAMPLES = 12  # windows shown of each kind
MOST_REJECTED = 20_000  # lines of the table of rejections; the rest stand in rejected.jsonl

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #64707d; --line: #dfe4ea;
  --all: #c3ccd6; --kept: #2f6fab; --cut: #c8452f; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p.note, figcaption, .small { color: var(--soft); font-size: .85rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.45rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; font-weight: 600; } th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 30%; } .fill { background: var(--kept); height: .7rem; border-radius: 2px; margin-top: .35rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.2rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 160px; border-radius: 4px; display: block; background: #eee; }
figcaption { overflow-wrap: anywhere; line-height: 1.3; margin-top: .2rem; }
.why { color: var(--cut); } details > div { max-height: 30rem; overflow: auto; }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
"""


def write_report(
    root: Path, summary: Mapping[str, Any], rules: Filter, thumbnails: Sequence[Mapping[str, Any]]
) -> None:
    """Write root/report.html from root/scores.parquet, root/rejected.jsonl and what is given."""
    names = score_columns(root / SCORES)
    parts = [
        _head(summary),
        _stages(summary),
        _filters(rules, root / SCORES),
        _histograms(rules, root / SCORES, names),
        _samples("Samples that were kept", [one for one in thumbnails if one["stored"]]),
        _samples("Samples that were not kept", [one for one in thumbnails if not one["stored"]]),
        _rejections(root, summary),
        _listing(summary),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation report</title><style>{STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    write_atomically(root / REPORT, page)


def _head(summary: Mapping[str, Any]) -> str:
    into, out = summary["source_seconds"], summary["seconds"]
    share = f"{100 * out / into:.1f} %" if into else "-"
    tiles = [
        ("in", _hours(into)), ("out", _hours(out)), ("kept of the time", share),
        ("files kept", f"{summary['kept']:,} of {summary['files']:,}"),
        ("windows kept", f"{summary['windows']:,} of {summary['windows_seen']:,}"),
        ("in no window", _hours(summary["rest_seconds"])),
    ]  # fmt: skip
    shown = "".join(f'<div class="tile"><b>{value}</b><span class="small">{name}</span></div>' for name, value in tiles)
    buckets = "".join(
        f'<tr><td>{_text(one["part"])}</td><td>{_text(one["bucket"])}</td><td class="n">{one["samples"]:,}</td></tr>'
        for one in summary["buckets"]
    )
    return (
        f'<h1>Curation report</h1><p class="note">Files that could not be opened have no length and are not counted in '
        f'“in”. Other thresholds: mova refilter.</p><div class="tiles">{shown}</div>'
        f'<h2>Buckets</h2><table><tr><th>part</th><th>latent geometry</th><th class="n">samples</th></tr>'
        f"{buckets}</table>"
    )


def _stages(summary: Mapping[str, Any]) -> str:
    cpu = sorted(summary["cpu_seconds"].items(), key=lambda item: -item[1])
    total = sum(seconds for _, seconds in cpu) or 1.0
    rows = [(name, f"{seconds:.1f} s", seconds / total, f"{100 * seconds / total:.1f} %") for name, seconds in cpu]
    return "<h2>Processor time by stage</h2>" + _bars(("stage", "time", "share"), rows)


def _filters(rules: Filter, path: Path) -> str:
    if not rules.rules:
        return '<h2>Filters</h2><p class="note">No filter was set.</p>'
    count, alone, left, unmeasured = _count_passed(rules, path)
    rows = [
        (
            rule_name(rule),
            f"{100 * alone[number] / max(1, count):.1f} %",
            alone[number] / max(1, count),
            f"{100 * left[number] / max(1, count):.1f} %",
            f"{unmeasured[number]:,}",
        )
        for number, rule in enumerate(rules.rules)
    ]
    skipped = f" Skipped, since nothing brought the score: {_text(', '.join(rules.skipped))}." if rules.skipped else ""
    policy = {"reject": "fails", "keep": "passes"}[rules.config.missing]
    return (
        f'<h2>Kept by filter</h2><p class="note">Of {count:,} windows that could be decoded. One whose score could '
        f"not be measured {policy}.{skipped}</p>"
        + _bars(("filter", "passes alone", "left after it and those above", "not measured"), rows)
    )


def _count_passed(rules: Filter, path: Path) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Windows that could be decoded; of these, by rule: that pass it, that pass it and those above, not measured."""
    count = 0
    alone, left, unmeasured = (np.zeros(len(rules.rules), np.int64) for _ in range(3))
    for table in batches(path, [*sorted(rules.scores()), "reason"]):
        usable = table["reason"] == ""
        count += int(usable.sum())
        passing = usable.copy()
        for number, rule in enumerate(rules.rules):
            passed = rules.passes(rule, table)
            passing &= passed
            alone[number] += int((passed & usable).sum())
            left[number] += int(passing.sum())
            missing = np.all([np.isnan(table[score]) for term in rule for score in term], axis=0)
            unmeasured[number] += int((usable & missing).sum())
    return count, alone, left, unmeasured


def _histograms(rules: Filter, path: Path, names: Sequence[str]) -> str:
    bounds: dict[str, list[float]] = {}
    for rule in rules.rules:
        for score, pair in ((score, pair) for term in rule for score, pair in term.items()):
            bounds.setdefault(score, []).extend(value for value in pair if math.isfinite(value))
    if not names:
        return '<h2>Scores</h2><p class="note">No score was measured (scores=[...]).</p>'
    stored = read_columns(path, ["stored"])["stored"].astype(bool)
    figures = [
        histogram(name, read_columns(path, [name])[name], stored, bounds.get(name, []))  # one at a time: they are long
        for name in names
    ]
    return (
        '<h2>Scores</h2><p class="note">Grey: all windows; blue: those in the shards; red: thresholds.</p>'
        f'<div class="grid">{"".join(figures)}</div>'
    )


def histogram(name: str, values: np.ndarray, stored: np.ndarray, bounds: Sequence[float]) -> str:
    """A figure: bars of all values and of those that are stored, a line at each bound."""
    finite = np.isfinite(values)
    caption = f"<figcaption>{_text(name)}, {int(finite.sum()):,} measured"
    if not finite.any():
        return f"<figure>{caption}</figcaption></figure>"
    low, high = float(values[finite].min()), float(values[finite].max())
    low, high = min([low, *bounds]), max([high, *bounds])
    if high == low:
        low, high = low - 0.5, high + 0.5
    every, edges = np.histogram(values[finite], BINS, (low, high))
    kept, _ = np.histogram(values[finite & stored], BINS, (low, high))
    width, height, top = 320, 110, max(1, int(every.max()))
    bars = "".join(
        f'<rect x="{width * i / BINS:.1f}" y="{height - height * n / top:.1f}" width="{width / BINS - 1:.1f}" '
        f'height="{height * n / top:.1f}" fill="var({colour})"/>'
        for numbers, colour in ((every, "--all"), (kept, "--kept"))
        for i, n in enumerate(numbers.tolist())
        if n
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--cut)" stroke-width="1.5" '
        f'stroke-dasharray="4 3"/>'
        for x in (min(width - 1.0, max(1.0, width * (bound - low) / (high - low))) for bound in bounds)
    )
    limits = f", threshold {', '.join(f'{bound:g}' for bound in bounds)}" if bounds else ""
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 16}" width="100%" role="img" aria-label="{_text(name)}">'
        f'{bars}{lines}<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="var(--line)"/>'
        f'<text x="0" y="{height + 12}">{low:.4g}</text><text x="{width}" y="{height + 12}" text-anchor="end">'
        f"{high:.4g}</text></svg>{caption}, median {float(np.median(values[finite])):.4g}{limits}</figcaption></figure>"
    )


def _samples(title: str, thumbnails: Sequence[Mapping[str, Any]]) -> str:
    chosen = sorted(thumbnails, key=lambda one: one["key"])[:SAMPLES]
    if not chosen:
        return f'<h2>{title}</h2><p class="note">None.</p>'
    return f'<h2>{title}</h2><div class="clips">{"".join(map(_clip, chosen))}</div>'


def _clip(one: Mapping[str, Any]) -> str:
    picture = (
        f'<img alt="" src="data:image/jpeg;base64,{one["jpeg"]}">' if one["jpeg"] else '<p class="small">no picture</p>'
    )
    sound = '<p class="small">no sound</p>'
    if peaks := one["peaks"]:
        step = 160 / len(peaks)
        path = "".join(f"M{i * step:.1f} {16 - 15 * peak:.1f}V{16 + 15 * peak:.1f}" for i, peak in enumerate(peaks))
        sound = f'<svg viewBox="0 0 160 32" width="160"><path d="{path}" stroke="var(--kept)" fill="none"/></svg>'
    scores = ", ".join(f"{name} {value:.3g}" for name, value in sorted(one["scores"].items()))
    why = f'<br><span class="why">{_text(one["why"])}</span>' if one["why"] else ""
    return (
        f'<figure title="{_text(scores)}">{picture}{sound}<figcaption>{_text(one["source"])} at {one["start"]:.2f} s'
        f"{why}<details><summary>scores</summary>{_text(scores)}</details></figcaption></figure>"
    )


def _rejections(root: Path, summary: Mapping[str, Any]) -> str:
    reasons = "".join(
        f'<tr><td>{_text(reason)}</td><td class="n">{count:,}</td>'
        f"<td>{_text(', '.join(summary['rejected_examples'][reason]))}</td></tr>"
        for reason, count in list(summary["rejected"].items())[:50]
    )
    with open(root / "rejected.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line, _ in zip(file, range(MOST_REJECTED))]
    rows = "".join(
        f"<tr><td>{_text(line['source'])}</td><td class='n'>"
        f"{'file' if line['start'] is None else format(line['start'], '.2f')}</td><td>{_text(line['reason'])}</td></tr>"
        for line in lines
    )
    more = " (the first ones; all are in rejected.jsonl)" if len(lines) == MOST_REJECTED else ""
    return (
        '<h2>Rejected files by reason</h2><table><tr><th>reason</th><th class="n">files</th><th>first of them</th></tr>'
        f"{reasons}</table>"
        f"<h2>Every rejection</h2><details open><summary>{len(lines):,} files and windows{more}</summary><div><table>"
        f'<tr><th>file</th><th class="n">window at</th><th>reason</th></tr>{rows}</table></div></details>'
    )


def _listing(summary: Mapping[str, Any]) -> str:
    noticed = {
        "segments without caption": summary["without_caption"],
        "segments with several captions, of which the first counts": summary["several_captions"],
        **{f"not tried: {kind}": entry for kind, entry in summary["beside"].items()},
    }
    rows = "".join(
        f'<tr><td>{_text(kind)}</td><td class="n">{one["count"]:,}</td><td>{_text(", ".join(one["first"]))}</td></tr>'
        for kind, one in noticed.items()
    )
    head = '<tr><th>what</th><th class="n">how many</th><th>the first of them</th></tr>'
    return f"<h2>Content of the sources</h2><table>{head}{rows}</table>"


def _bars(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; each row: name, number, share of a bar (0 to 1), more numbers."""
    head = f'<tr><th>{titles[0]}</th><th class="n">{titles[1]}</th><th></th>' + "".join(
        f'<th class="n">{title}</th>' for title in titles[2:]
    )
    body = "".join(
        f'<tr><td>{_text(name)}</td><td class="n">{number}</td><td class="bar"><div class="fill" '
        f'style="width:{100 * share:.1f}%"></div></td>' + "".join(f'<td class="n">{one}</td>' for one in more) + "</tr>"
        for name, number, share, *more in rows
    )
    return f"<table>{head}</tr>{body}</table>"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.1f} s"


def _text(value: Any) -> str:
    return html.escape(str(value))
