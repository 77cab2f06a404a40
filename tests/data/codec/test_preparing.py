"""data.prepare with MOVA's encoders: batches are a function of the file, devices have processes of their own."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data.prepare.curation
from data.clip import EncodedClip
from data.codec import CodecError, Codecs, EncoderConfig
from data.codec.mova.device import computing
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.media import open_media
from data.prepare.curation import PrepareConfig, prepare
from data.prepare.encode_server import EncodeServers, devices_of
from data.prepare.finish import print_summary
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.pool import _Work
from data.prepare.spool import Spool, read_spool
from data.sources import SourceFile
from data.synthesize import encode_mp4
from data.windows.window import Geometry
from tests.data.codec.test_mova import independent_dac
from tests.encoders import tiny_encoders


def config(root: Path, name: str, **keys: object) -> PrepareConfig:
    encoder = EncoderConfig("mova", "mova", "builtin", str(tiny_encoders()), batch=2)
    return PrepareConfig(
        str(root / "clips"), str(root / name), frames=9, height=16, width=16, text_dim=8, encoder=encoder, **keys
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of five windows with sound, and one of a single window without; encoded by the decoding process itself."""
    root = tmp_path_factory.mktemp("preparing")
    (root / "clips").mkdir()
    random = np.random.default_rng(0)
    frames = list(random.integers(0, 255, (46, 16, 16, 3), np.uint8))
    wave = random.normal(0, 0.1, 92000).astype(np.float32)
    encode_mp4(root / "clips" / "film.mp4", frames, 24, wave, 48000)
    encode_mp4(root / "clips" / "short.mp4", frames[:9], 24, None, 48000)
    prepare(config(root, "local", workers=1))
    return root


def test_windows_of_a_file_are_encoded_together(root: Path) -> None:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(tiny_encoders() / "video_vae").eval()
    numbers = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(one).view(16, 1, 1, 1) for one in numbers)
    index = DatasetIndex.open(root / "local")
    rows = [row for row in range(len(index)) if index.read_meta(row)["source"] == "film.mp4"]
    clips = sorted((index.read_clip(row) for row in rows), key=lambda clip: clip.meta["start"])
    assert len(clips) == 5 and len(index) == 6
    with open_media(root / "clips" / "film.mp4") as media, torch.no_grad():
        windows = torch.stack([media.frames(clip.meta["start"], 9, 24, 16, 16) for clip in clips])
        for first in (0, 2, 4):
            expected = (vae.encode(windows[first : first + 2]).latent_dist.mode() - mean) / std
            for clip, latents in zip(clips[first : first + 2], expected, strict=True):
                assert clip.video is not None and torch.equal(clip.video, latents.bfloat16())


@pytest.mark.slow
def test_a_process_for_each_device_gives_the_same_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.prepare.curation, "devices_of", lambda device: ["cpu", "cpu"])
    servers: list[EncodeServers] = []
    enter, done = EncodeServers.__enter__, _Work.done

    def entered(self: EncodeServers) -> EncodeServers:
        servers.append(enter(self))
        return self

    def killed(self: _Work, *arguments: Any) -> None:
        """In the middle of the unit: its first file is done, the next one has not been handed out."""
        done(self, *arguments)
        for process in servers[0]._processes:
            process.kill()
            process.join()

    with monkeypatch.context() as patch:  # no fault of any clip: nothing is rejected, and the same command goes on
        patch.setattr(EncodeServers, "__enter__", entered)
        patch.setattr(_Work, "done", killed)
        with pytest.raises(DataError, match="the encoder process is gone .*The same command resumes the work"):
            prepare(config(root, "served", workers=1, units=1))
    assert not (root / "served").exists() and not list((root / "served.partial" / "units").glob("*.json"))
    prepare(config(root, "served", workers=2, units=1))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("cpu: at work") for line in lines) == 2
    waits = next(line for line in lines if line.startswith("workers: decoding and scoring"))
    assert all(f"{what} " in waits for what in ("queue", "video", "condition", "audio"))
    summary = json.loads((root / "served" / "prepare.json").read_text())["summary"]
    assert "text" in summary["cpu_seconds"] and "wait for queue (wall)" in summary["cpu_seconds"]
    served, local = (DatasetIndex.open(root / name) for name in ("served", "local"))
    assert served.fingerprint == local.fingerprint and len(served) == 6
    assert served.encoders["video"] == Codecs(config(root, "x").encoder).video.fingerprint


