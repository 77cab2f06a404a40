"""mova sample: from a checkpoint to mp4s, the same under every layout."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import av
import pytest
import torch

from core.errors import RunError
from data.clip import Bucket
from data.media import open_media
from data.synthesize import SynthesizeConfig, write_clip
from model.sampler import SamplerConfig, sample
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from tools.measures import Measures
from tools.sample import Clip, SampleConfig, describe_clip, make_clips, parts_of, write_mp4
from train.parallel.mesh import ParallelConfig, make_layout

BUCKET = Bucket(3, 4, 6, 7, 24.0, True, True)
GEOMETRY = {"frames": 25, "height": 48, "width": 80, "fps": 24.0}  # 7 x 3 x 5 video tokens, which 2 ranks do not divide


def clips_of(run: Path, ulysses: int, **keys) -> list[torch.Tensor]:
    config = SampleConfig(
        checkpoint=str(run), out="x.mp4", parallel=ParallelConfig(ulysses=ulysses), count=2,
        sampler=SamplerConfig(steps=3, text_scale=2.0, bridge_scale=1.5), **GEOMETRY, **keys,
    )  # fmt: skip
    clips = make_clips(config, make_layout(config.parallel, torch.device("cpu")))
    return [tensor for clip in clips for tensor in (clip.pixels, clip.sound)]


def schedule_of(run: Path, **keys) -> SamplerConfig:
    """What the sampler is given."""
    seen: list[SamplerConfig] = []

    def recorded(model, config, *rest):
        seen.append(config)
        return sample(model, config, *rest)

    with patch("tools.sample.sample", recorded):
        config = SampleConfig(
            checkpoint=str(run), out="x.mp4", sampler=SamplerConfig(steps=1, text_scale=1.0, **keys), **GEOMETRY
        )
        make_clips(config, make_layout(config.parallel, torch.device("cpu")))
    return seen[0]


def schedule_given(run: Path) -> SamplerConfig:
    return schedule_of(run, shift_audio=7.0, boundary=600.0)


PARTS = {"no sound": (True, False), "no picture": (False, True)}


def part_of(run: Path, ulysses: int, picture: bool, sound: bool) -> list[torch.Tensor | None]:
    return clips_of(run, ulysses, picture=picture, sound=sound)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    make_dataset(folder / "data", [(BUCKET, 8)], dim=8)
    write_clip(folder, 0, SynthesizeConfig(output=str(folder), clips=1, frames=25, height=64, width=64))
    clip = folder / "clip-000000.mp4"
    run = folder / "runs" / "made"
    results = run_cases(
        2,
        {
            "train": (
                runs.train,
                (
                    folder / "runs",
                    folder / "data",
                    "made",
                    "steps=2",
                    "model.video.text_dim=8",
                    "model.audio.text_dim=8",
                    "objective.shift_video=3",
                    "objective.shift_audio=1.5",
                    "objective.boundary=750",
                ),
            ),
            "schedule": (schedule_of, (run,)),
            "schedule given": (schedule_given, (run,)),
            "sp 1": (clips_of, (run, 1)),
            "sp 2": (clips_of, (run, 2)),
            **{
                f"{case}, sp {ranks}": (part_of, (run, ranks, *parts))
                for case, parts in PARTS.items()
                for ranks in (1, 2)
            },
        },
    )
    return folder, clip, run, results


def test_sequence_parallelism_gives_the_same_clips(made):
    results = made[3]
    assert results["train"][0]["ending"] == "finished", results["train"]
    one, two = results["sp 1"], results["sp 2"]
    for rank in range(2):
        for expected, found in zip(one[0], two[rank], strict=True):
            assert (expected - found).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.equal(one[0][0], one[0][2])  # another seed, another clip


def test_the_schedule_is_that_of_the_runs_objective_unless_it_is_given(made):
    trained, given = (made[3][name][0] for name in ("schedule", "schedule given"))
    assert (trained.shift_video, trained.shift_audio, trained.boundary) == (3.0, 1.5, 750.0)
    assert (given.shift_video, given.shift_audio, given.boundary) == (3.0, 7.0, 600.0)


@pytest.mark.parametrize("case", PARTS)
def test_a_clip_without_sound_or_picture_has_none_and_its_file_neither(made, case, tmp_path):
    results, (picture, sound) = made[3], PARTS[case]
    one, two = (results[f"{case}, sp {ranks}"] for ranks in (1, 2))
    for expected, found in zip(one[0], two[1], strict=True):
        assert (expected is None) == (found is None)
        assert expected is None or (expected - found).abs().max() < 1e-4 * expected.abs().max()
    pixels, wave = one[0][:2]
    assert (pixels is not None, wave is not None) == (picture, sound)
    write_mp4(tmp_path / "x.mp4", pixels, wave, 24.0, 16000)
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert (len(container.streams.video), len(container.streams.audio)) == (picture, sound)
    assert describe_clip(Clip(pixels, wave, 24.0, 16000)) == {
        "no sound": "25 frames of 80 x 48, no sound", "no picture": "1.04 s of sound, no picture"
    }[case]  # fmt: skip
    whole = results["sp 1"][0][0 if picture else 1]
    assert not torch.equal(whole, pixels if picture else wave)  # there the Bridge had its part
    measured = Measures(impacts=True)(pixels, wave, 24.0, 16000)
    assert set(measured) == ({"motion"} if picture else {"loudness"})


def test_whether_there_is_picture_and_sound_is_asked_for_given_or_as_in_the_data(tmp_path):
    for name, (picture, sound) in {**PARTS, "both": (True, True)}.items():
        make_dataset(tmp_path / name, [(Bucket(3, 4, 6, 7, 24.0, picture, sound), 2)], dim=8)
        for data in ({"path": f"{tmp_path}/{name}"}, {"path": None, "datasets": [{"path": f"{tmp_path}/{name}"}]}):
            assert parts_of(SampleConfig(out="x.mp4"), {"data": data}) == (picture, sound)
    soundless, gone = ({"data": {"path": f"{tmp_path}/{name}"}} for name in ("no sound", "gone"))
    later = {"data": soundless["data"] | {"segments": [{"first_step": 2, "datasets": [{"path": f"{tmp_path}/both"}]}]}}
    assert parts_of(SampleConfig(), gone) == parts_of(SampleConfig(), later) == (True, True)
    assert parts_of(SampleConfig(sound=True), soundless) == parts_of(SampleConfig(sound_of="a.mp4"), soundless)
    assert parts_of(SampleConfig(sound=True), soundless) == (True, True)
    with pytest.raises(RunError, match="nothing is left to generate"):
        parts_of(SampleConfig(picture_of="a.mp4"), soundless)
    for keys in ({"picture": False, "image": "a.png"}, {"sound": False, "sound_of": "a.mp4"}):
        with pytest.raises(ValueError, match="leave one of them out"):
            SampleConfig(**keys)


def command(*arguments: str) -> subprocess.CompletedProcess:
    geometry = [f"{key}={value}" for key, value in GEOMETRY.items()]
    words = [sys.executable, "-m", "tools.sample", *geometry, "sampler.steps=2", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_program_writes_pictures_with_sound_and_keeps_what_is_given(made):
    folder, clip, run, _ = made
    done = command(f"checkpoint={run}", f"sound_of={clip}", f"out={folder}/x.mp4", "prompt=A ball.")
    assert done.returncode == 0, done.stderr
    with open_media(folder / "x.mp4") as media, open_media(clip) as original:
        assert media.sound_span is not None and media.frame_times is not None and len(media.frame_times) == 25
        given, found = original.sound(0.0, 16000), media.sound(0.0, 16000)
        alike = torch.corrcoef(torch.stack([given, found]))[0, 1]
        assert alike > 0.9  # through the codec and AAC
    with av.open(str(folder / "x.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (80, 48)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["checkpoint=nowhere", "out=x.mp4"], "nowhere is not a usable checkpoint"),
        (["checkpoint=nowhere", "out=x.avi"], "give a file that ends in .mp4"),
        (["checkpoint=nowhere", "out=x.mp4", "picture_of=a", "sound_of=b"], "nothing is left to generate"),
        (["checkpoint=nowhere", "out=x.mp4", "sampler.solver=rk9"], "rk9"),
    ],
)
def test_bad_requests_cost_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
