"""Clips beside a run, on a real SLURM: the watcher begins with the run and ends after it."""

from pathlib import Path

import pytest

from data.clip import Bucket
from data.codec.builtin import audio, text, video
from tests.shards import make_dataset
from tests.slurm.conftest import Launcher
from train.monitor.samples import read_samples


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    bucket = Bucket(frames=2, height=4, width=8, audio_steps=11, fps=24.0, has_video=True, has_audio=True)
    codecs = {"video": video.fingerprint, "audio": audio.fingerprint, "text": text.fingerprint}
    return make_dataset(tmp_path / "data", [(bucket, 8)], dim=8, encoders=codecs)


def test_clips_are_made_beside_the_run(launcher: Launcher, shards: Path) -> None:
    run = launcher.submit(
        "seen", f"data.path={shards}", f"data.valid_path={shards}", "steps=8", "checkpoint.every=4",
        "model.video.text_dim=8", "model.audio.text_dim=8",
        "watch.enabled=true", 'watch.keys=["clips=1","poll=0.5","sampler.steps=1"]',
    )  # fmt: skip
    assert run.wait("COMPLETED", "FAILED", seconds=120) == "COMPLETED", run.log()
    watcher = str(int(run.job) + 1)
    assert run.wait("COMPLETED", "FAILED", seconds=120, job=watcher) == "COMPLETED", run.log()
    assert [sample.step for sample in read_samples(run.folder)][-1] == 8
    assert "has finished" in (run.folder / f"logs/watch-{watcher}.out").read_text()