# frames, pictures, sound: its samples, Hz and loudness
CLIPS = {
    "97 frames, sound that ends early at an odd sample": (97, True, (178_001, 44100, 0.1)),
    "193 frames, silence": (193, True, (386_000, 48000, 0.0)),
    "97 frames of sound alone, an odd number of samples": (97, False, (193_993, 48000, 0.1)),
    "49 frames, without sound": (49, True, None),
    "9 frames, a moment of sound": (9, True, (1501, 48000, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_what_a_window_stores_is_what_the_reference_classes_give(name: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    count, pictures, sound = CLIPS[name]
    random = np.random.default_rng(count)
    frames = list(random.integers(0, 255, (count, 16, 16, 3), np.uint8)) if pictures else None
    samples, rate, loudness = sound or (0, 48000, 0.0)
    wave = random.normal(0, loudness, samples).astype(np.float32) if sound else None
    encode_mp4(tmp_path / "clip.mp4", frames, 24, wave, rate)
    clip = windows_of(Pipeline(pipeline_config(count)), tmp_path)[0]
    vae = AutoencoderKLWan.from_pretrained(tiny_encoders() / "video_vae").eval()
    mean, std = (torch.tensor(one).view(16, 1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std))
    with open_media(tmp_path / "clip.mp4", [48000]) as media, torch.no_grad():
        assert (clip.video is not None, clip.audio is not None) == (pictures, bool(sound))
        if clip.video is not None:
            pixels = media.frames(clip.meta["start"], count, 24, 16, 16)[None]
            first = torch.zeros_like(pixels)
            first[:, :, 0] = pixels[:, :, 0]
            for stored, given in ((clip.video, pixels), (clip.condition, first)):
                expected = (vae.encode(given).latent_dist.mode()[0] - mean) / std
                assert stored is not None and torch.equal(stored, expected.bfloat16())
        if clip.audio is not None:
            heard = media.sound(clip.meta["start"], 2000 * count, 48000)
            assert (float(heard.abs().max()) > 0) == (loudness > 0)
            expected = reference_sound(heard)
            assert clip.audio.shape == expected.shape == (-(-2000 * count // 960), 128)
            assert torch.allclose(clip.audio.float(), expected, rtol=2**-7, atol=1e-5)


def reference_sound(wave: torch.Tensor) -> torch.Tensor:
    """Means [La, 128] by transformers' DAC blocks, of sound that zeros fill to whole latents."""
    part = tiny_encoders() / "audio_vae"
    state = load_file(part / "diffusion_pytorch_model.safetensors")
    encoder, _ = independent_dac(state, json.loads((part / "config.json").read_text()))
    padded = torch.nn.functional.pad(wave, (0, -len(wave) % 960))[None, None]
    moments = torch.nn.functional.conv1d(encoder(padded), state["quant_conv.weight"], state["quant_conv.bias"])
    return moments[0, :128].T


def pipeline_config(frames: int) -> PipelineConfig:
    encoder = EncoderConfig("mova", "mova", "builtin", str(tiny_encoders()))
    return PipelineConfig([Geometry(frames, 24, 16, 16)], encoder=encoder)


def windows_of(pipeline: Pipeline, folder: Path) -> list[EncodedClip]:
    """What is to be stored of clip.mp4, as it reaches the shards."""
    path = folder / "clip.mp4"
    with Spool(folder / "spool") as spool:
        result = pipeline.run(SourceFile(path, path.name, path.stat().st_size), spool, lambda done, windows: None)
    assert not result.rejected, result.rejected
    found = list(read_spool(folder / "spool"))
    assert all(one.sample is not None for one in found), [one.row["reason"] for one in found]
    return [EncodedClip.from_members(one.row["key"], *vars(one.sample).values()) for one in found]


def test_latents_that_are_not_finite_are_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip's verdict; a device that fails is none, it ends the work."""
    frames = list(np.zeros((9, 16, 16, 3), np.uint8))
    encode_mp4(tmp_path / "clip.mp4", frames, 24, np.full(18000, 0.1, np.float32), 48000)
    pipeline = Pipeline(replace(pipeline_config(9), encoder=EncoderConfig()))
    codecs = pipeline.encode.codecs
    encode = type(codecs.audio).encode

    def spoiled(self: Any, waveforms: torch.Tensor) -> torch.Tensor:
        found = encode(self, waveforms)
        found[0, 1, 2] = float("nan")
        return found

    monkeypatch.setattr(type(codecs.audio), "encode", spoiled)
    with pytest.raises(AssertionError, match="NaN or inf in the latents of audio"):
        windows_of(pipeline, tmp_path)

    def failing(self: Any, waveforms: torch.Tensor) -> torch.Tensor:
        with computing(torch.device("cpu"), "float32"):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(codecs.audio), "encode", failing)
    with pytest.raises(CodecError, match="too little memory"):
        windows_of(pipeline, tmp_path)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert devices_of("cpu") == []
    for device in ("cuda:99", "gpu", "cuda:x"):
        with pytest.raises(DataError, match=f"device={device}"):
            devices_of(device)


def test_weights_of_another_network_end_the_work_before_a_clip_is_rejected(root: Path, tmp_path: Path) -> None:

    shutil.copytree(tiny_encoders(), tmp_path / "m")
    path = tmp_path / "m" / "video_vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_dim": 16}))
    settings = config(root, "other", workers=1)
    settings.encoder.video_folder = str(tmp_path / "m")
    with pytest.raises(DataError, match="these are weights of another network"):
        prepare(settings)


def test_versions_of_libraries_are_recorded_and_a_difference_is_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((root / "local" / "prepare.json").read_text())["summary"]
    assert summary["libraries"].keys() == {"diffusers", "torch"} and summary["libraries"]["diffusers"] == [
        version("diffusers")
    ]
    print_summary(summary, root)
    assert "WARNING" not in capsys.readouterr().out
    print_summary(summary | {"libraries": {"diffusers": ["0.42.1", "0.43.0"]}}, root)
    assert "WARNING: units were encoded with diffusers 0.42.1 and 0.43.0" in capsys.readouterr().out
