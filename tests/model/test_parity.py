"""Invariant 1: forward and gradients equal the numbers recorded from the reference implementation.

The fixture lies outside the project (MOVA_PARITY, default ../shared/parity/open); what does not need it stands in
test_joint.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.convert import load_mova

FIXTURE = Path(os.environ.get("MOVA_PARITY", Path(__file__).parents[2].parent / "shared" / "parity" / "open"))
pytestmark = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"no parity fixture at {FIXTURE} (set MOVA_PARITY)")
CASES = (0, 1)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURE / "io.safetensors"), json.loads((FIXTURE / "meta.json").read_text())


def run(model, io, meta, case, rows=None):
    """Joint forward on the recorded inputs of a case; rows picks samples."""
    pick = slice(None) if rows is None else rows
    x = {key.removeprefix(f"case{case}.in."): value for key, value in io.items() if key.startswith(f"case{case}.in.")}
    batch = x["noisy_video"][pick].shape[0]
    return model(
        video=x["noisy_video"][pick], audio=x["noisy_audio"][pick], condition=x["y"][pick], text=x["context"][pick],
        t_video=x["t_video"].expand(batch), t_audio=x["t_audio"].expand(batch), fps=meta["cases"][case]["fps"],
    ), x  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_velocities_losses_and_every_gradient(recorded, case):
    io, meta = recorded
    model = load_mova(FIXTURE, dtype=torch.float32)
    out, x = run(model, io, meta, case)
    assert relative(out.video, io[f"case{case}.out.video_velocity"]) <= 3e-6
    assert relative(out.audio, io[f"case{case}.out.audio_velocity"]) <= 3e-6

    video_loss = (out.video - (x["video_noise"] - x["video_latents"])).square().mean()
    audio_loss = (out.audio - (x["audio_noise"] - x["audio_latents"])).square().mean()
    expected = meta["cases"][case]
    assert video_loss.item() == pytest.approx(expected["video_loss"], rel=1e-6)
    assert audio_loss.item() == pytest.approx(expected["audio_loss"], rel=1e-6)

    (video_loss + audio_loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    stored = {k.removeprefix(f"case{case}.grad."): v for k, v in io.items() if k.startswith(f"case{case}.grad.")}
    assert len(stored) > 10
    for name, gradient in stored.items():
        assert relative(gradients[name], gradient) <= 1e-4, name
    norms = expected["grad_norm"]
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_along_the_way(recorded, case):
    """Where a fault sits: every stem output, Bridge output and block output."""
    io, meta = recorded
    model = load_mova(FIXTURE, dtype=torch.float32)
    seen = {}
    for part, tower in (("video", model.video_dit), ("audio", model.audio_dit)):
        for i, block in enumerate(tower.blocks):
            block.register_forward_hook(lambda _m, _a, out, key=f"{part}.block{i}": seen.update({key: out}))
        tower.head.register_forward_hook(lambda _m, _a, out, key=f"{part}.head": seen.update({key: out}))
        tower.text_embedding.register_forward_hook(lambda _m, _a, o, k=f"{part}.text_embedding": seen.update({k: o}))
        tower.time_embedding.register_forward_hook(lambda _m, _a, o, k=f"{part}.time_embedding": seen.update({k: o}))

    def bridge_hook(_module, args, out):
        seen.update({f"bridge{args[0]}.video": out[0], f"bridge{args[0]}.audio": out[1]})

    model.dual_tower_bridge.register_forward_hook(bridge_hook)
    with torch.no_grad():
        run(model, io, meta, case)
    checked = 0
    for key, value in seen.items():
        name = f"case{case}.mid.{key}"
        if name in io:
            expected = io[name]
            value = value[: expected.shape[0]]  # the reference's time embedding has one row for the whole batch
            assert relative(value, expected) <= 3e-6, key
            checked += 1
    assert checked >= 12


def test_bfloat16_is_no_worse_than_the_reference(recorded):
    io, meta = recorded
    model = load_mova(FIXTURE, dtype=torch.bfloat16)
    with torch.no_grad():
        out, _ = run(model, io, meta, 0)
    assert relative(out.video, io["case0.out.video_velocity"]) <= 9e-3
    assert relative(out.audio, io["case0.out.audio_velocity"]) <= 9e-3
