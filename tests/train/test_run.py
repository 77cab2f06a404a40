"""Runs as a user starts them: invariant 5 (stop and resume bit for bit), and bad input with its one clear message."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from tests.train.runs import metrics, status

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
MUTE = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=False)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Datasets for all runs of this module: training, validation, one that is damaged, one of another text width."""
    root = tmp_path_factory.mktemp("runs")
    make_dataset(root / "data", [(CLIP, 9), (MUTE, 5), (CLIP, 6)])
    make_dataset(root / "valid", [(CLIP, 4)], seed=1)
    make_dataset(root / "nan", [(CLIP, 8)], nan=2)
    make_dataset(root / "wide", [(CLIP, 8)], dim=7)
    return root


@pytest.fixture(scope="module")
def finished(place):
    """Eight steps without a break, and the same run stopped by SIGTERM, resumed, and resumed from a kept checkpoint."""
    data, valid = place / "data", f"data.valid_path={place / 'valid'}"
    return run_cases(
        2,
        {
            "unbroken": (runs.train, (place, data, "unbroken", "steps=8", valid)),
            "stopped": (with_kill, (4, place, data, "broken", "steps=8", valid)),
            "resumed": (runs.train, (place, data, "broken", "steps=8", valid)),
            "poisoned": (poisoned, (place, data, "poisoned", "steps=6", "data.micro_batch=2")),
            "sequence": (runs.train, (place, data, "sequence", "steps=8", valid, "parallel.ulysses=2")),
            "extended": (runs.train, (place, data, "broken", "steps=9", "checkpoint.keep=1", valid)),
        },
    )


def with_kill(after, *arguments):
    return runs.train(*arguments, kill_after=after)


def test_a_stopped_and_resumed_run_is_the_unbroken_one_bit_for_bit(place, finished):
    assert [r["ending"] for r in finished["unbroken"]] == ["finished"] * 2
    assert [r["ending"] for r in finished["stopped"]] == ["stopped"] * 2
    assert "stopped at step 5 of 8" in finished["stopped"][0]["said"]
    assert "resumed from" in finished["resumed"][0]["said"] and "at step 5" in finished["resumed"][0]["said"]
    whole, valid = metrics(place, "unbroken")
    broken, broken_valid = metrics(place, "broken")
    assert [x["step"] for x in whole] == list(range(8))
    assert broken[:8] == whole and len(broken) == 9  # all losses, norms and rates, to the last bit
    assert [x["step"] for x in valid] == [0, 3, 6, 8]
    assert broken_valid[:-1] == valid
    assert status(place, "broken")["state"] == "finished"


def test_two_ranks_that_share_each_sample_follow_the_same_curve(place, finished):
    """Sequence parallelism through the whole trainer: one reads for both, both have one noise, the losses add up."""
    assert [r["ending"] for r in finished["sequence"]] == ["finished"] * 2
    for found, expected in zip(metrics(place, "sequence"), metrics(place, "unbroken"), strict=True):
        assert found[0].keys() == expected[0].keys() and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            for key in a.keys() & {
                "train/loss",
                "train/loss_video",
                "train/loss_audio",
                "valid/loss",
                "valid/video",
                "valid/audio",
            }:
                assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=2e-3)), (a["step"], key)
        assert found[0].get("train/loss", 1.0) == pytest.approx(expected[0].get("train/loss", 1.0), rel=1e-6)


def poisoned(*arguments):
    return runs.train(*arguments, poison=2)


def test_a_nan_seen_on_the_device_names_its_sample_on_all_ranks_and_the_run_goes_on(place, finished):
    assert [r["ending"] for r in finished["poisoned"]] == ["finished"] * 2
    training, _ = metrics(place, "poisoned")
    assert [x["step"] for x in training if x["train/grad_norm"] is None] == [
        1
    ]  # its update was suppressed, the others not
    state = json.loads((place / "poisoned" / "checkpoints" / "step-00000006" / "state.json").read_text())
    (entry,) = state["data"]["quarantine"]
    assert entry["step"] == 1 and entry["reason"] == "NaN or inf on the device"
    assert f"sample {entry['key']} holds NaN or inf" in finished["poisoned"][0]["said"]


def test_old_checkpoints_go_only_after_newer_ones_came(place, finished):
    left = sorted(path.name for path in (place / "broken" / "checkpoints").iterdir())
    assert left == ["step-00000009"]
    assert sorted(path.name for path in (place / "unbroken" / "checkpoints").iterdir()) == ["step-00000008"]


def test_only_the_first_rank_speaks(finished):
    assert finished["unbroken"][1]["said"] == ""


def test_mute_clips_and_every_modality_are_counted(place, finished):
    training, _ = metrics(place, "unbroken")
    mute = [x for x in training if x["train/loss_audio"] is None]
    assert 1 <= len(mute) < len(training)
    assert all(x["train/loss"] == pytest.approx(x["train/loss_video"], rel=1e-6) for x in mute)
    heard = [x for x in training if x["train/loss_audio"] is not None]
    assert all(
        x["train/loss"] == pytest.approx(x["train/loss_video"] + 0.2 * x["train/loss_audio"], rel=1e-5) for x in heard
    )


