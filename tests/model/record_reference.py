"""Record what the reference implementation says of the weights and inputs of reference.py.

    git clone https://github.com/OpenMOSS/MOVA
    pip install diffusers==0.36.0 einops            # beside torch and numpy, in an environment of its own
    PYTHONPATH=.:MOVA python -m tests.model.record_reference MOVA

Writes tests/model/recorded/CASE.{json,safetensors}: outputs, hidden states, losses, and of every parameter name, shape
and gradient in two numbers. The reference's own modules and its own `inference_single_step` run, on the CPU in float32
with one thread (where that function names bfloat16 it is given float32). test_parity.py compares.
"""

import ast
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from unittest.mock import patch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its functions, as they are written

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.model.reference import CASES, inputs, part_settings, summary, weight

RECORDED = Path(__file__).parent / "recorded"
FORWARDS = ("inference_single_step", "forward_dual_tower_dit")


class Float32:
    """torch, whose bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def forwards(source: Path, **known: Any) -> dict[str, Any]:
    """The two functions of the reference's training pipeline that make up a forward; the pipeline itself can't be
    imported without its codecs."""
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    pipeline = next(node for node in classes if node.name == "MOVATrain")
    found = [node for node in pipeline.body if isinstance(node, ast.FunctionDef) and node.name in FORWARDS]
    assert len(found) == len(FORWARDS)
    names: dict[str, Any] = {"torch": Float32(), "Optional": Optional, "DeviceMesh": Any, **known}
    exec(compile(ast.Module(found, []), str(source), "exec"), names)
    return {name: names[name] for name in FORWARDS}


def build(case: str) -> dict[str, nn.Module]:
    """The reference's modules by folder, with the weights of the case."""
    from mova.diffusion.models.interactionv2 import DualTowerConditionalBridge
    from mova.diffusion.models.wan_audio_dit import WanAudioModel
    from mova.diffusion.models.wan_video_dit import WanModel

    kinds = {"audio_dit": WanAudioModel, "dual_tower_bridge": DualTowerConditionalBridge}
    modules = {part: kinds.get(part, WanModel)(**given) for part, given in part_settings(CASES[case]).items()}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            parameter.data = weight(case, part, name, tuple(parameter.shape))
    return modules


def record(case: str, source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, what is no tensor) of a case."""
    from mova.diffusion.models.wan_video_dit import sinusoidal_embedding_1d

    one, given, modules = CASES[case], inputs(case), build(case)
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {"parts": {}, "losses": {}, "gradients": {}}
    audio, bridge = modules["audio_dit"], modules["dual_tower_bridge"]
    functions = forwards(source, sinusoidal_embedding_1d=sinusoidal_embedding_1d)
    run = SimpleNamespace(audio_dit=audio, dual_tower_bridge=bridge, use_gradient_checkpointing=False, training=True)
    if bridge.trainable_condition_scale:  # the pipeline hands over 1.0, which would leave it out
        bridge.forward = without_scale(bridge.forward)  # type: ignore[method-assign]
    run.forward_dual_tower_dit = lambda **rest: functions["forward_dual_tower_dit"](run, **rest)
    for expert in one.experts:
        asked = (
            run, modules[expert], given["video"], given["audio"], given["condition"], given["text"],
            torch.tensor([one.times[0]]), torch.tensor([one.times[1]]), one.fps,
        )  # fmt: skip
        hidden = watch(modules[expert], audio, bridge) if expert == one.experts[0] else {}
        video_out, audio_out = functions["inference_single_step"](*asked)
        tensors |= {f"{expert}.video": video_out, f"{expert}.audio": audio_out}
        tensors |= {f"hidden.{name}": value for name, value in hidden.items()}
        losses = [(video_out - given["goal_video"]).square().mean(), (audio_out - given["goal_audio"]).square().mean()]
        told["losses"][expert] = [loss.item() for loss in losses]
        if expert == one.experts[0]:
            sum(losses).backward()
    for part, module in modules.items():
        parameters = dict(module.named_parameters())
        told["parts"][part] = {
            "config": {key: value for key, value in module.config.items() if not key.startswith("_")},
            "shapes": {name: list(value.shape) for name, value in module.state_dict().items()},
        }
        told["gradients"] |= {
            f"{part}.{name}": summary(case, part, name, value.grad)
            for name, value in parameters.items()
            if value.grad is not None
        }
    return {name: value.detach().contiguous() for name, value in tensors.items()}, told


def without_scale(forward: Any) -> Any:
    """A Bridge's forward that takes its own scale."""
    return lambda *args, **rest: forward(*args, **{**rest, "condition_scale": None})


def watch(video: nn.Module, audio: nn.Module, bridge: nn.Module) -> dict[str, Tensor]:
    """Fills with the hidden states after each block and each place of the Bridge, as the modules run."""
    hidden: dict[str, Tensor] = {}
    for name, tower in (("video", video), ("audio", audio)):
        for number, block in enumerate(tower.blocks):
            block.register_forward_hook(lambda _m, _a, out, key=f"block{number}.{name}": hidden.update({key: out}))
    inner = bridge.forward

    def forward(layer: int, *rest: Any, **named: Any) -> Any:
        out = inner(layer, *rest, **named)
        hidden.update({f"bridge{layer}.video": out[0], f"bridge{layer}.audio": out[1]})
        return out

    bridge.forward = forward  # type: ignore[method-assign]
    return hidden


def main(folder: Path) -> None:
    """The program."""
    torch.set_num_threads(1)
    source = folder / "mova" / "diffusion" / "pipelines" / "mova_train.py"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    about = {
        "source": "https://github.com/OpenMOSS/MOVA", "commit": commit.stdout.strip(),
        "date": date.today().isoformat(), "torch": torch.__version__, "device": "CPU, float32, 1 thread",
    }  # fmt: skip
    RECORDED.mkdir(exist_ok=True)
    for case in CASES:
        with patch("torch.cuda.is_available", lambda: False):
            tensors, told = record(case, source)
        save_file(tensors, RECORDED / f"{case.replace(' ', '-')}.safetensors")
        (RECORDED / f"{case.replace(' ', '-')}.json").write_text(json.dumps(about | told, indent=1) + "\n")
        print(f"{case}: {len(tensors)} tensors, losses {told['losses']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
