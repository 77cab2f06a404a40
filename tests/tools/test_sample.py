"""python -m tools.sample: from a checkpoint to mp4s, the same under every layout."""

import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from data.clip import Bucket
from data.decode import open_media
from data.synthesize import SynthesizeConfig, write_clip
from model.sampler import SamplerConfig
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from tools.sample import SampleConfig, make_clips
from train.mesh import ParallelConfig, make_layout

BUCKET = Bucket(3, 4, 6, 7, 24.0, True, True)
GEOMETRY = {"frames": 25, "height": 48, "width": 80, "fps": 24.0}  # 7 x 3 x 5 video tokens, which 2 ranks do not divide


def clips_of(run: Path, ulysses: int, **keys) -> list[torch.Tensor]:
    config = SampleConfig(
        checkpoint=str(run), out="x.mp4", parallel=ParallelConfig(ulysses=ulysses), count=2,
        sampler=SamplerConfig(steps=3, text_scale=2.0, bridge_scale=1.5), **GEOMETRY, **keys,
    )  # fmt: skip
    clips, _ = make_clips(config, make_layout(config.parallel, torch.device("cpu")))
    return [tensor for pair in clips for tensor in pair]


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
                ),
            ),
            "sp 1": (clips_of, (run, 1)),
            "sp 2": (clips_of, (run, 2)),
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


def command(*arguments: str) -> subprocess.CompletedProcess:
    geometry = [f"{key}={value}" for key, value in GEOMETRY.items()]
    words = [sys.executable, "-m", "tools.sample", *geometry, "sampler.steps=2", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_program_writes_pictures_with_sound_and_keeps_what_is_given(made):
    folder, clip, run, _ = made
    done = command(f"checkpoint={run}", f"sound_of={clip}", f"out={folder}/x.mp4", "prompt=A ball.")
    assert done.returncode == 0, done.stderr
    with open_media(folder / "x.mp4") as media, open_media(clip) as original:
        assert media.audio is not None and media.frame_times is not None and len(media.frame_times) == 25
        given, found = original.sound(0.0, 16000), media.sound(0.0, 16000)
        alike = torch.corrcoef(torch.stack([given, found]))[0, 1]
        assert alike > 0.9  # through the codec and AAC
    with av.open(str(folder / "x.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (80, 48)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["checkpoint=nowhere", "out=x.mp4"], "nowhere is no checkpoint that can be used"),
        (["checkpoint=nowhere", "out=x.avi"], "give a file that ends in .mp4"),
        (["checkpoint=nowhere", "out=x.mp4", "picture_of=a", "sound_of=b"], "nothing is left to make"),
        (["checkpoint=nowhere", "out=x.mp4", "sampler.solver=rk9"], "rk9"),
    ],
)
def test_bad_requests_cost_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
