"""mova report: one page, whole without a network, of runs that are well, broken, long or unfriendly."""

import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from core.errors import RunError
from core.run_dir import RunDir
from tools.report.__main__ import render
from tools.report.charts import make_charts, smooth, ticks
from tools.report.facts import busy_seconds, read_facts
from tools.report.history import WIDTH, read_history
from tools.report.timeline import make_timeline
from train.monitor.samples import SampleRecord, add_samples, held_out_file

NASTY = "</script><script>alert(1)</script>&\"'{{ 7*7 }}"
NOW = 1_790_000_000.0


def stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(when))


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(root: Path, steps: int = 100) -> RunDir:
    """A run that was killed once, with a spike of one step, nulls, and clips."""
    root.mkdir(parents=True)
    run = RunDir(root)
    config = {"steps": steps, "data": {"path": str(root / NASTY), "datasets": []}, "parallel": {"engine": "fsdp2"}}
    run.config.write_text(yaml.safe_dump(config | {"note": NASTY}))
    run.write_status("failed", error=NASTY)
    run.layout.write_text(json.dumps({"ranks": "8 on cuda", "video tokens": NASTY}))
    lines = [{"step": 0, "valid/loss": 3.0, "valid/video": 2.0}]
    for step in range(steps):
        expert = ("high", "low")[step % 2]
        lines.append({
            "step": step, "train/loss": 2.0, "train/loss_video": 1.0 + 499 * (step == 37), "train/loss_audio": 1.0,
            f"train/loss_video_{expert}": 1.0 + 499 * (step == 37),
            f"train/loss_audio_{expert}": None if step == 5 else 1.0, "train/expert": expert,
            "train/grad_norm_bridge": 0.5, "perf/tokens_per_s": 10.0, "data/epoch": step / 10, "train/word": NASTY,
            f"train/{NASTY}": 1.0, "stray": 4.0,
        })  # fmt: skip
    lines.append({"step": steps, "valid/loss": 1.0, "valid/video": 0.5})
    write_lines(run.metrics, lines)
    with open(run.metrics, "a") as file:
        file.write('{"step": 7, "train/lo')
    write_lines(root / "events.jsonl", [
        {"time": stamp(NOW + 50), "event": "checkpoint", "step": 20, "bytes": 7},
        {"time": stamp(NOW + 200), "event": "resumed", "step": 20, "checkpoint": NASTY},
    ])  # fmt: skip
    write_lines(root / "attempts.jsonl", [
        {"event": "submitted", "time": NOW},
        {"event": "begin", "time": NOW, "job": "1", "restart": 0, "nodes": NASTY, "step": 0},
        {"event": "begin", "time": NOW + 150, "job": "1", "restart": 1, "nodes": "b", "step": 20},
        {"event": "end", "time": NOW + 400, "job": "1", "restart": 1, "ended": "crashed", "status": 75, "step": 20},
    ])  # fmt: skip
    for step in (10, 20):
        for name in ("a", "b"):
            (root / f"samples/step-{step:08d}").mkdir(parents=True, exist_ok=True)
            (root / f"samples/step-{step:08d}/{name}.mp4").write_bytes(bytes([step]) * 3000)
            add_samples(
                root,
                [SampleRecord(step, f"step-{step:08d}/{name}.mp4", "image", NASTY, 0, "key", {}, 1.0, {"f1": 0.5})],
            )
    held_out_file(root, "key").parent.mkdir()
    held_out_file(root, "key").write_bytes(b"held out")
    return run


