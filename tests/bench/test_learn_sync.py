"""tools.sync_score on a model that has learned nothing, and what bench.learn_sync makes of scores."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import learn_sync
from bench.learn_sync import LearnSyncConfig, LearnSyncError
from data.prepare.curation import PrepareConfig, prepare
from data.synthesize import SynthesizeConfig, synthesize
from model.init import init_weights
from model.joint import JointTransformer
from tests.distributed import run_cases
from tests.train import runs
from tests.train.cases import tiny_config
from tools.sync_score import TASKS, without_bridge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four clips, and a run of two steps."""
    folder = tmp_path_factory.mktemp("score")
    clips = synthesize(SynthesizeConfig(output=str(folder / "clips"), clips=4, workers=1, kinds=["bounce"]))
    prepare(PrepareConfig(source=str(clips), output=str(folder / "data"), workers=1))
    texts = [f"model.{tower}.text_dim=256" for tower in ("video", "audio")]
    keys = ["steps=2", "ema.decay=0.5", "model.prediction=sample", *texts]
    results = run_cases(2, {"train": (runs.train, (folder / "runs", folder / "data", "made", *keys))})
    assert results["train"][0].get("ending") == "finished", results["train"]
    return folder


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [f"checkpoint={folder}/runs/made", f"dataset={folder}/data", f"out={folder}/s.json", "sampler.steps=2"]
    return subprocess.run(
        [sys.executable, "-m", "tools.sync_score", *words, *arguments], capture_output=True, text=True, check=False
    )


def test_what_is_given_is_found_and_what_an_untrained_model_makes_is_not(made: Path) -> None:
    done = command(made, f"samples={made}/samples", "batch=3")
    assert done.returncode == 0, done.stderr
    scores = json.loads((made / "s.json").read_text())
    events = sum(len(json.loads(path.read_text())["events"]) for path in (made / "clips").glob("clip-*.json"))
    assert scores["video to audio"]["seen"] == events == scores["audio to video"]["heard"]
    assert all(scores[task]["f1"] < 0.6 for task in TASKS)
    assert len(list((made / "samples").glob("*.mp4"))) == 12


def test_a_bridge_that_is_cut_makes_other_clips(made: Path) -> None:
    made_by = {}
    for bridge in ("true", "false"):
        done = command(made, f"bridge={bridge}", "tasks=[joint]", "clips=2", f"samples={made}/{bridge}")
        assert done.returncode == 0, done.stderr
        scores = json.loads((made / "s.json").read_text())
        assert set(scores) == {"joint"}
        made_by[bridge] = [path.read_bytes() for path in sorted((made / bridge).glob("*.mp4"))]
    assert len(made_by["true"]) == 2 and all(a != b for a, b in zip(*made_by.values(), strict=True))


def test_without_bridge_nothing_of_one_modality_reaches_the_other() -> None:
    torch.manual_seed(0)
    model = JointTransformer(tiny_config())
    init_weights(model, depth=2)
    for tower in (model.video_dit, model.audio_dit):
        torch.nn.init.normal_(tower.head.head.weight)  # zero at the start
    x = dict(
        video=torch.randn(1, 16, 3, 4, 6), condition=torch.zeros(1, 20, 3, 4, 6), text=torch.zeros(1, 2, 8),
        t_video=torch.tensor([500.0]), t_audio=torch.tensor([500.0]), bridge_scale=torch.ones(1), expert="high",
    )  # fmt: skip
    first, second = torch.randn(2, 1, 128, 7)
    cut = without_bridge(model)
    assert torch.equal(cut(audio=first, **x).video, cut(audio=second, **x).video)
    assert not torch.equal(model(audio=first, **x).video, model(audio=second, **x).video)


