"""bench.sync_clips on clips whose motion and sound are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import sync_clips
from bench.learn_sync import show
from bench.sync_clips import ENLARGED, PAUSE, GeneratedClip, draw_clips, paths, read_clips, write_film
from data.errors import DataError
from data.media import SAMPLE_RATE, open_media
from data.synthesize import BACKGROUND, SynthesizeConfig, synthesize
from tools.sample import write_mp4
from tools.sync_score import TASKS


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[GeneratedClip]:
    folder = tmp_path_factory.mktemp("clips")
    synthesize(SynthesizeConfig(output=str(folder), clips=2, workers=1, kinds=["bounce"], sample_rate=16000))
    return read_clips(folder, ["clip-000000", "clip-000001"])


def test_the_path_shows_each_row_in_which_the_ball_is(clips: list[GeneratedClip]) -> None:
    for clip in clips:
        assert clip.pixels.shape == (3, 49, 64, 64) and clip.fps == pytest.approx(24)
        drawn, picture = paths(clip.pixels), (clip.pixels.numpy() + 1) / 2
        background = BACKGROUND.reshape(3) / 255
        ball = (np.abs(picture - background.reshape(3, 1, 1, 1)).sum(0) > 0.3).any(-1)  # [F, H]
        assert 0.1 < ball.mean() < 0.6
        assert np.array_equal(np.abs(drawn - background).sum(-1).T > 0.3, ball)


def test_a_film_plays_each_clip_with_its_own_sound(clips: list[GeneratedClip], tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", clips)
    length = 49 + round(PAUSE * 24)
    with open_media(tmp_path / "film.mp4") as film:
        assert film.size == (64 * ENLARGED, 64 * ENLARGED)
        pixels, sound = film.frames(0.0, 2 * length, 24, 64, 64), film.sound(0.0, round(2 * length / 24 * SAMPLE_RATE))
    for number, clip in enumerate(clips):
        shown = pixels[:, number * length : number * length + 49]
        assert (shown - clip.pixels).abs().mean() < 0.05 < (shown - clips[1 - number].pixels).abs().mean()
        begin = round(number * length / 24 * SAMPLE_RATE)
        heard = [torch.corrcoef(torch.stack((sound[begin:][:32000], it.sound[:32000])))[0, 1] for it in clips]
        assert heard[number] > 0.9 > heard[1 - number]


def test_the_picture_marks_what_is_seen_and_heard(
    clips: list[GeneratedClip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(clip: GeneratedClip) -> bytes:
        draw_clips(tmp_path / "x.png", [[clip]], voices=False)
        return (tmp_path / "x.png").read_bytes()

    still = replace(clips[0], pixels=clips[0].pixels[:, :1].expand(-1, 49, -1, -1))
    silent = replace(clips[0], sound=torch.zeros_like(clips[0].sound))
    marked = [drawn(clips[0]), drawn(still), drawn(silent)]
    assert len(set(marked)) == 3 and min(map(len, marked)) > 3000
    for name in ("impacts_seen", "impacts_heard"):
        with monkeypatch.context() as patch:
            patch.setattr(sync_clips, name, lambda *_: [])
            assert drawn(clips[0]) != marked[0]


@pytest.mark.slow
def test_learn_sync_shows_all_tasks_and_the_bridge_cut(clips: list[GeneratedClip], tmp_path: Path) -> None:
    for folder, first in (("whole", 0), ("cut", 1)):  # the cut ones are told apart by their order
        for task in TASKS:
            for number in range(2):
                clip = clips[number ^ first]
                write_mp4(
                    tmp_path / folder / f"{task.replace(' ', '-')}-{number}.mp4", clip.pixels, clip.sound, 24, 16000
                )
    show(tmp_path / "x-clips.png", tmp_path / "whole", tmp_path / "cut", voices=True)
    with open_media(tmp_path / "x-clips.mp4") as film:
        length = 49 + round(PAUSE * 24)
        assert film.frame_times is not None and len(film.frame_times) == 8 * length
        pixels = film.frames(0.0, 8 * length, 24, 64, 64)
    for number, place in enumerate([0, 1, 0, 1, 0, 1, 1, 0]):
        shown = pixels[:, number * length : number * length + 49]
        assert (shown - clips[place].pixels).abs().mean() < 0.05
    assert (tmp_path / "x-clips.png").stat().st_size > 20_000
    (tmp_path / "cut" / "joint-1.mp4").unlink()
    with pytest.raises(DataError, match=r"joint-1\.mp4"):
        show(tmp_path / "x-clips.png", tmp_path / "whole", tmp_path / "cut", voices=True)
