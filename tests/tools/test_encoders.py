"""From clips to a sampled mp4 with encoders of the true classes: prepare, 2 ranks, checkpoint, sample; and refusals."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from core.errors import RunError
from data.clip import Bucket
from data.codec import Codecs, EncoderConfig
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.media import open_media
from data.synthesize import SynthesizeConfig, encode_mp4, write_clip
from model.sampler import SamplerConfig
from tests.distributed import run_cases
from tests.encoders import tiny_encoders
from tests.shards import make_dataset
from tests.train.runs import train
from tools.clip_requests import WatchConfig, orders_of
from tools.export.folder import export
from tools.export.request import ExportRequest
from tools.mova import PROGRAMS, load
from tools.sample import Clip, SampleConfig, codecs_of_run, make_clips
from tools.sync_score import SyncScoreConfig, score
from tools.watch import sample_checkpoint
from train.parallel.mesh import make_layout

FRAMES = 49
MODEL = [
    "model.video.text_dim=64", "model.audio.text_dim=64", "model.text_length=512", "steps=2", "validation.every=0",
]  # fmt: skip
KINDS = ("video", "audio", "text")
PARTS = {"video": ("video_vae",), "audio": ("audio_vae",), "text": ("text_encoder", "tokenizer")}
HERE = SimpleNamespace(device=torch.device("cpu"), first=True)  # of one process, as far as a refusal goes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with both, one without sound, one without picture, one that is silent; prepared; a run on 2 ranks."""
    root = tmp_path_factory.mktemp("encoders")
    clips = root / "clips"
    clips.mkdir()
    for number in range(2):
        write_clip(clips, number, SynthesizeConfig(str(clips), frames=FRAMES, height=32, width=48, sample_rate=48000))
    frames = [torch.full((32, 48, 3), 9 * number % 255, dtype=torch.uint8).numpy() for number in range(FRAMES)]
    noise = 0.1 * torch.randn(98000, generator=torch.Generator().manual_seed(0)).numpy()
    encode_mp4(clips / "mute.mp4", frames, 24, None, 48000)
    encode_mp4(clips / "blind.mp4", None, 24, noise, 48000)
    encode_mp4(clips / "still.mp4", frames, 24, 0 * noise, 48000)
    base_folder(root / "MOVA-360p", {})
    with contextlib.chdir(root):
        assert run_words(*command_of_page("prepare")[0], "workers=1") == 0
    cases = {
        "train": (train, (root / "runs", root / "dataset", "first", *MODEL)),
        "export": (exported, (root,)),
        "again": (train, (root / "runs", root / "dataset", "again", *MODEL, f"init.source={root}/exported")),
    }
    outcomes = run_cases(2, cases)
    assert [outcomes[name][0].get("ending") for name in ("train", "again")] == ["finished", "finished"], outcomes
    assert "names no encoders" not in outcomes["again"][0]["said"]
    return root


def exported(root: Path) -> None:
    """The run's weights with the encoders that it was trained with, as MOVA's folder."""
    if dist.get_rank() == 0:
        with contextlib.chdir(root):
            assert run_words(*command_of_page("export")[0]) == 0
    dist.barrier()


def commands_of_page() -> list[list[str]]:
    """Words of all `mova` commands of docs/encoders.md."""
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mova ")]


def command_of_page(program: str) -> list[list[str]]:
    return [words for words in commands_of_page() if words[0] == program]


def run_words(program: str, *arguments: str) -> int:
    """A program in this process; its exit status."""
    return load(PROGRAMS[program]).run(arguments)


def base_folder(folder: Path, others: dict[str, int]) -> Path:
    """A MOVA folder's encoders, of the seeds `others` where they are named."""
    folder.mkdir()
    for kind, parts in PARTS.items():
        for part in parts:
            (folder / part).symlink_to(tiny_encoders(others.get(kind, 0)) / part)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


