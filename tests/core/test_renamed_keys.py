"""Keys that were renamed: an old name is an error that names the new one where a user writes it, and read where it is
stored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from core.errors import RunError, UserError
from core.renamed_keys import RENAMED, translated
from core.run_dir import RunDir
from launch.compose import LaunchConfig, compose_launch, compose_own
from launch.slurm.slurm import SlurmConfig
from train.checkpoint.checkpoint import STATE, read_state
from train.checkpoint.resume import check_run, config_differences, open_run
from train.config import default_values

OF_TRAINING = [old for old in RENAMED if old.split(".")[0] not in ("cluster", "launch")]
OF_LAUNCHING = [old for old in RENAMED if old not in OF_TRAINING]


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def take(config: dict[str, Any], key: str) -> Any:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    return config.pop(last)


def as_then(config: dict[str, Any]) -> dict[str, Any]:
    """A config of today as an earlier version would have stored it."""
    config = json.loads(json.dumps(config))
    for old in OF_TRAINING:
        put(config, old, take(config, RENAMED[old]))
    return config


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    launch = OmegaConf.to_container(OmegaConf.structured(LaunchConfig))
    keys = {**default_values(), **launch, "cluster": OmegaConf.to_container(OmegaConf.structured(SlurmConfig))}
    for old, new in RENAMED.items():
        take(json.loads(json.dumps(keys)), new)
        with pytest.raises(KeyError):
            take(json.loads(json.dumps(keys)), old)


@pytest.mark.parametrize("old", RENAMED)
def test_on_the_command_line_an_old_name_is_an_error_that_names_the_new_one(old: str) -> None:
    with pytest.raises(UserError) as caught:
        if old in OF_LAUNCHING:
            compose_own(["cluster=slurm", f"{old}=1"])
        else:
            compose_launch(["run.id=x", "data.path=x", f"{old}=1"])
    assert RENAMED[old] in str(caught.value) and "\n" not in str(caught.value)


COMPOSE = """
import sys
from pathlib import Path
import yaml
from core.errors import UserError
from launch.compose import compose_launch
for row in sys.argv[1:]:
    key, value = row.split("=")
    group, *path = key.split(".")
    inner = yaml.safe_load(value)
    for part in reversed(path):
        inner = {part: inner}
    if group == "cluster":
        Path("conf/cluster/mine.yaml").write_text(yaml.safe_dump({"defaults": ["slurm_schema", "_self_"], **inner}))
        given = ["cluster=mine"]
    elif group == "launch":
        Path("conf/phases/mine.yaml").write_text(yaml.safe_dump({"one": {"cluster": [f"{key}=1"]}}))
        given = [f"{key}=1"]
    else:
        head = "# @package _global_\\n"
        Path("conf/experiment/mine.yaml").write_text(head + yaml.safe_dump({group: inner}))
        given = ["experiment=mine"]
    try:
        compose_launch(["run.id=x", "data.path=x", *given])
        print("accepted")
    except UserError as error:
        print(error)
"""


def test_in_a_users_own_yaml_an_old_name_is_an_error_that_names_the_new_one(tmp_path: Path) -> None:
    here = Path(__file__).parents[2]
    shutil.copytree(here / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    rows = [f"{old}={{a: 1}}" if old == "data.places" else f"{old}=1" for old in RENAMED]
    done = subprocess.run(
        [sys.executable, "-c", COMPOSE, *rows],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{here}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0 and len(said) == len(RENAMED), done.stderr + done.stdout
    for old, line in zip(RENAMED, said, strict=True):
        assert RENAMED[old] in line, (old, line)
    assert sum("mine.yaml" in line for line in said) == len(RENAMED) - 1  # a launch.* key stands in no group


@pytest.mark.parametrize("old", OF_TRAINING)
def test_a_value_that_is_stored_under_an_old_name_is_one_under_the_new_name(old: str) -> None:
    config: dict[str, Any] = {"steps": 9, "data": {"path": "x"}}
    before, after = json.loads(json.dumps(config)), json.loads(json.dumps(config))
    put(before, old, {"inner": [1, 2]})
    put(after, RENAMED[old], {"inner": [1, 2]})
    assert translated(before) == after == translated(after)
    assert config_differences(translated(before), after, {}) == []


def test_a_run_with_old_names_goes_on_and_a_real_difference_is_seen(tmp_path: Path) -> None:
    run, usual = RunDir(tmp_path / "run"), default_values()
    now = json.loads(json.dumps(usual))
    now["run"]["id"], now["optim"]["decay_steps"], now["objective"]["paired_prob"] = "run", 7, 0.25
    open_run(run, now, usual)
    run.write_status("running")
    run.config.write_text(yaml.safe_dump(as_then(now), sort_keys=False))
    assert "paired_prob" not in run.config.read_text() and run.read_config() == now
    assert check_run(run, now, usual)
    now["objective"]["paired_prob"] = 0.5
    with pytest.raises(RunError, match=r"objective\.paired_prob: 0\.25 -> 0\.5") as caught:
        check_run(run, now, usual)
    assert len(str(caught.value).splitlines()) == 2, "nothing else differs"


def test_the_config_in_a_checkpoint_is_read_under_todays_names(tmp_path: Path) -> None:
    now = default_values()
    (tmp_path / STATE).write_text(json.dumps({"step": 3, "config": as_then(now)}))
    assert read_state(tmp_path) == {"step": 3, "config": json.loads(json.dumps(now))}