@pytest.fixture(scope="module")
def alone(place, finished):
    """One process: the same run at another world size, damage, and what is refused."""
    data = place / "data"
    broken = place / "broken" / "checkpoints"
    half = broken / "step-00000099"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    shutil.copytree(broken / "step-00000009", broken / "step-00000050")
    with open(broken / "step-00000050" / "__1_0.distcp", "ab") as file:
        file.truncate(100)
    shutil.copytree(place / "broken", place / "other")
    text = (place / "other" / "config.yaml").read_text()
    (place / "other" / "config.yaml").write_text(
        text.replace("ffn_dim: 64", "ffn_dim: 32").replace("id: broken", "id: other")
    )
    (place / "empty").mkdir()
    shutil.copytree(data, place / "cut")
    shard = place / "cut" / "av-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    valid = f"data.valid_path={place / 'valid'}"
    return run_cases(
        1,
        {
            "alone": (runs.train, (place, data, "alone", "steps=8", valid, "data.micro_batch=2")),
            "half_written": (runs.train, (place, data, "broken", "steps=10", valid)),
            "nan": (runs.train, (place, place / "nan", "nan", "steps=2", "data.quarantine_budget=0.5")),
            "nan_resumed": (runs.train, (place, place / "nan", "nan", "steps=3", "data.quarantine_budget=0.5")),
            "another_dataset": (runs.train, (place, place / "nan", "broken", "steps=12")),
            "another_model": (runs.train, (place, data, "broken", "model.video.ffn_dim=32")),
            "weights_of_another": (
                runs.train,
                (place, data, "other", "model.video.ffn_dim=32", "model.audio.ffn_dim=32"),
            ),
            "missing": (runs.train, (place, place / "nowhere", "m", "steps=1")),
            "empty": (runs.train, (place, place / "empty", "m", "steps=1")),
            "cut": (runs.train, (place, place / "cut", "m", "steps=1")),
            "text_width": (runs.train, (place, place / "wide", "m", "steps=1")),
            "layout": (runs.train, (place, data, "m", "parallel.dp_shard=3")),
            "bad_id": (runs.train, (place, data, "a/b", "steps=1")),
            "stop_file": (stop_by_file, (place, data)),
            "older": (of_an_older_version, (place, data)),
        },
    )


def of_an_older_version(place, data):
    """A run that asked for `data.captioner=plain`, when segments did not record whose captions they read."""
    runs.train(place, data, "older", "steps=2", "data.captioners={plain: 1}")
    root = place / "older"
    checkpoint = root / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    for config in (state["config"], written := yaml.safe_load((root / "config.yaml").read_text())):
        del config["data"]["captioners"]
        config["data"]["captioner"] = "plain"
    del state["data"]["empty_captions"]
    for segment in state["data"]["segments"]:
        for name in ("captioners", "texts", "order_step"):
            del segment[name]
    (root / "config.yaml").write_text(yaml.safe_dump(written))
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    marker = json.loads((checkpoint / "COMMITTED").read_text())
    marker["files"]["state.json"] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / "COMMITTED").write_text(json.dumps(marker))
    results = [runs.train(place, data, "older", "steps=4", *mix) for mix in ([], ["data.captioners={plain: 1}"])]
    return results, json.loads((root / "checkpoints" / "step-00000004" / "state.json").read_text())["data"]


def stop_by_file(place, data):
    """A file `stop` that appears while the run is under way."""
    timer = threading.Timer(1.5, (place / "file" / "stop").touch)
    timer.start()
    result = runs.train(place, data, "file", "steps=100000", "validation.every=0")
    timer.join()
    return result | {"left": (place / "file" / "stop").exists(), "state": status(place, "file")["state"]}


def test_one_process_follows_the_same_curve_as_two(place, alone):
    assert alone["alone"][0]["ending"] == "finished"
    (one, one_valid), (two, two_valid) = metrics(place, "alone"), metrics(place, "unbroken")
    for a, b in zip(one + one_valid, two + two_valid, strict=True):
        for key, value in a.items():
            expected = pytest.approx(b[key], rel=2e-3) if isinstance(value, float) else b[key]
            assert value == expected, (a["step"], key)
    assert one[0]["train/loss"] == pytest.approx(two[0]["train/loss"], rel=1e-6)


def test_a_half_written_and_a_damaged_checkpoint_are_passed_over(place, alone):
    """They are named (by the logger of train.checkpoint.checkpoint); the run goes on from the last good one."""
    assert alone["half_written"][0]["ending"] == "finished"
    assert "resumed from" in alone["half_written"][0]["said"] and "step-00000009" in alone["half_written"][0]["said"]


