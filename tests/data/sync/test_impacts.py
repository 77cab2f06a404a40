"""Impacts found in pixels and in sound: near 1 for true clips after the codecs, and every way of cheating fails."""

import numpy as np
import pytest
import torch

from data.codec.builtin import audio, video
from data.sync.impacts import TOLERANCE, Impact, agreement, impacts_heard, impacts_seen, match
from data.synthesize import VOICES, draw_frame, draw_scenes, events_of, make_sound

SECONDS = 49 / 24
CLIPS = 24


def clip(number: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, list[Impact]]:
    """Pixels and sound of a synthetic clip after the codecs, and the truth."""
    scenes = draw_scenes(31, number, SECONDS, 64, 64, kind)
    frames = np.stack([draw_frame(scenes, i / 24, 64, 64) for i in range(49)])
    pixels = video.decode(video.encode(torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1))
    sound = torch.from_numpy(make_sound(scenes, SECONDS, 16000))
    pitches = [pitch for _, _, pitch in VOICES]
    truth = [
        Impact(event["time"], pitches.index(event["pitch"]) if kind == "juggle" else 0)
        for event in events_of(scenes, SECONDS)
    ]
    return pixels, audio.decode(audio.encode(sound), len(sound)), truth


@pytest.mark.parametrize("kind", ["bounce", "juggle"])
def test_true_clips_score_near_1_and_shuffled_ones_do_not(kind: str) -> None:
    voices = kind == "juggle"
    clips = [clip(number, kind) for number in range(CLIPS)]
    seen = [impacts_seen(pixels, 24.0, voices) for pixels, _, _ in clips]
    heard = [impacts_heard(sound, voices) for _, sound, _ in clips]
    truth = [events for _, _, events in clips]
    for first, second in ((truth, seen), (truth, heard), (seen, heard)):
        found = agreement(first, second)
        assert found.f1 > 0.98 and found.chance < 0.35 and abs(found.offset) < 0.02, found
    late = [[Impact(impact.time + 1.5 * TOLERANCE, impact.voice) for impact in impacts] for impacts in heard]
    assert agreement(seen, late).f1 < 0.4
    if voices:
        wrong = [[Impact(impact.time, (impact.voice + 1) % len(VOICES)) for impact in impacts] for impacts in heard]
        assert agreement(seen, wrong).f1 < 0.3


def test_nothing_is_found_in_silence_and_in_a_picture_without_objects() -> None:
    grey = torch.full((3, 49, 64, 64), -0.5)
    noise = 0.01 * torch.from_numpy(np.random.default_rng(0).standard_normal(32000)).float()
    for voices in (False, True):
        assert impacts_seen(grey, 24.0, voices) == [] == impacts_heard(torch.zeros(32000), voices)
        assert impacts_heard(noise, voices) == []
    assert agreement([[], []], [[], []]).f1 == 0  # an empty output is a failure
    assert agreement([[Impact(1.0)]], [[]]).f1 == 0


def test_impacts_match_one_to_one() -> None:
    """Many sounds around one impact match it once; counted by shares of one side they would all match."""
    many = [Impact(0.95 + 0.02 * i) for i in range(5)]
    assert len(match([Impact(1.0)], many)) == 1
    found = agreement([[Impact(1.0)]], [many])
    assert (found.seen, found.heard, found.matched) == (1, 5, 1) and found.f1 == pytest.approx(2 / 6)
    assert len(match([Impact(1.0), Impact(1.15)], [Impact(1.08), Impact(1.2)])) == 2  # the nearest first would give 1
    assert match([Impact(1.0)], [Impact(1.0, 1)]) == []
