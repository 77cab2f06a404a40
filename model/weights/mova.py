"""MOVA's folder: its index, and the config values that its layout cannot express."""

from __future__ import annotations

from typing import Any

from model.joint import JointConfig

TEXT_LENGTH = 512  # rows of text that the reference pads to and attends
INDEX_FILE = "model_index.json"
# Part: [module, class] as the reference's pipeline names them. T5Tokenizer is another class before transformers 5.
COMPONENTS = {
    "audio_dit": ["mova.diffusion.models.wan_audio_dit", "WanAudioModel"],
    "audio_vae": ["mova.diffusion.models.dac_vae", "DAC"],
    "dual_tower_bridge": ["mova.diffusion.models.interactionv2", "DualTowerConditionalBridge"],
    "scheduler": ["mova.diffusion.schedulers.flow_match_pair", "FlowMatchPairScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "video_dit": ["mova.diffusion.models.wan_video_dit", "WanModel"],
    "video_dit_2": ["mova.diffusion.models.wan_video_dit", "WanModel"],
    "video_vae": ["diffusers", "AutoencoderKLWan"],
}
ENCODERS = ("video_vae", "audio_vae", "text_encoder", "tokenizer", "scheduler")  # folders that training never writes


def model_index(config: JointConfig, boundary_ratio: float) -> dict[str, Any]:
    """model_index.json. `boundary_ratio`: the noise level, 0..1, that separates the experts."""
    return {
        "_class_name": "MOVA",
        "audio_vae_type": config.audio.rope,
        "boundary_ratio": boundary_ratio if config.two_experts else None,
        **{
            part: value if part != "video_dit_2" or config.two_experts else [None, None]
            for part, value in COMPONENTS.items()
        },
    }


def inexpressible(config: JointConfig) -> list[str]:
    """ "key=value" for settings that the configs of MOVA and diffusers cannot express, so that a loader would use the
    reference's value."""
    lost = []
    if config.prediction != "velocity":
        lost.append(f"model.prediction={config.prediction}")
    if config.bridge.clock_bias:
        # Its effect lies in the biases, which are written; what is lost is how a fresh Bridge would start.
        lost.append(f"model.bridge.clock_bias={config.bridge.clock_bias}")
    if config.text_length != TEXT_LENGTH:
        lost.append(f"model.text_length={config.text_length}")
    return lost