def test_what_is_stored_is_what_the_reference_classes_give(root: Path) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = tiny_encoders()
    vae = AutoencoderKLWan.from_pretrained(folder / "video_vae").eval()
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    mean, std = (
        torch.tensor(numbers).view(16, 1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    index = DatasetIndex.open(root / "dataset")
    sources = set()
    for row in range(len(index)):
        clip, bucket = index.read_clip(row), index.bucket_of(row)
        sources.add(clip.meta["source"])
        with open_media(root / "clips" / clip.meta["source"], [48000]) as media, torch.no_grad():
            if clip.video is not None:
                pixels = media.frames(clip.meta["start"], FRAMES, 24, 32, 48)[None]
                first = torch.zeros_like(pixels)
                first[:, :, 0] = pixels[:, :, 0]
                for stored, frames in ((clip.video, pixels), (clip.condition, first)):
                    expected = (vae.encode(frames).latent_dist.mode()[0] - mean) / std
                    assert stored is not None and torch.equal(stored, expected.bfloat16())
                assert clip.condition is not None and torch.equal(clip.condition[:, 0], clip.video[:, 0])
            if clip.audio is not None:
                wave = media.sound(clip.meta["start"], 98000, 48000)
                assert torch.equal(clip.audio, Codecs(_config()).audio.encode(wave[None])[0].bfloat16())
                assert bucket.audio_steps == 103
            words = index.read_text(row, "builtin")
            caption = (root / "clips" / clip.meta["source"]).with_suffix(".txt")
            text = caption.read_text().strip() if caption.exists() else ""
            tokens = tokenizer(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
            rows = model(tokens.input_ids, tokens.attention_mask).last_hidden_state[
                0, : int(tokens.attention_mask.sum())
            ]
            assert words.shape == rows.shape and float((words - rows).norm() / rows.norm()) < 4e-3
    assert sources == {"clip-000000.mp4", "clip-000001.mp4", "mute.mp4", "blind.mp4", "still.mp4"}
    assert len(index.empty_text()) == 1 and index.encoders == Codecs(_config()).fingerprints


def _config() -> EncoderConfig:
    return EncoderConfig("mova", "mova", "mova", str(tiny_encoders()))


def command(program: str, *arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", program, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_commands_of_the_page_compose(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are run word for word, above and below, and those for GPUs and released sizes."""
    found = commands_of_page()
    assert {words[0] for words in found} == {"prepare", "inspect", "caption", "train", "export", "sample"}
    for words in found:
        if words[0] != "inspect":
            assert run_words(*words, "--cfg", "job") == 0, (words, capsys.readouterr().err)


def test_a_prompt_and_a_first_frame_become_picture_and_sound_at_48_khz(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the page's commands: a second captioner, and a clip of the checkpoint."""
    import av

    with av.open(str(root / "clips" / "clip-000000.mp4")) as container:
        next(container.decode(video=0)).to_image().save(root / "first.png")
    (root / "captions.jsonl").write_text('{"source": "clip-000000.mp4", "caption": "A box falls."}\n')
    record = json.loads((root / "dataset" / "prepare.json").read_text())
    record["summary"]["libraries"]["transformers"] = ["4.57"]  # the dataset's text is by another version than ours
    (root / "dataset" / "prepare.json").write_text(json.dumps(record))
    of_checkpoint, of_folder = command_of_page("sample")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with contextlib.chdir(root):
        assert run_words(*command_of_page("inspect")[0]) == 0, capsys.readouterr().err
        assert run_words(*command_of_page("caption")[0]) == 0, capsys.readouterr().err
    assert f"was encoded with transformers 4.57, here is {version('transformers')}" in caplog.text
    assert caplog.text.count("was encoded with") == 1  # the others are as they were
    done = subprocess.run(
        [sys.executable, "-m", "tools.mova", *of_checkpoint], cwd=root, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert DatasetIndex.open(root / "dataset").captioners == ["builtin", "second"]
    with av.open(str(root / "x.mp4")) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert (picture.width, picture.height, picture.frames) == (48, 32, FRAMES)
        assert sound.rate == 48000 and abs(float(sound.duration * sound.time_base) - FRAMES / 24) < 0.03
        for fingerprint in Codecs(_config()).fingerprints.values():
            assert fingerprint in container.metadata["comment"]
    assert of_folder[1] == "model=exported"  # what the next test makes a clip of


def test_an_exported_folder_makes_the_same_clip_with_its_own_encoders(root: Path) -> None:
    request = SampleConfig(
        model=str(root / "exported"), out="", prompt="a red ball falls.", image=f"{root}/clips/clip-000000.mp4",
        sampler=SamplerConfig(steps=2),
    )  # fmt: skip
    named = replace(request, encoder=EncoderConfig(folder=str(tiny_encoders())))
    outcomes = run_cases(1, {"own": (clip_of, (request,)), "named": (clip_of, (named,))})
    own, named_clip = (outcomes[name][0] for name in ("own", "named"))
    assert own.pixels.shape == (3, FRAMES, 32, 48) and own.sound.shape == (FRAMES * 2000,) and own.rate == 48000
    assert torch.equal(own.pixels, named_clip.pixels) and torch.equal(own.sound, named_clip.sound)
    assert own.encoders == Codecs(_config()).fingerprints
    facts = json.loads((root / "exported" / "training.json").read_text())
    assert facts["encoders"] == facts["base_encoders"] == own.encoders
    again = json.loads((root / "runs/again/checkpoints/step-00000002/state.json").read_text())
    assert again["encoders"] == own.encoders


def clip_of(request: SampleConfig) -> Clip:
    return make_clips(request, make_layout(request.parallel, torch.device("cpu")))[0]


def test_a_folder_without_training_facts_is_not_decoded_by_the_built_in_codecs(root: Path) -> None:
    run = {"model": {"video": {"text_dim": 64}}, "objective": {}, "data": {}}
    with pytest.raises(
        RunError, match="does not state which encoders .*: give encoder.folder=FOLDER or encoder=builtin"
    ):
        codecs_of_run(run, EncoderConfig(), HERE.device)
    found = codecs_of_run(run, EncoderConfig(folder=str(tiny_encoders())), HERE.device)
    assert found.fingerprints == Codecs(_config()).fingerprints
    chosen = codecs_of_run(run, EncoderConfig("builtin", "builtin", "builtin"), HERE.device)
    assert chosen.video.name == "builtin"


def refused(program: str, root: Path, kind: str, encoder: EncoderConfig, folder: Path) -> None:
    """Call a program with codecs of which one is another than the run's."""
    run, here = root / "runs" / "first", Codecs(encoder)
    geometry = {"frames": 9, "height": 32, "width": 48, "fps": 24.0}  # so that no dataset is looked at
    if program == "sample checkpoint=":
        make_clips(SampleConfig(checkpoint=str(run), out="", encoder=encoder, **geometry), HERE)  # type: ignore[arg-type]
    elif program == "sample model=":
        make_clips(SampleConfig(model=str(root / "exported"), out="", encoder=encoder, **geometry), HERE)  # type: ignore[arg-type]
    elif program == "sync_score":
        score(SyncScoreConfig(str(run), str(root / "dataset"), "", encoder=encoder), HERE)  # type: ignore[arg-type]
    elif program == "sync_score dataset=":
        bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
        stated = Codecs(_config()).fingerprints | {kind: here.fingerprints[kind]}
        other = make_dataset(folder / "other", [(bucket, 1)], dim=64, encoders=stated)
        score(SyncScoreConfig(str(run), str(other), "", encoder=_config()), HERE)  # type: ignore[arg-type]
    elif program == "watch":
        checkpoint = run / "checkpoints" / "step-00000002"
        rest: Any = ([], None, HERE, None, here, lambda: False)
        sample_checkpoint(checkpoint, WatchConfig(str(run)), *rest)
    elif program == "watch, held-out set":
        watched: Any = SimpleNamespace(root=run, read_config=lambda: {"data": {"valid_path": str(root / "dataset")}})
        orders_of(WatchConfig(str(run)), watched, here)
    elif program == "export base=":
        base = base_folder(folder / "base", {kind: 1})
        export(ExportRequest(run, folder / "out", None, "mova", None, "float32", base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "program",
    ["sample checkpoint=", "sample model=", "sync_score", "sync_score dataset=", "watch", "watch, held-out set",
     "export base="],
)  # fmt: skip
def test_each_program_refuses_each_fingerprint_and_names_both(
    root: Path, tmp_path: Path, program: str, kind: str
) -> None:
    right, other = (Codecs(EncoderConfig("mova", "mova", "mova", str(tiny_encoders(seed)))) for seed in (0, 1))
    mixed: Any = {f"{kind}_folder": str(tiny_encoders(seed=1))}
    with pytest.raises(DataError) as caught:
        refused(program, root, kind, replace(_config(), **mixed), tmp_path)
    message = str(caught.value)
    assert right.fingerprints[kind] in message and other.fingerprints[kind] in message
    assert f"has {kind} of" in message and "encoder.ignore_fingerprints=true" in message
    assert not (tmp_path / "out").exists()


def test_an_export_with_other_encoders_records_them_where_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", {"audio": 1})
    ask = EncoderConfig(ignore_fingerprints=True)
    export(ExportRequest(root / "runs" / "first", tmp_path / "out", None, "mova", None, "float32", base, ask))
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    right, other = (Codecs(EncoderConfig("mova", "mova", "mova", str(tiny_encoders(seed)))) for seed in (0, 1))
    assert facts["encoders"] == right.fingerprints
    assert facts["base_encoders"] == right.fingerprints | {"audio": other.fingerprints["audio"]}
    request: Any = SampleConfig(model=str(tmp_path / "out"), out="", frames=9, height=32, width=48, fps=24.0)
    with pytest.raises(DataError, match="has audio of"):  # its own encoders are not those that it was trained with
        make_clips(request, HERE)  # type: ignore[arg-type]


def test_a_refusal_is_one_line_of_the_program(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_encoders(seed=1)
    right, wrong = (Codecs(EncoderConfig("mova", "mova", "mova", str(one))) for one in (tiny_encoders(), other))
    (tmp_path / "rows.jsonl").write_text('{"source": "clip-000000.mp4", "caption": "a box."}\n')
    words = [f"dataset={root}/dataset", f"table={tmp_path}/rows.jsonl", "captioner=other", f"encoder.folder={other}"]
    assert run_words("caption", *words) == 1
    lines = capsys.readouterr().err.splitlines()
    done = command(
        "tools.sample", f"checkpoint={root}/runs/first", f"encoder.folder={other}", f"out={tmp_path}/x.mp4", "frames=9",
        "height=32", "width=48", "fps=24",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for kind, line in (("text", lines[-1]), ("video", done.stderr.splitlines()[-1])):
        assert line.startswith("error: ") and right.fingerprints[kind] in line and wrong.fingerprints[kind] in line


def test_each_codec_of_a_checkpoint_is_compared(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = OmegaConf.to_container(OmegaConf.load(root / "runs" / "first" / "config.yaml"))
    state = json.loads((root / "runs/first/checkpoints/step-00000002/state.json").read_text())
    assert isinstance(run, dict) and state["encoders"] == Codecs(_config()).fingerprints
    for kind in ("video", "audio", "text"):
        mixed = EncoderConfig(folder=str(tiny_encoders()), **{f"{kind}_folder": str(tiny_encoders(seed=1))})
        with pytest.raises(DataError, match=f"the model has {kind} of {state['encoders'][kind]}, the codec"):
            codecs_of_run(run, mixed, torch.device("cpu"), state["encoders"])  # type: ignore[arg-type]
        mixed.ignore_fingerprints = True
        codecs_of_run(run, mixed, torch.device("cpu"), state["encoders"])  # type: ignore[arg-type]
        assert f"the model has {kind}" in caplog.text
    with pytest.raises(DataError, match="encoder.video=mova needs its weights"):
        codecs_of_run(run, EncoderConfig(), torch.device("cpu"), state["encoders"])  # type: ignore[arg-type]
    data = codecs_of_run(run, _config(), torch.device("cpu"))  # of a checkpoint that names none
    assert data.fingerprints == state["encoders"]
