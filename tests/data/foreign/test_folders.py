"""Latents of others in a folder: whatever the layout, what is stored is what was there; each file gets one verdict."""

import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import data.foreign.unit
import data.import_latents
from data.codec.builtin import BuiltinVideo, text, video
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.foreign.latents import Encoders, Fields, Layouts, Names
from data.import_latents import import_latents
from data.loader.state import DataState
from data.loader.stream import Stream
from tests.data.foreign.latents import (
    FPS,
    LA,
    H,
    T,
    W,
    equal,
    latents,
    put,
    sample,
    settings,
    stored,
    verdicts,
    write_tar,
)
from tests.train import cases
from train.objective.noise import draw
from train.objective.objective import Objective, loss_share


def test_a_folder_becomes_a_dataset_that_trains(tmp_path: Path) -> None:
    """Any subset of the tensors, any floating-point type; a model has a gradient from all that was imported."""
    source, output = tmp_path / "in", tmp_path / "out"
    made = {
        "a": sample(1),
        "deep/b": sample(2, dtype=torch.float32),
        "deep/c": sample(3, "vc", dtype=torch.float16),
        "d": sample(4, "a", dtype=torch.float64),
    }
    for name, tensors in made.items():
        put(source / Path(name).parent, Path(name).name, tensors, f"clip {name}")
    put(
        source,
        "e",
        sample(5),
        caption="",
        caption_long="words",
        fps=FPS,
        scores={"motion": 0.5, "bad name": 1, "x": "y"},
    )
    made["e"] = sample(5)
    record = import_latents(settings(source, output, fields=Fields(caption="caption_long"), text_dim=cases.TEXT_DIM))
    found = stored(output)
    assert set(found) == {f"{name}.safetensors" for name in made}
    for name, tensors in made.items():
        clip, caption, embedding = found[f"{name}.safetensors"]
        equal(clip, tensors)
        assert caption == ("words" if name == "e" else f"clip {name}")
        assert torch.equal(embedding, text.encode(caption, cases.TEXT_DIM).bfloat16())
        expected = {"video": "wan-vae-f32", "audio": "dac-128", "text": text.fingerprint}
        assert clip.meta["encoders"] == expected and clip.meta["fps"] == FPS
        if "video" in tensors:
            geometry = [clip.meta[key] for key in ("frames", "height", "width", "seconds")]
            assert geometry == [17, 8 * H, 8 * W, 1.0]
    assert found["e.safetensors"][0].meta["imported"]["caption_long"] == "words"
    assert found["e.safetensors"][0].meta["scores"] == {"motion": 0.5}
    summary = record["summary"]
    assert (summary["inputs"], summary["stored"], summary["rejected"]) == (5, 5, {})
    assert summary["converted"] == {"float32": 1, "float16": 1, "float64": 1} and summary["without_caption"] == 0
    assert sorted(path.name for path in output.iterdir() if not path.name.endswith(".tar")) == [
        "captioners.json", "empty-text.safetensors", "import.json", "index", "rejected.jsonl",
    ]  # fmt: skip
    index = DatasetIndex.open(output)
    assert index.encoders["video"] == "wan-vae-f32" and "motion" in index.scores
    state = DataState.start(index.fingerprint, [2] * len(index.buckets), seed=3, window=2)
    stream: Stream[Any] = Stream(
        index, state, dp_rank=0, dp_world=1, micro_batch=2, text_length=cases.TEXT, transform=lambda batch: batch
    )
    torch.manual_seed(0)
    model = cases.reference_model(cases.tiny_config(), torch.float32)
    objective, seen = Objective(cases.OBJECTIVE, ("high", "low")), set()
    with stream:
        for _ in range(4):
            for batch in next(stream):
                draws = draw(batch, objective, seed=11)
                share = loss_share(model, batch, draws, cases.OBJECTIVE, objective.expert(batch.step)).share
                share.backward()
                assert torch.isfinite(share) and share > 0
                seen |= set(batch.keys)
        assert state.quarantine == []
    assert seen == {index.key(row) for row in range(len(index))}
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_other_layouts_and_names_are_the_same_samples(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for seed in range(3):
        tensors = sample(seed, dtype=torch.float32)
        put(first, f"{seed}", tensors)
        moved = {
            "z": tensors["video"].permute(1, 0, 2, 3)[None],
            "y": tensors["condition"].permute(1, 2, 3, 0),
            "sound": tensors["audio"].T[None],
            "unrelated": torch.zeros(3, dtype=torch.int64),
        }
        put(other, f"{seed}", moved, num_frames=17, rate=FPS)
    import_latents(settings(first, tmp_path / "a"))
    import_latents(
        settings(
            other,
            tmp_path / "b",
            tensors=Names(video="z", condition="y", audio="sound"),
            layouts=Layouts(video="TCHW", condition="THWC", audio="CL"),
            fields=Fields(fps="rate", frames="num_frames"),
            fps=None,
        )
    )
    mine, theirs = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert mine.keys() == theirs.keys() and len(mine) == 3
    for name, (clip, _, _) in mine.items():
        equal(clip, sample(int(name[0]), dtype=torch.float32))
        equal(theirs[name][0], {kind: getattr(clip, kind) for kind in ("video", "condition", "audio")})
        assert clip.meta["bucket"] == theirs[name][0].meta["bucket"]


def test_every_bad_file_gets_its_verdict(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    good = sample(1)
    put(source, "good", good)
    put(source, "copy", good, "with other words")  # of two equal ones the first is stored
    put(source, "no-condition", sample(2, "va"))
    put(source, "no-video", sample(3, "ca"))
    put(source, "condition-alone", sample(4, "c"))
    put(source, "other-names", {"x": latents(5, 3)})
    put(source, "channels", {**sample(6), "video": latents(6, 4, T, H, W)})
    put(source, "audio-turned", {"audio": latents(7, 128, LA)})
    put(source, "flat", {"audio": latents(8, 128)})
    put(source, "empty", {"audio": torch.zeros(0, 128)})
    put(source, "whole-numbers", {"audio": torch.zeros(LA, 128, dtype=torch.int32)})
    put(source, "batch-of-two", {"audio": latents(9, 2, LA, 128)})
    put(source, "condition-shape", {**sample(10), "condition": latents(10, 16, T + 1, H, W)})
    put(source, "odd", {"video": latents(11, 16, T, H, 5), "condition": latents(11, 16, T, H, 5)})
    put(source, "sound-long", {**sample(12), "audio": latents(12, LA + 3, 128)})
    put(source, "frames", sample(13), frames=16)
    put(source, "rate-word", sample(14), fps="25")
    put(source, "rate-zero", sample(15), fps=0)
    put(source, "nan", {**sample(16), "audio": torch.full((LA, 128), float("nan"))})
    put(source, "inf", {**sample(17), "video": latents(17, 16, T, H, W, dtype=torch.float64) * 1e300})
    put(source, "json-list", sample(18))
    (source / "json-list.json").write_text("[1]")
    put(source, "json-deep", sample(19))
    (source / "json-deep.json").write_text("[" * 100_000 + "]" * 100_000)
    put(source, "json-nan", sample(20))
    (source / "json-nan.json").write_text('{"x": NaN}')
    put(source, "json-surrogate", sample(25))
    (source / "json-surrogate.json").write_text('{"x": "\\ud800"}')
    put(source, "caption-number", sample(26))
    (source / "caption-number.json").write_text('{"caption": 7}')
    put(source, "json-large", sample(21))
    (source / "json-large.json").write_text(json.dumps({"x": "y" * (1 << 20)}))
    put(source, "caption-latin", sample(22))
    (source / "caption-latin.txt").write_bytes("café".encode("latin-1"))
    (source / "no-bytes.safetensors").write_bytes(b"")
    (source / "noise.safetensors").write_bytes(np.random.default_rng(0).bytes(5000))
    (source / "cut.safetensors").write_bytes(save(sample(23))[:-100])
    (source / "huge-header.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    (source / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    (source / "array.npy").write_bytes(b"x")
    (source / "readme.md").write_text("words")
    (source / "gone.safetensors").symlink_to(source / "absent")
    (source / "folder.safetensors").mkdir()
    (source / "loop").symlink_to(source)
    put(source, "large", {"audio": latents(24, 9000, 128)})
    (source / "new\nline.safetensors").write_bytes(b"")
    record = import_latents(settings(source, output, sample_mb=2))
    reasons = {name.removesuffix(".safetensors"): reason for name, reason in verdicts(output).items()}
    expected = {
        "good": "same content as copy.safetensors",
        "no-condition": "has no condition",
        "no-video": "condition without video",
        "condition-alone": "neither video nor audio",
        "other-names": "has none of the tensors video, audio, condition, text; it has x",
        "channels": "video has shape 4x5x4x6, which is 4 channels, expected 16",
        "audio-turned": "50 channels, expected 128; the axes are read as LC: see layouts.audio",
        "flat": "audio has shape 128, expected the axes LC",
        "empty": "audio has shape 0x128",
        "whole-numbers": "audio is int32",
        "batch-of-two": "audio has shape 2x50x128",
        "condition-shape": "condition has shape 16x6x4x6, video 16x5x4x6",
        "odd": "video is 4x5 latents; both must be even",
        "sound-long": "sound has 53 steps .1.060 s .* 17 frames .1.000 s",
        "frames": "16 frames, 5 latent frames stand for 17",
        "rate-word": "fps='25'",
        "rate-zero": "fps=0",
        "nan": "NaN or inf in audio",
        "inf": "NaN or inf in video",
        "json-list": "its json is a list",
        "json-deep": "does not parse .RecursionError",
        "json-nan": "NaN is no JSON",
        "json-surrogate": "can't be stored .UnicodeEncodeError",
        "caption-number": "its caption is not words: 7",
        "json-large": "over 1048576 bytes",
        "caption-latin": "caption",
        "no-bytes": "is not a valid .safetensors",
        "noise": "is not a valid .safetensors",
        "cut": "is not a valid .safetensors",
        "huge-header": "is not a valid .safetensors",
        "weights.pt": "may hold pickled objects",
        "array.npy": "may hold pickled objects",
        "readme.md": "is not a .safetensors",
        "gone": "FileNotFoundError",
        "large": "has 2304.* bytes, a sample may have 2000000",
        "new\\u000aline": "is not a valid .safetensors",
    }
    assert reasons.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.search(pattern, reasons[name]), (name, reasons[name])
    assert set(stored(output)) == {"copy.safetensors"}
    summary = record["summary"]
    assert (summary["inputs"], summary["stored"]) == (len(expected) + 1, 1)
    assert sum(summary["rejected"].values()) == len(expected)


def test_links_in_a_circle_and_pipes_have_their_verdict(tmp_path: Path) -> None:
    put(tmp_path / "raw", "a", sample(1))
    (tmp_path / "raw" / "circle.safetensors").symlink_to("circle.safetensors")
    os.mkfifo(tmp_path / "raw" / "pipe.safetensors")  # whoever opens it waits for ever
    summary = import_latents(settings(tmp_path / "raw", tmp_path / "out"))["summary"]
    assert (summary["stored"], sum(summary["rejected"].values())) == (1, 2)
    write_tar(tmp_path / "tars" / "a.tar", [("a.v.safetensors", save(sample(1)))])
    os.mkfifo(tmp_path / "tars" / "pipe.tar")
    members = {kind: "v.safetensors" for kind in ("video", "audio", "condition")}
    summary = import_latents(settings(tmp_path / "tars", tmp_path / "out2", members=members))["summary"]
    assert (summary["stored"], sum(summary["rejected"].values())) == (1, 1)


def test_the_output_may_lie_in_the_source(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path, str(seed), sample(seed))
    config = settings(tmp_path, tmp_path / "out")
    summary = import_latents(config)["summary"]
    assert (summary["inputs"], summary["stored"]) == (3, 3)
    assert import_latents(config)["summary"] == summary  # complete already: the same files


def test_a_full_disk_is_no_files_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        put(tmp_path / "raw", str(seed), sample(seed))

    class Full:
        """A data base on a disk that is full from the second sample on."""

        def __init__(self, base: sqlite3.Connection):
            self.base, self.inserts = base, 0

        def execute(self, query: str, *values: Any) -> Any:
            self.inserts += query.startswith("INSERT")
            if self.inserts == 2:
                raise sqlite3.OperationalError("database or disk is full")
            return self.base.execute(query, *values)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

    real = data.import_latents.open_seen
    with monkeypatch.context() as patch:
        patch.setattr(data.import_latents, "open_seen", lambda path: Full(real(path)))
        with pytest.raises(DataError, match="disk is full.*free space, then run the same command again"):
            import_latents(settings(tmp_path / "raw", tmp_path / "out"))
    assert import_latents(settings(tmp_path / "raw", tmp_path / "out"))["summary"]["stored"] == 3


def test_nothing_but_bad_files_makes_no_dataset(tmp_path: Path) -> None:
    put(tmp_path / "in", "a", sample(2, "va"))
    with pytest.raises(DataError, match="nothing of 1 in .* 1 x has no condition: .*rejected.jsonl"):
        import_latents(settings(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_condition_is_made_for_the_built_in_codec_alone(tmp_path: Path, frames: int) -> None:
    """It is what preparing the same frames would store."""
    pixels = torch.rand(3, 4 * frames - 3, 32, 48, generator=torch.Generator().manual_seed(7)) * 2 - 1
    put(tmp_path / "in", "a", {"video": video.encode(pixels)})
    import_latents(settings(tmp_path / "in", tmp_path / "out", encoders=Encoders(video=video.fingerprint)))
    clip, *_ = stored(tmp_path / "out")["a.safetensors"]
    assert torch.equal(
        clip.condition, BuiltinVideo().encode_condition(pixels[None, :, 0], 4 * frames - 3)[0].bfloat16()
    )


def test_embeddings_of_another_text_encoder(tmp_path: Path) -> None:
    """Stored without their padding, beside the empty prompt that was given; the captions stay readable."""
    source = tmp_path / "in"
    embeddings = {name: latents(seed, 7, 12, dtype=torch.float32) for seed, name in enumerate(("a", "b"))}
    put(source, "a", {**sample(1), "text": torch.cat([embeddings["a"], torch.zeros(505, 12)])[None]}, "a cat")
    put(source, "b", {**sample(2), "text": embeddings["b"]}, "a dog")
    put(source, "c", {**sample(3), "text": latents(1, 7, 10)})
    put(source, "d", sample(4))
    put(source, "e", {**sample(5), "text": torch.full((2, 12), float("inf"))})
    put(source, "f", {**sample(6), "text": torch.zeros(3, 12)})
    empty = latents(9, 1, 2, 12)
    save_file({"text": empty}, tmp_path / "empty.safetensors")
    encoders = Encoders(video="wan", audio="dac", text="umt5-xxl")
    output = tmp_path / "out"
    import_latents(
        settings(source, output, encoders=encoders, empty_text=str(tmp_path / "empty.safetensors"), captioner="qwen")
    )
    found = stored(output)
    assert set(found) == {"a.safetensors", "b.safetensors", "f.safetensors"}
    for name, caption in (("a", "a cat"), ("b", "a dog")):
        clip, words, embedding = found[f"{name}.safetensors"]
        assert torch.equal(embedding, embeddings[name].bfloat16()) and words == caption
        assert clip.meta["encoders"]["text"] == "umt5-xxl"
    assert found["f.safetensors"][2].shape == (1, 12)
    reasons = verdicts(output)
    assert "10 channels, expected 12" in reasons["c.safetensors"] and "has no text" in reasons["d.safetensors"]
    assert "NaN or inf in text" in reasons["e.safetensors"]
    index = DatasetIndex.open(output)
    assert torch.equal(index.empty_text(), empty[0]) and index.captioners == ["qwen"] and index.text_dim == 12


def test_the_program(tmp_path: Path) -> None:
    put(tmp_path / "in", "a", {"lat": sample(1)["video"], "condition": sample(1)["condition"]}, "words")
    command = [sys.executable, "-m", "data.import_latents", f"source={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, "fps=17", "encoders.video=wan", "tensors.video=lat"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "samples: 1 found, 1 stored, 0 rejected" in done.stdout
    clip, *_ = stored(tmp_path / "out")["a.safetensors"]
    assert torch.equal(clip.video, load_file(tmp_path / "in" / "a.safetensors")["lat"])
