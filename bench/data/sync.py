"""Accuracy of the learned synchronization scorer on synthesized clips of another seed, compared with the weak baseline.

    python -m bench.data.sync work=/tmp/sync          # writes bench/results/sync.md; 8 minutes on two idle cores

Clips (4 s) are made in `work`, one scorer is trained a seed with the settings of `mova train-sync`; existing
files are reused. Every judgement takes the same path as in curation: mp4, decoder, SyncScorer.score.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor

from core.compose import Schema
from core.program import Call, Program
from data.media import SAMPLE_RATE, open_media
from data.sync import SyncScorer, load_scorer
from data.sync.trainer import CLOSE, TrainSyncConfig, area_under_curve, train_sync
from data.synthesize import SynthesizeConfig, synthesize
from tools.bench.record import write_record

FRAMES, FPS, START, RATE = 49, 24, 1.0, 16000  # a window: the second and third second of a clip
SIDE = 64  # pixels
SHIFTS = (0.2, 1.0)  # s, smallest and largest


@dataclass
class SyncBench:
    """What the scorers are trained and judged on.

    work: folder for clips and scorers
    train_clips: of the training set
    test_clips: of the test set
    seeds: a scorer for each
    output: folder of the record
    """

    work: str = MISSING
    train_clips: int = 500
    test_clips: int = 150
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output: str = "bench/results"


@dataclass
class TestClip:
    """One decoded clip: frames [F, 3, H, W] of the window, all its sound, its kind and events."""

    kind: str
    frames: Tensor
    sound: Tensor
    times: list[float]

    def hear(self, lag: float) -> Tensor:
        """The sound of the window, `lag` seconds late; real to its ends."""
        begin = round((START - lag) * RATE)
        return self.sound[begin : begin + round(FRAMES / FPS * RATE)]

    def hear_padded(self, lag: float) -> Tensor:
        """The same, made from the window's sound alone: silence where a shift moves its end away."""
        sound, out = self.hear(0.0), torch.zeros(round(FRAMES / FPS * RATE))
        shift = round(lag * RATE)
        if shift >= 0:
            out[shift:] = sound[: len(out) - shift]
        else:
            out[:shift] = sound[-shift:]
        return out

    def equal_lags(self, lag: float) -> int:
        """How many lags up to the largest fit as well as `lag`: a regular tick can't tell whole periods apart."""
        if self.kind != "tick":
            return 1
        period = float(np.median(np.diff(self.times)))
        return sum(abs(lag + k * period) <= SHIFTS[1] for k in range(-9, 10))


def read_test_clips(folder: Path) -> list[TestClip]:
    """All clips of a folder of data.synthesize."""
    clips = []
    for path in sorted(folder.glob("*.mp4")):
        truth = json.loads(path.with_suffix(".json").read_text())
        with open_media(path) as media:
            assert media.sound_span is not None
            frames = media.frames(START, FRAMES, FPS, SIDE, SIDE).transpose(0, 1)
            sound = media.sound(0.0, round(media.sound_span[1] * SAMPLE_RATE))
            clips.append(TestClip(truth["kind"], frames, sound, [event["time"] for event in truth["events"]]))
    return clips


def judge_all(scorer: SyncScorer, clips: list[TestClip], padded: bool = False) -> dict[str, float]:
    """Areas under the curve and shares of lags found, over all kinds and by kind. The draws are the same each time."""
    sync, lag_key = scorer.keys
    random = np.random.Generator(np.random.Philox(key=[7, 7]))
    scores: dict[tuple[str, str], list[float]] = {}
    found: dict[tuple[str, str], list[float]] = {}
    ideal: list[float] = []
    for number, clip in enumerate(clips):
        other = clips[(number + 1 + int(random.integers(len(clips) - 1))) % len(clips)]
        late = float(random.uniform(*SHIFTS) * random.choice((-1, 1)))
        hear = clip.hear_padded if padded else clip.hear
        cases = {"in step": (clip.hear(0.0), 0.0), "shifted": (hear(late), late), "swapped": (other.hear(0.0), None)}
        ideal.append(1 / clip.equal_lags(late))
        for name, (sound, lag) in cases.items():
            values = scorer.score(clip.frames, sound, FPS)
            for kind in (clip.kind, "all"):
                scores.setdefault((kind, name), []).append(values[sync])
                if lag is not None:
                    found.setdefault((kind, name), []).append(abs(values[lag_key] - lag) <= CLOSE)
    table = {}
    for kind in ("all", "bounce", "collide", "tick"):
        table[f"{kind} auc shift"] = area_under_curve(scores[kind, "in step"], scores[kind, "shifted"])
        table[f"{kind} auc swap"] = area_under_curve(scores[kind, "in step"], scores[kind, "swapped"])
        table[f"{kind} lag"] = float(np.mean(found[kind, "in step"] + found[kind, "shifted"]))
        table[f"{kind} lag shifted"] = float(np.mean(found[kind, "shifted"]))
    table["ideal lag shifted"] = float(np.mean(ideal))
    return table


