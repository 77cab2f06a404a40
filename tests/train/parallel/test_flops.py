"""Invariant 12: the formula counts what the network does (against torch's own counter) and the paper's sizes."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.bridge import BridgeConfig
from model.joint import JointConfig, JointTransformer
from model.tower import TowerConfig
from tests.train.cases import tiny_config
from train.parallel.flops import forward_flops, step_flops
from train.parallel.parts import ALL, freeze

CONF = Path(__file__).parents[3] / "conf" / "model"


def load(name):
    parts = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return JointConfig(
        video=TowerConfig(**parts.pop("video")), audio=TowerConfig(**parts.pop("audio")),
        bridge=BridgeConfig(**parts.pop("bridge")), **parts,
    )  # fmt: skip


@pytest.mark.parametrize("present", ["video and audio", "video", "audio"])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_formula_counts_what_torch_counts(pooled, present):
    config = tiny_config(pooled_adaln=pooled)
    model = JointTransformer(config)
    video, audio = "video" in present, "audio" in present
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            video=torch.zeros(1, 16, 3, 4, 6) if video else None, audio=torch.zeros(1, 128, 11) if audio else None,
            condition=torch.zeros(1, 20, 3, 4, 6), text=torch.zeros(1, config.text_length, 8), t_video=torch.zeros(1),
            t_audio=torch.zeros(1),
        )  # fmt: skip
    assert forward_flops(config, (3, 4, 6) if video else None, 11 if audio else None).total == counter.get_total_flops()


TRAINED = {
    "all": ALL, "bridge": ["dual_tower_bridge"], "audio": ["audio_dit"], "video": ["video_dit"],
    "towers": ["video_dit", "audio_dit"],
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["full", "custom"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_costs_what_torch_counts_where_parts_are_frozen(name, strategy):
    """Stems apart, of which torch leaves out gradients that nobody asks for: large here, a hundredth in real sizes."""
    config = tiny_config(4)
    config.video.num_layers, config.audio.num_layers = 6, 4
    config.bridge = BridgeConfig(head_dim=48, strategy=strategy)
    model = JointTransformer(config)
    freeze(model, TRAINED[name])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(
            video=torch.zeros(1, 16, 9, 8, 12), audio=torch.zeros(1, 128, 111), condition=torch.zeros(1, 20, 9, 8, 12),
            text=torch.zeros(1, config.text_length, 8), t_video=torch.zeros(1), t_audio=torch.zeros(1),
        )  # fmt: skip
        (out.video.sum() + out.audio.sum()).backward()
    found = step_flops(config, (9, 8, 12), 111, TRAINED[name])
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)
    if name == "all":
        assert found == 3 * forward_flops(config, (9, 8, 12), 111).total


def test_a_modality_alone_costs_nothing_backward_where_its_tower_is_frozen():
    config = tiny_config()
    alone = forward_flops(config, (3, 4, 6), None).total
    assert step_flops(config, (3, 4, 6), None, ["audio_dit"]) == alone
    assert step_flops(config, (3, 4, 6), None, ["video_dit_2"]) == 3 * alone


@pytest.mark.parametrize(
    "name,grid,peta,share", [("mova_360p", (49, 44, 80), 2.76, 55), ("mova_720p", (49, 90, 160), 30.6, 83)]
)
def test_released_sizes(name, grid, peta, share):
    flops = forward_flops(load(name), grid, 403)
    assert flops.total / 1e15 == pytest.approx(peta, rel=0.01)
    assert 100 * flops.attention / flops.total == pytest.approx(share, abs=1)
