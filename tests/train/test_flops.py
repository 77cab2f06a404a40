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
from train.flops import forward_flops

CONF = Path(__file__).parents[2] / "conf" / "model"


def load(name):
    parts = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return JointConfig(
        video=TowerConfig(**parts.pop("video")), audio=TowerConfig(**parts.pop("audio")),
        bridge=BridgeConfig(**parts.pop("bridge")), **parts,
    )  # fmt: skip


@pytest.mark.parametrize("pooled", [False, True])
def test_the_formula_counts_what_torch_counts(pooled):
    config = tiny_config(pooled_adaln=pooled)
    model = JointTransformer(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            video=torch.zeros(1, 16, 3, 4, 6), audio=torch.zeros(1, 128, 11), condition=torch.zeros(1, 20, 3, 4, 6),
            text=torch.zeros(1, config.text_length, 8), t_video=torch.zeros(1), t_audio=torch.zeros(1),
        )  # fmt: skip
    assert forward_flops(config, (3, 4, 6), 11).total == counter.get_total_flops()


@pytest.mark.parametrize(
    "name,grid,peta,share", [("mova_360p", (49, 44, 80), 2.76, 55), ("mova_720p", (49, 90, 160), 30.6, 83)]
)
def test_released_sizes(name, grid, peta, share):
    flops = forward_flops(load(name), grid, 403)
    assert flops.total / 1e15 == pytest.approx(peta, rel=0.01)
    assert 100 * flops.attention / flops.total == pytest.approx(share, abs=1)
