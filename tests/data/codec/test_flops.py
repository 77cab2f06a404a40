"""FLOPs of Wan's VAE by formula against those that torch counts, on tensors without memory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.codec.mova.flops import condition_flops, decode_flops, encode_flops


@pytest.mark.parametrize("frames,height,width", [(1, 32, 48), (5, 64, 32), (17, 32, 48)])
def test_formula_and_count_agree(frames: int, height: int, width: int) -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan(base_dim=16)
        pixels = torch.empty(1, 3, frames, height, width)
        latents = torch.empty(1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(pixels)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latents)
    assert encoding.get_total_flops() == encode_flops(frames, height, width, base=16)
    assert decoding.get_total_flops() == decode_flops(frames, height, width, base=16)


def test_costs_of_the_released_vae() -> None:
    """As counted for the facts of 2026-11-28: TFLOP of 193 frames."""
    for size, encoding, decoding in (((352, 640), 218.8, 368.6), ((720, 1280), 907, 1519.8)):
        assert encode_flops(193, *size) / 1e12 == pytest.approx(encoding, rel=2e-3)
        assert decode_flops(193, *size) / 1e12 == pytest.approx(decoding, rel=2e-3)
    assert condition_flops(193, 352, 640, 29) / encode_flops(193, 352, 640) == pytest.approx(0.61, abs=0.005)
