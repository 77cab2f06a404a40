"""The stored form of one sample."""

import json

import pytest
import torch

from data.clip import Bucket, EncodedClip, collapse_tail, restore_tail

BUCKET = Bucket(frames=5, height=2, width=3, audio_steps=7, fps=24.0, has_video=True, has_audio=True)


def sample() -> EncodedClip:
    generator = torch.Generator().manual_seed(1)
    condition = torch.zeros(16, 5, 2, 3)
    condition[:, 0] = 1
    return EncodedClip(
        key="0" * 24,
        video=torch.randn(16, 5, 2, 3, generator=generator).bfloat16(),
        audio=torch.randn(7, 128, generator=generator).bfloat16(),
        condition=condition.bfloat16(),
        meta={"fps": 24.0, "source": "ä.mp4"},
    )


def test_a_sample_returns_bit_for_bit() -> None:
    clip = sample()
    back = EncodedClip.from_members(clip.key, *clip.to_members(), BUCKET)
    assert back.video is not None and back.audio is not None and back.condition is not None
    assert torch.equal(back.video, clip.video) and torch.equal(back.audio, clip.audio)
    assert torch.equal(back.condition, clip.condition) and back.meta == clip.meta
    assert clip.to_members() == sample().to_members()  # equal samples, equal bytes


def test_only_a_tail_that_is_equal_bit_for_bit_collapses() -> None:
    condition = torch.zeros(16, 5, 2, 3, dtype=torch.bfloat16)
    condition[:, 0] = 1
    assert collapse_tail(condition).shape[1] == 2
    condition[3, 2, 0, 0] = -0.0  # equal to 0 as a number, not as bits
    small = collapse_tail(condition)
    assert small.shape[1] == 4
    assert torch.equal(restore_tail(small, 5).view(torch.int16), condition.view(torch.int16))
    changed = torch.randn(16, 5, 2, 3).bfloat16()
    assert collapse_tail(changed).shape[1] == 5


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_an_absent_modality_stays_absent(missing: str) -> None:
    clip = sample()
    if missing == "video":
        clip.video = clip.condition = None
    else:
        clip.audio = None
    bucket = Bucket(5, 2, 3, 7, 24.0, has_video=missing != "video", has_audio=missing != "audio")
    back = EncodedClip.from_members(clip.key, *clip.to_members(), bucket)
    assert (back.video is None, back.audio is None) == (missing == "video", missing == "audio")
    with pytest.raises(ValueError, match="its bucket requires"):
        EncodedClip.from_members(clip.key, *clip.to_members(), BUCKET)


def test_wrong_bytes_are_a_value_error() -> None:
    tensors, meta = sample().to_members()
    for bad in (b"", tensors[:-1], b"\xff" * 64):
        with pytest.raises(ValueError, match="does not parse"):
            EncodedClip.from_members("k", bad, meta, BUCKET)
    with pytest.raises(ValueError, match="does not parse"):
        EncodedClip.from_members("k", tensors, b"{", BUCKET)
    with pytest.raises(ValueError, match="its bucket requires"):
        EncodedClip.from_members("k", tensors, meta, Bucket(5, 2, 4, 7, 24.0, True, True))


def test_nan_is_named_and_never_written_to_json() -> None:
    clip = sample()
    assert clip.not_finite() is None
    assert clip.audio is not None
    clip.audio[3, 3] = float("nan")
    assert clip.not_finite() == "audio"
    clip.meta["loudness"] = float("nan")
    with pytest.raises(ValueError):
        clip.to_members()


def test_bucket_survives_json_and_refuses_nonsense() -> None:
    assert Bucket.from_dict(json.loads(json.dumps(BUCKET.to_dict()))) == BUCKET
    with pytest.raises(ValueError):
        Bucket.from_dict({**BUCKET.to_dict(), "frames": 0})
    with pytest.raises(TypeError):
        Bucket.from_dict({**BUCKET.to_dict(), "color": 1})
