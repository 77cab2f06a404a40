"""The built-in codecs: exact before truncation, good enough after it, the same on every machine."""

import math
from pathlib import Path

import pytest
import torch

from data.codec import Codecs, EncoderConfig, check_codec, codecs_of, open_codec
from data.codec.builtin import audio, text, video
from data.errors import DataError
from data.synthesize import KINDS, draw_frame, draw_scenes, make_sound

SECONDS = 49 / 24
COUNT = 9  # three of each kind
RECORDED = {"video": "dct-video-1-cd40c791472f", "audio": "mdct-audio-1-af72d268b685", "text": "hash-text-1"}
RAMP = [0.13, -0.019, -0.103, 0.007, 1.08, -0.021, -0.098, -0.003]
CHIRP = [-0.032, -0.017, 0.037, 0.013, -0.043, -0.012]


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    clips = []
    for number in range(COUNT):
        scenes = draw_scenes(7, number, SECONDS, 64, 64, KINDS[number % 3])
        frames = torch.stack([torch.from_numpy(draw_frame(scenes, i / 24, 64, 64)) for i in range(49)])
        clips.append(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
    return clips


@pytest.fixture(scope="module")
def sounds() -> list[torch.Tensor]:
    clips = [draw_scenes(7, number, SECONDS, 64, 64, KINDS[number % 3]) for number in range(COUNT)]
    return [torch.from_numpy(make_sound(scenes, SECONDS, 16000)) for scenes in clips]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4 / float((a - b).square().mean()))  # the range is 2


def snr(sound: torch.Tensor, decoded: torch.Tensor) -> float:
    return 10 * math.log10(float(sound.square().sum() / (sound - decoded).square().sum()))


@pytest.mark.parametrize("time", [1, 4])
def test_the_untruncated_video_transform_is_exact(time: int) -> None:
    matrix = video.basis(time)
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5)
    pixels = torch.rand(3, 2 * time, 16, 24) * 2 - 1
    blocks = video.to_blocks(pixels, time)
    assert blocks.shape == (2, 2, 3, 192 * time)
    assert torch.allclose(video.from_blocks(blocks @ matrix.T @ matrix, time), pixels, atol=1e-5)


