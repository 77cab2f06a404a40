"""The model of a run that starts from given weights and chooses no model: that of the weights.

overrides = with_model(SCHEMA, ["init.source=MOVA-360p", "run.id=a", ...])   # adds "model=of_source"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.compose import Schema, compose
from core.errors import RunError, UserError
from core.run_dir import RunDir
from model.joint import JointConfig
from train.start.config import InitConfig, init_of

CHOICE = "of_source"  # in Hydra's group "model"
DEFAULT = "tiny"  # of conf/train.yaml


def with_model(schema: Schema, overrides: Sequence[str], coming: Mapping[str, JointConfig] | None = None) -> list[str]:
    """The overrides of conf/train.yaml, with the model of the sources added if they name sources and no model.

    schema: of the training config; `coming`: models of sources that are not there yet. An existing run keeps its
    model, so that a resume does not need the sources. Overrides that do not compose are returned unchanged: composing
    them reports why. RunError as `open_sources`; also if the sources do not determine the model.
    """
    given = list(overrides)
    if not any(o.lstrip("+").startswith(("init.", "experiment=")) for o in given) or any(o[:1] == "-" for o in given):
        return given
    try:
        composed = compose(schema, given)
        init = init_of({"init": OmegaConf.to_container(composed.config.init, resolve=True)})
    except (UserError, OmegaConfBaseException, ValueError):
        return given
    named = any(o.partition("=")[0].lstrip("+~") == "model" for o in given)
    if not init.given() or named or composed.choices.get("model") != DEFAULT:
        return given
    model = _of_run(composed.config, init) or _of_sources(init, coming or {})
    ConfigStore.instance().store(group="model", name=CHOICE, node=model)
    return [*given, f"model={CHOICE}"]


def _of_run(composed: DictConfig, init: InitConfig) -> dict[str, Any] | None:
    """The model of the run that these overrides resume, None if it is new or named other sources."""
    if OmegaConf.is_missing(composed.run, "id"):
        return None
    try:
        earlier = RunDir.of(composed.run.root, composed.run.id).read_config()
        return earlier["model"] if init_of(earlier) == init else None
    except (OSError, RunError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _of_sources(init: InitConfig, coming: Mapping[str, JointConfig]) -> dict[str, Any]:
    if (known := coming.get(init.source or "")) is not None:
        return asdict(known)
    from train.start.sources import open_sources  # torch's format of checkpoints: 0.2 s

    model = open_sources(init).model
    if model is None:
        raise RunError(
            "init: a video and an audio tower determine the model's sizes; if one of them is fresh, give model="
        )
    return asdict(model)