def test_a_nan_in_a_latent_costs_the_sample_not_the_run(place, alone):
    assert alone["nan"][0]["ending"] == alone["nan_resumed"][0]["ending"] == "finished"
    training, _ = metrics(place, "nan")
    assert [x["step"] for x in training] == [0, 1, 2]
    assert all(math.isfinite(x["train/loss"]) for x in training)
    state = json.loads((place / "nan" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert [entry["shard"] for entry in state["data"]["quarantine"]] == ["av-000000.tar"]


@pytest.mark.parametrize(
    "case,message",
    [
        (
            "another_dataset",
            r"(?s)past 10 steps can't be changed \(recorded -> now\).*dataset: [0-9a-f]{64} -> [0-9a-f]{64}",
        ),
        ("another_model", r"(?s)exists with another config.*model.video.ffn_dim: 64 -> 32"),
        ("missing", "nowhere does not exist.*mova prepare"),
        ("empty", "empty .*no index.*|empty.*index"),
        ("cut", "av-000000.tar.*bytes"),
        ("text_width", "text embeddings of width 7, the model reads 6; prepare the data with text_dim=6"),
        ("layout", "dp_replicate=1 x parallel.dp_shard=3 = 3, but the run has 1 ranks"),
        ("bad_id", "run.id='a/b': use letters"),
    ],
)
def test_bad_input_ends_in_one_clear_message(alone, case, message):
    assert "error" in alone[case][0], alone[case]
    import re

    assert re.search(message, alone[case][0]["error"]), alone[case][0]["error"]


def test_weights_of_another_model_are_refused_side_by_side(alone):
    error = alone["weights_of_another"][0]["error"]
    assert "written under another config" in error and "model.video.ffn_dim: 64 -> 32" in error


def test_a_run_of_an_older_version_goes_on_with_its_captioner(alone):
    (other, same), state = alone["older"][0]
    assert "captioners: plain 1 -> each dataset's first" in other["error"]
    assert same["ending"] == "finished" and state["position"] == 4
    [segment] = state["segments"]
    assert segment["captioners"] == {"plain": "1"} and segment["texts"]  # recorded from now on


def test_a_stop_file_ends_the_run_and_is_taken_away_on_resume(alone):
    result = alone["stop_file"][0]
    assert result["ending"] == result["state"] == "stopped" and result["left"]


def test_killed_at_any_moment_and_resumed_equals_the_unbroken_run(place, finished):
    """The real command under torchrun, killed with SIGKILL; the second start repeats the steps after the checkpoint."""
    python = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    command = [
        *python, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "train", *runs.SMALL,
        f"run.root={place}", "run.id=killed", f"data.path={place / 'data'}", f"data.valid_path={place / 'valid'}",
        "checkpoint.every=2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    lines = place / "killed" / "metrics.jsonl"
    first = subprocess.Popen([*command, "steps=100000"], env=environment, cwd=place, start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (lines.exists() and lines.read_text().count('"train/grad_norm"') >= 5):
        assert first.poll() is None
        time.sleep(0.02)
    second = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)
    assert second.returncode != 0 and "run 'killed' is already being trained by process" in second.stderr
    launcher = psutil.Process(first.pid)
    workers = launcher.children(recursive=True)
    for process in [launcher, *workers]:
        process.kill()
    psutil.wait_procs([launcher, *workers], timeout=30)
    step = json.loads(lines.read_text().splitlines()[-1])["step"]
    done = subprocess.run([*command, "steps=8"] if step < 8 else [*command, f"steps={step + 3}"], env=environment,
                          cwd=place, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed from" in done.stderr
    training, _ = metrics(place, "killed")
    assert [x["step"] for x in training] == list(range(len(training))) and len(training) >= 8
    whole, _ = metrics(place, "unbroken")
    assert training[:8] == whole
    assert status(place, "killed")["state"] == "finished"


def test_wandb_offline_run_carries_the_name_and_the_config(place, finished, tmp_path):
    """Written by a run, read back with wandb's own reader."""
    done = run_cases(1, {"wandb": (runs.train, (tmp_path, place / "data", "seen", "steps=2", "monitor.wandb=offline"))})
    assert done["wandb"][0]["ending"] == "finished"
    files = list((tmp_path / "seen" / "wandb").glob("offline-run-*/run-seen.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 500


def test_training_learns():
    """The loss on one batch, again and again, falls: the gradient points where it should."""
    from tests.train import cases
    from train.engine.optim import ShardedOptimizer
    from train.engine.optim_config import OptimConfig

    model = cases.reference_model(cases.tiny_config(), torch.float32)
    optimizer = ShardedOptimizer(model, OptimConfig(lr_tower=3e-3, lr_bridge=3e-3, warmup=0), None)
    losses = []
    for _ in range(30):
        losses.append(cases.backward(model, [cases.global_batch(0, torch.float32)], 0).share.item())
        optimizer.step(1.0, optimizer.global_norm())
    assert losses[-1] < 0.7 * losses[0]