def measure(bench: SyncBench) -> list[tuple[str, str]]:
    """Make, train, judge; returns the table."""
    work = Path(bench.work)
    train = synthesize(SynthesizeConfig(output=str(work / "train"), clips=bench.train_clips, seed=1, frames=97))
    test = synthesize(SynthesizeConfig(output=str(work / "test"), clips=bench.test_clips, seed=2, frames=97))
    clips = read_test_clips(test)
    tables, padded, times, cpu = [], [], [], []
    for seed in bench.seeds:
        path = work / f"scorer-{seed}.safetensors"
        if not path.exists():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            train_sync(TrainSyncConfig(source=str(train), output=str(path), seed=seed))
            cpu.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before)
        times.append(sum(json.loads(path.with_suffix(".json").read_text())["seconds"].values()))
        scorer = load_scorer("learned", str(path))
        tables.append(judge_all(scorer, clips))
        padded.append(judge_all(scorer, clips, padded=True))
    weak = judge_all(load_scorer("weak"), clips)
    rows = [("clips to train on, to judge (windows of 2.04 s)", f"{bench.train_clips}, {len(clips)}")]
    rows.append(("reading and training, wall clock a seed", ", ".join(f"{value:.0f} s" for value in times)))
    if cpu:
        rows.append(("reading and training, processor time a seed", ", ".join(f"{value:.0f} s" for value in cpu)))
    names = {
        "auc shift": "AUC, in step against shifted by 0.2 to 1 s",
        "auc swap": "AUC, in step against swapped sound",
        "lag": "lag within 0.1 s, of those in step and shifted",
        "lag shifted": "lag within 0.1 s, of the shifted alone",
    }
    for key, what in names.items():
        for kind in ("all", "bounce", "collide", "tick"):
            values = " / ".join(f"{table[f'{kind} {key}']:.3f}" for table in tables)
            rows.append((f"{what}: {kind}", f"{values} (weak baseline {weak[f'{kind} {key}']:.3f})"))
    rows.append(("the same at best, whole periods of a tick guessed", f"{tables[0]['ideal lag shifted']:.3f}"))
    for key in ("auc shift", "lag"):
        values = " / ".join(f"{table[f'all {key}']:.3f}" for table in padded)
        rows.append((f"{names[key]}: all, shifts filled with silence", values))
    begin, frames = time.process_time(), clips[0].frames
    for _ in range(5):
        scorer.score(frames, clips[0].hear(0.0), FPS)
    rows.append(("processor time of a judgement", f"{(time.process_time() - begin) / 5 * 1e3:.0f} ms"))
    return rows


def run(call: Call[SyncBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    torch.set_num_threads(1)  # the networks are small
    rows, path = measure(bench), Path(bench.output) / "sync.md"
    write_record(path, "Synchronization scorers on synthesized clips", call.command, rows, NOTES)


NOTES = (
    "One number a training seed, in order. Scorers were trained on clips of synthesis seed 1 and judged on seed 2, "
    "decoded from mp4 at 24 fps, 64 x 64. A shifted window has real sound to its ends. Ticks are regular: a shift by a "
    "whole period leaves the same window, so that no scorer can find their lag in more than the share named, nor tell "
    "a shift near a period from none. Synthesized clips are easy; these numbers do not apply to speech."
)


PROGRAM = Program("sync", __doc__, run, schema=Schema("bench_sync", SyncBench, ()), command="python -m bench.data.sync")

if __name__ == "__main__":
    PROGRAM.start()