def test_latents_are_the_kept_coefficients_of_every_block() -> None:
    pixels = (torch.rand(3, 9, 24, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1).double()
    latents = video.encode(pixels.float())
    for part, time, table, places in ((pixels[:, :1], 1, video.FIRST, [0]), (pixels[:, 1:], 4, video.REST, [1, 2])):
        coefficients = video.to_blocks(part, time) @ video.basis(time).double().T  # all of them: [k, 3, 2, 192 * time]
        for channel, ((axis, t, y, x), mean, deviation) in enumerate(table):
            expected = (coefficients.unflatten(-1, (3, time, 8, 8))[..., axis, t, y, x] - mean) / deviation
            assert torch.allclose(latents[channel, places].double(), expected, atol=1e-4), (channel, time)


def test_video_geometry_and_causality(pictures: list[torch.Tensor]) -> None:
    latents = video.encode(pictures[0])
    assert latents.shape == (16, 13, 8, 8) and video.decode(latents).shape == (3, 49, 64, 64)
    assert video.encode(pictures[0][:, :1]).shape == (16, 1, 8, 8)
    assert torch.equal(video.encode(pictures[0][:, :5])[:, 0], latents[:, 0])  # the first frame stands alone
    for shape in ((3, 48, 64, 64), (3, 49, 60, 64), (1, 49, 64, 64)):
        with pytest.raises(ValueError, match="expected"):
            video.encode(torch.zeros(shape))


def test_video_quality_and_scale(pictures: list[torch.Tensor]) -> None:
    latents = [video.encode(clip).bfloat16() for clip in pictures]
    quality = [psnr(video.decode(latent), clip) for latent, clip in zip(latents, pictures, strict=True)]
    assert sum(quality) / COUNT > 26 and min(quality) > 23, quality
    stacked = torch.stack(latents).float()
    assert 0.6 < float(stacked.std()) < 1.4 and abs(float(stacked.mean())) < 0.3


def test_the_untruncated_audio_transform_is_exact_up_to_the_edges() -> None:
    for length in (1, 2, 7):
        sound = torch.randn(length * 320, dtype=torch.float64)
        coefficients = audio.analyse(sound)
        assert coefficients.shape == (length, 320)
        assert torch.allclose(audio.synthesise(coefficients), sound, atol=1e-10)  # sample 0 and the last included
        assert torch.allclose(coefficients.square().sum(), sound.square().sum())  # orthonormal


def test_audio_steps_are_where_their_sound_is() -> None:
    sound = torch.zeros(320 * 20)
    sound[320 * 8 + 160] = 1  # in the middle of step 8
    energy = audio.analyse(sound).square().sum(1)
    assert int(energy.argmax()) == 8 and float(energy[:7].sum() + energy[10:].sum()) < 1e-9


def test_a_tone_comes_out_at_its_frequency() -> None:
    sound = 0.3 * torch.sin(2 * math.pi * 700 * torch.arange(16000) / 16000)
    decoded = audio.decode(audio.encode(sound), 16000)
    spectrum = torch.fft.rfft(decoded).abs()
    assert int(spectrum.argmax()) == 700 and snr(sound, decoded) > 25


def test_audio_geometry_quality_and_scale(sounds: list[torch.Tensor]) -> None:
    latents = [audio.encode(sound).bfloat16() for sound in sounds]
    assert len(sounds[0]) == 32667 and latents[0].shape == (103, 128)
    quality = [snr(sound, audio.decode(latent, 32667)) for latent, sound in zip(latents, sounds, strict=True)]
    assert sum(quality) / COUNT > 30 and min(quality) > 18, quality
    loudest = torch.cat(latents).float().std(0)[:16]
    assert 0.5 < float(loudest.mean()) < 2
    assert audio.steps(1) == 1 and audio.steps(320) == 1 and audio.steps(321) == 2
    with pytest.raises(ValueError, match="expected"):
        audio.encode(torch.zeros(2, 100))


def test_natural_clips_keep_their_quality(real_clips: Path) -> None:
    from data.media import open_media

    pixels, waves = [], []
    for name in ("mova_cat_ball.mp4", "mdn_friday_film_speech.mp4", "psychopy_jwp_intro_talk.mp4"):
        with open_media(real_clips / name) as media:
            pixels.append(media.frames(0.5, 49, 24, 64, 64))
            waves.append(media.sound(0.5, 32667))
    assert min(psnr(video.decode(video.encode(clip)), clip) for clip in pixels) > 21
    assert min(snr(wave, audio.decode(audio.encode(wave), 32667)) for wave in waves) > 8


def test_text_is_a_row_a_word_and_never_changes() -> None:
    rows = text.encode("A red ball, a high tone.")
    assert rows.shape == (8, 4096) and text.encode("", 256).shape == (1, 256)
    assert torch.equal(text.encode("", 64), text.encode("  ", 64))
    assert 0.9 < float(rows.square().mean().sqrt()) < 1.1
    assert torch.equal(text.encode("Ball", 64), text.encode("ball", 64))
    # the numbers themselves: another platform or numpy must give these
    assert [round(float(value), 4) for value in text.encode("red ball", 64)[1, :4]] == [
        1.6716,
        -0.9536,
        -0.3861,
        -1.082,
    ]
    with pytest.raises(ValueError, match="dim is 7"):
        text.encode("x", 7)


def test_like_words_are_near_and_order_counts() -> None:
    def near(a: str, b: str) -> float:
        return float(torch.nn.functional.cosine_similarity(text._word(a, 4096), text._word(b, 4096), dim=0))

    assert near("bounce", "bounces") > 0.3 > near("bounce", "pendulum") + 0.2
    assert not torch.equal(text.encode("a b", 64)[0], text.encode("b a", 64)[1])


def test_fingerprints_are_distinct() -> None:
    found = {video.fingerprint, audio.fingerprint, text.fingerprint}
    assert len(found) == 3 and all(isinstance(value, str) and value for value in found)


def test_the_codecs_behind_their_interface_are_the_functions() -> None:
    pixels = torch.rand(2, 3, 9, 16, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1
    waves = torch.randn(2, 700, generator=torch.Generator().manual_seed(6)) * 0.1
    codecs = Codecs(EncoderConfig(), text_dim=64)
    latents, sound = codecs.video.encode(pixels), codecs.audio.encode(waves)
    for number in range(2):
        assert torch.equal(latents[number], video.encode(pixels[number]))
        assert torch.equal(codecs.video.decode(latents)[number], video.decode(latents[number]))
        assert torch.equal(sound[number], audio.encode(waves[number]))
        assert torch.equal(codecs.audio.decode(sound, 700)[number], audio.decode(sound[number], 700))
    assert sound.shape[1] == codecs.audio.steps(700) == 3 and codecs.audio.hop == 320
    rows, empty = codecs.text.encode(["A ball.", ""])
    assert torch.equal(rows, text.encode("A ball.", 64)) and torch.equal(empty, text.encode("", 64))
    condition = codecs.video.encode_condition(pixels[:, :, 0], 9)
    whole = torch.zeros_like(pixels)
    whole[:, :, 0] = pixels[:, :, 0]
    assert torch.equal(condition, codecs.video.encode(whole))


def test_datasets_of_the_first_day_can_be_gone_on_with() -> None:
    """The fingerprints that stand in them, and numbers that their shards hold."""
    assert Codecs(EncoderConfig()).fingerprints == RECORDED
    ramp = torch.linspace(-1, 1, 3 * 5 * 16 * 16).reshape(3, 5, 16, 16)
    latents = video.encode(ramp)
    found = [round(float(value), 3) for value in (*latents[:4, 0, 0, 1], *latents[:4, 1, 1, 0])]
    assert found == RAMP
    wave = torch.sin(torch.arange(960) ** 1.5 / 50)
    assert [round(float(value), 3) for value in audio.encode(wave)[1, 3:9]] == CHIRP


def test_a_codec_is_found_by_its_name_and_by_its_fingerprint(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="encoder.video=wan: choose from builtin, mova"):
        open_codec("video", EncoderConfig(video="wan"))
    stated = Codecs(EncoderConfig()).fingerprints
    codecs = codecs_of(stated, "dataset d", EncoderConfig())
    for codec in (codecs.video, codecs.audio, codecs.text):
        assert codec.name == "builtin"
        check_codec(codec, stated, "dataset d", EncoderConfig())
    with pytest.raises(DataError, match="dataset d has audio of foreign-1, which no codec here makes"):
        codecs_of(stated | {"audio": "foreign-1"}, "dataset d", EncoderConfig())
    other = stated | {"video": "dct-video-0-abc"}
    with pytest.raises(
        DataError, match=f"dataset d has video of dct-video-0-abc, the codec here is {video.fingerprint}"
    ):
        check_codec(codecs.video, other, "dataset d", EncoderConfig())
    check_codec(codecs.video, other, "dataset d", EncoderConfig(ignore_fingerprints=True))
    assert "continuing because of encoder.ignore_fingerprints" in caplog.text
