"""The flat layout of this project: all tensors under the model's own names in one folder, with the whole config.

It stores what the other layouts cannot: what the heads predict, the clock bias, the length of text.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.bridge import BridgeConfig
from model.joint import JointConfig
from model.tower import TowerConfig
from model.weights.configs import check_sizes
from model.weights.files import LayoutError, read_json

FLAT_CLASS = "JointTransformer"


def flat_config(config: JointConfig) -> dict[str, Any]:
    """config.json of the layout."""
    return {"_class_name": FLAT_CLASS, **asdict(config)}


def read_flat(folder: Path) -> JointConfig:
    """The config of a folder. LayoutError for one that is incomplete or impossible."""
    content = read_json(folder / "config.json")
    try:
        values = {key: value for key, value in content.items() if not key.startswith("_")}
        for name in ("video", "audio"):
            check_sizes(values[name], {}, f"{folder}/config.json: {name}")
        video, audio = (TowerConfig(**values.pop(name)) for name in ("video", "audio"))
        return JointConfig(video, audio, BridgeConfig(**values.pop("bridge")), **values)
    except KeyError as error:
        raise LayoutError(f"{folder}/config.json lacks the key {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise LayoutError(f"{folder}/config.json: {error}") from None