class Page(HTMLParser):
    """Scripts, addresses, and whether each element is closed in its place."""

    VOID = {"meta"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "poster")]
        self.addresses += [value for name, value in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts.append(text)


def test_the_page_is_whole_in_itself_and_nothing_in_it_is_obeyed(tmp_path):
    page = render(make_run(tmp_path / "run"), 12, 10**7)
    parsed = Page(page)
    assert parsed.addresses and all(one.startswith(("data:video/mp4;base64,", "#")) for one in parsed.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "alert(1)</script>" not in page and "{{ 7*7 }}" in page
    *data, script = parsed.scripts
    assert "pointermove" in script and all(json.loads(one)["lines"] for one in data)  # JSON stays JSON


def test_what_is_there_is_shown_and_what_is_missing_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    facts = read_facts(run, 100, 12, 10**7)
    tiles = dict(facts.tiles)
    assert (tiles["state"], tiles["step"], tiles["restarts"]) == ("failed", "100 of 100", "1")
    assert facts.resumed == [20] and [one.ended for one in facts.attempts] == ["killed", "crashed"]
    assert busy_seconds(facts.attempts) == 400.0
    page = render(run, 12, 10**7)
    for word in ("1 lines cannot be read", "train/loss_audio_low 1", "checkpoints: none yet",
                 "does not exist", "100 of 100", "f1 <b>0.5</b>", "8 on cuda", "held out: what was given"):  # fmt: skip
        assert word in page, word


PIECES = ["config.yaml", "metrics.jsonl", "events.jsonl", "attempts.jsonl", "status.json", "layout.json"]


@pytest.mark.parametrize("gone", [*PIECES, "samples"])
def test_a_run_without_one_piece_is_shown_all_the_same(tmp_path, gone):
    run = make_run(tmp_path / "run")
    path = run.root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = render(run, 12, 10**7)
    Page(page)
    assert gone.split(".")[0] in page.split("Missing from this page")[1]


def test_damaged_pieces_are_said(tmp_path):
    run = make_run(tmp_path / "run")
    for name in PIECES:
        (run.root / name).write_bytes(b"\xff\xfe{[: 7\n[1]\n7\n")
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    (run.checkpoints / "step-00000020" / "COMMITTED").write_text("{")
    Page(render(run, 12, 10**7))


def test_checkpoints_are_listed_with_what_the_newest_says(tmp_path):
    run = make_run(tmp_path / "run")
    for step in (10, 20):
        path = run.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        state = {"layout": "2 ranks", "torch": "2.11", "data": {"quarantine": [1, 2]}}
        (path / "state.json").write_text(json.dumps(state))
        (path / "COMMITTED").write_text(json.dumps({"files": {"gone": {"bytes": 1, "crc32": 0}} if step == 10 else {}}))
    page = render(run, 0, 0)
    for word in ("2 samples in quarantine", "2 ranks; torch 2.11", "its file gone has None bytes"):
        assert page.count(word) == 1, word


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        render(RunDir(tmp_path), 12, 10**7)


def test_millions_of_steps_become_pixels_and_no_spike_is_lost(tmp_path):
    values = np.random.default_rng(0).normal(1.0, 0.1, 60_000)
    values[41_234], values[50_000] = 9.0, -3.0
    write_lines(tmp_path / "metrics.jsonl", [{"step": i, "train/grad_norm": v} for i, v in enumerate(values)])
    history = read_history(tmp_path / "metrics.jsonl")
    curve = history.curves["train/grad_norm"]
    assert len(curve.steps) == WIDTH and curve.count == 60_000 and history.steps == history.done == 60_000
    assert curve.high.max() == 9.0 and curve.low.min() == -3.0
    at = int(np.argmax(curve.high))
    assert abs(curve.steps[at] - 41_234) < 60_000 / WIDTH
    edges = np.searchsorted(np.arange(60_000) * WIDTH // 60_000, [at, at + 1])
    assert curve.mean[at] == pytest.approx(values[slice(*edges)].mean())
    ((chart,),) = make_charts(history, []).values()
    assert len(json.dumps(chart.data)) + len(chart.lines[0].path) < 120_000


def test_short_runs_are_drawn_value_by_value_by_expert(tmp_path):
    run = make_run(tmp_path / "run")
    curves = read_history(run.metrics).curves
    assert curves["train/loss_video_low"].steps.tolist() == list(range(1, 100, 2))
    assert curves["train/loss_video_low"].high.max() == 500.0
    assert curves["train/loss_audio_low"].count == 49 and "train/word" not in curves
    charts = make_charts(read_history(run.metrics), [20])
    drawn = [line.name for section in charts.values() for chart in section for line in chart.lines]
    assert sorted(drawn) == sorted(curves)  # each curve once, also one that no chart asks for
    video = next(chart for chart in charts["Losses"] if chart.title == "Video")
    assert [line.name for line in video.lines] == ["train/loss_video_high", "train/loss_video_low", "valid/video"]
    assert [line.colour for line in video.lines] == [0, 1, 2] and len(video.marks) == 1


def test_the_newest_clips_are_shown_within_the_limit(tmp_path):
    run = make_run(tmp_path / "run")
    for most, room, names in ((3, 10**6, ["20/a", "20/b", "10/b"]), (12, 8200, ["20/a", "20/b"]), (0, 10**6, [])):
        facts = read_facts(run, 100, most, room)
        assert [f"{one.step}/{one.name[-5]}" for one in facts.clips] == names
        assert facts.clips_left_out == 4 - len(names)


def test_the_time_axis_shows_a_killed_attempt_up_to_its_last_word(tmp_path):
    timeline = make_timeline(read_facts(make_run(tmp_path / "run"), 100, 0, 0))
    assert timeline is not None
    killed, crashed = timeline.bars
    assert killed.width == pytest.approx(1100 * 50 / 400) and crashed.x == pytest.approx(96 + 1100 * 150 / 400)
    assert [mark.kind for mark in timeline.events] == ["resumed"] and len(timeline.checkpoints) == 1


def test_axes_have_round_numbers_and_smoothing_keeps_a_line():
    assert ticks(0.3, 2.1, 4) == [0.5, 1.0, 1.5, 2.0] and ticks(1.0, 1.0, 4) == [1.0]
    line = np.arange(200.0)
    assert np.allclose(smooth(line), line)


def test_the_program(tmp_path):
    run = make_run(tmp_path / "a run")
    command = [sys.executable, "-m", "tools.report"]
    done = subprocess.run([*command, str(run.root), f"out={tmp_path}/x.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    done = subprocess.run([*command, f"{tmp_path}/nothing"], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing is not a run" in done.stderr and "Traceback" not in done.stderr


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it_and_its_script_runs(tmp_path):
    page = render(make_run(tmp_path / "run"), 12, 10**7)
    probe = """<script>
    onerror = message => document.title = 'ERROR ' + message;
    const box = document.querySelector('[data-chart] svg');
    const place = box.getBoundingClientRect();
    const x = place.left + place.width * (52 + 560 * 37 / 100) / 624;
    box.dispatchEvent(new PointerEvent('pointermove', {clientX: x, clientY: place.top}));
    document.title = 'READ ' + document.getElementById('readout').textContent;
    </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/profile",
         f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1].startswith("READ step 37"), done.stdout[:300] + done.stderr[-500:]
    assert "train/loss_video_low500" in title[1]