@pytest.mark.parametrize(
    "argument,message",
    [("tasks=[dance]", "choose from video to audio"), ("dataset=nowhere", "nowhere"), ("weights=best", "ema or raw")],
)
def test_bad_requests_cost_one_line(made: Path, argument: str, message: str) -> None:
    done = command(made, argument)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_checkpoint_is_chosen_on_the_validation_set_and_nothing_is_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best test score belongs to another checkpoint than the best validation score: it must not be looked at."""
    asked: list[tuple[str, ...]] = []
    every = learn_sync.SETS["easy"][1] // learn_sync.SCORED
    valid = {every: (0.9, 0.9, 0.2), 2 * every: (0.8, 0.8, 0.7), 3 * every: (0.9, 0.9, 0.6)}

    def play(module: str, *arguments: str) -> None:
        asked.append((module, *arguments))
        keys = dict(word.split("=", 1) for word in arguments)
        if module == "launch":
            run = Path(keys["run.root"]) / keys["run.id"]
            for step in [*valid, every + 7]:  # the last is one that the clock made, and is not scored
                (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
                (run / "checkpoints" / f"step-{step:08d}" / "COMMITTED").write_text("x")
            (run / "status.json").write_text('{"state": "finished"}')
            (run / "code.json").write_text('{"commit": "c0ffee00"}')
            (run / "metrics.jsonl").write_text('{"step": 0, "perf/step_time": 60.0}\n' * 3)
        elif module == "sync-score":
            step = int(keys["checkpoint"][-8:])
            f1s = valid[step] if keys["dataset"].endswith("valid") else (1 - step / every / 10,) * 3
            found = {"seen": 9, "heard": 8, "matched": 7, "chance": 0.3, "offset": 0.0}
            Path(keys["out"]).parent.mkdir(exist_ok=True)
            Path(keys["out"]).write_text(json.dumps({t: {**found, "f1": f} for t, f in zip(TASKS, f1s, strict=True)}))
            if "samples" in keys:
                Path(keys["samples"]).mkdir(parents=True)

    shown: list[tuple[str, str, str]] = []
    monkeypatch.setattr(learn_sync, "_run", play)
    monkeypatch.setattr(learn_sync, "show", lambda path, a, b, _: shown.append((path.name, a.name, b.name)))
    config = LearnSyncConfig(root=str(tmp_path / "root"), seeds=[0, 1], bench=str(tmp_path / "bench"))
    learn_sync.learn_sync(config)
    text = (tmp_path / "bench" / "learn-sync-easy.md").read_text()
    assert "F1 0.800 (0.800 to 0.800; asked 0.95)" in text and f"best on validation after {2 * every} steps" in text
    assert "commit c0ffee0;" in text  # what trained, not what stands here by now
    assert "seed-1, Bridge cut at sampling" in text and "no-bridge, Bridge cut" not in text  # it has none
    assert "- no-bridge |" in text and "7 matched of 9 seen and 8 heard" in text
    assert (tmp_path / "bench" / "learn-sync-easy.png").stat().st_size > 10_000
    assert set(shown) == {("learn-sync-easy-clips.png", "seed-0", "seed-0-cut")}
    trained = [words for words in asked if words[0] == "launch"]
    assert [next(w for w in words if "bridge_dropout" in w)[-3:] for words in trained] == ["0.0", "0.0", "1.0"]
    before = len(asked)
    learn_sync.learn_sync(config)
    assert {words[0] for words in asked[before:]} == {"synthesize", "prepare"}  # which find theirs complete

    # On another machine a third seed is measured, best after the last steps: the records of the others stay and count.
    record = tmp_path / "bench" / "learn-sync" / "easy" / "seed-1.json"
    before_bytes = record.read_bytes()
    shutil.rmtree(tmp_path / "root")
    config.seeds, config.control, valid[3 * every] = [2], False, (0.8, 0.8, 0.8)
    learn_sync.learn_sync(config)
    text = (tmp_path / "bench" / "learn-sync-easy.md").read_text()
    assert "F1 0.767 (0.700 to 0.800; asked 0.95)" in text and "seed-2: training" in text
    assert shown[-1] == ("learn-sync-easy-clips.png", "seed-2", "seed-2-cut")  # the only one whose clips are here
    assert "no-bridge: training" in text and record.read_bytes() == before_bytes

    # The control by itself, elsewhere: there are no clips to show.
    before = len(asked)
    shown.clear()
    learn_sync.learn_sync(replace(config, root=str(tmp_path / "elsewhere"), seeds=[], control=True))
    (words,) = [words for words in asked[before:] if words[0] == "launch"]
    assert {"run.id=no-bridge", "seed=0", "objective.bridge_dropout=1.0"} <= set(words) and not shown

    # What was made otherwise does not count.
    record.write_text(record.read_text().replace('"recipe": "', '"recipe": "another'))
    learn_sync.report(config, tmp_path / "root")
    assert "seed-1" not in (tmp_path / "bench" / "learn-sync-easy.md").read_text()
    same = LearnSyncConfig(ulysses=2, overrides=["parallel.engine=zero2"])  # a layout changes nothing that is trained
    recipes = [learn_sync.recipe(it) for it in (config, same, LearnSyncConfig(overrides=["optim.warmup=1"]))]
    assert recipes[0] == recipes[1] != recipes[2]


@pytest.mark.parametrize("processes,ulysses,replicas,micro_batch", [(1, 1, 1, 12), (2, 1, 2, 6), (2, 2, 1, 12)])
def test_the_batch_is_divided_among_the_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, ulysses: int, replicas: int, micro_batch: int
) -> None:
    words: list[str] = []
    monkeypatch.setattr(learn_sync, "_run", lambda *given: words.extend(given))
    learn_sync.train(LearnSyncConfig(processes=processes, ulysses=ulysses), tmp_path, "seed-0", 0, 600, 0.0)
    expected = {
        f"cluster.processes={processes}", f"parallel.dp_replicate={replicas}", f"parallel.ulysses={ulysses}",
        f"data.micro_batch={micro_batch}", "checkpoint.every=100", "checkpoint.permanent_every=100",
    }  # fmt: skip
    assert expected <= set(words)


def test_a_step_that_fails_ends_it(tmp_path: Path) -> None:
    config = LearnSyncConfig(root=str(tmp_path), clips=0)
    with pytest.raises(LearnSyncError, match="mova synthesize failed"):
        learn_sync.learn_sync(config)
    with pytest.raises(ValueError, match="choose from easy, hard"):
        LearnSyncConfig(set="medium")
    with pytest.raises(ValueError, match="nothing is left to train"):
        LearnSyncConfig(seeds=[], control=False)
    with pytest.raises(ValueError, match="ulysses=2: it must divide processes=1"):
        LearnSyncConfig(processes=1, ulysses=2)
