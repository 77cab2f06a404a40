"""Every command of docs/pretrain.md, word for word and in its order, from folders of true sizes: the weights are files
with holes, which have true headers and take no room."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import launch.__main__ as launch_program
import launch.status as status_program
import tools.export.__main__ as export_program
from data.clip import Bucket
from model.tower import Tower, TowerConfig
from model.weights.mova import ENCODERS
from tests import weights
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.runs import train

PAGE = Path(__file__).parents[2] / "docs" / "pretrain.md"
README = PAGE.parents[1] / "README.md"
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "launch": launch_program.PROGRAM.run, "status": status_program.PROGRAM.run, "export": export_program.PROGRAM.run,
}  # fmt: skip
SIZES = {"text_dim": 4096, "freq_dim": 256, "eps": 1e-6}
EXPERT = TowerConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824, in_dim=36, out_dim=16, **SIZES)
SMALL = TowerConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, in_dim=16, out_dim=16, **SIZES)
AUDIO = TowerConfig(
    dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, in_dim=128, out_dim=128, patch_size=[1], rope="dac", **SIZES
)
BYTES = {"BF16": 2, "F32": 4}
BUCKETS = {
    "phase1": Bucket(49, 44, 80, 403, 24.0, True, True), "phase2": Bucket(49, 44, 80, 403, 24.0, True, True),
    "phase3": Bucket(49, 90, 160, 403, 24.0, True, True),
}  # fmt: skip


def commands(page: Path = PAGE) -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line]


def hollow(folder: Path, tower: TowerConfig, dtype: str, shards: int, **config: object) -> None:
    """A tower of original Wan's layout whose files have every tensor's name and shape, and holes for their values."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in Tower(tower).state_dict().items()}
    names, stem, weight_map = sorted(shapes), "diffusion_pytorch_model", {}
    for shard in range(shards):
        file = f"{stem}.safetensors" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[shard::shards]:
            begin, end = end, end + BYTES[dtype] * math.prod(shapes[name])
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            written.truncate(8 + len(text) + end)
    if shards > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sizes = {key: getattr(tower, key) for key in ("dim", "num_heads", "num_layers", "ffn_dim", "in_dim", "out_dim")}
    (folder / "config.json").write_text(json.dumps({"freq_dim": 256, "eps": 1e-6, **sizes, **config}))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's first section asks for, and the shards that its second one makes."""
    for name in ("high_noise_model", "low_noise_model"):
        told = {"_class_name": "WanModel", "model_type": "i2v", "text_len": 512}
        hollow(tmp_path / "weights/Wan2.2-I2V-A14B" / name, EXPERT, "BF16", 6, **told)
    hollow(
        tmp_path / "weights/Wan2.1-T2V-1.3B", SMALL, "F32", 1, _class_name="WanModel", model_type="t2v", text_len=512
    )
    for name in ENCODERS:
        (tmp_path / "weights/MOVA-360p" / name).mkdir(parents=True)
    (tmp_path / "weights/MOVA-360p/model_index.json").write_text('{"_class_name": "MOVA"}')
    (tmp_path / "raw").mkdir()
    for number in range(5):
        (tmp_path / "raw" / f"{number}.mp4").write_bytes(b"a clip")
    for phase, bucket in BUCKETS.items():
        for seed, name in enumerate(("speech/train", "other/train", "speech/valid")):
            make_dataset(tmp_path / "shards" / phase / name, [(bucket, 1)], seed=seed, dim=4096, mixes=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Runs of the page's names that have trained, at tiny size; they lie elsewhere."""
    root = tmp_path / "finished"
    weights.mova_folder(root / "mova")
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(root / "data", [(bucket, 4)], dim=6)
    given = (f"init.source={root}/mova", "steps=1", "validation.every=0")
    names = ("audio", "mova-phase1")
    outcomes = run_cases(1, {name: (tiny_run, (root, root / "data", name, *given)) for name in names})
    assert all(ranks[0].get("ending") == "finished" for ranks in outcomes.values()), outcomes
    (tmp_path / "runs").mkdir()
    return root


def tiny_run(*given) -> dict:
    return train(*given, of_source=True)


def test_the_page_from_top_to_bottom(site: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = commands()
    assert [words[1] for words in shown] == [
        "launch",
        "launch",
        "export",
        "launch",
        "launch",
        "launch",
        "status",
        "export",
    ]
    assert [words for words in commands(README) if "init.audio=weights/audio" in words] == [shown[3]]
    for words in shown:
        if words[1] in ("export", "status"):  # what the submitted run would have left
            name = words[2].partition("runs/")[2]
            if not (site / "runs" / name).is_dir():
                (finished / name).rename(site / "runs" / name)
        status = PROGRAMS[words[1]](words[2:])
        said = capsys.readouterr()
        assert status == 0, f"{shlex.join(words)}: {said.err}"
        if words[1] == "launch":
            assert "launch.dry_run=true" in words and "#SBATCH --time=1-00:00:00" in said.out
            assert said.out.count("#!/") == (3 if "phases=mova" in words else 1)
            assert "job=prepare" in words or said.out.count("#SBATCH --nodes=8\n") == said.out.count("#!/")
        if "out=weights/audio" in words:  # of the tiny run; in its place comes one of the true size
            (site / "weights/audio").rename(site / "weights/tiny-audio")
            hollow(site / "weights/audio/audio_dit", AUDIO, "F32", 1, patch_size=[1], text_dim=4096, vae_type="dac")
    assert sorted(path.name for path in (site / "runs").iterdir()) == ["audio", "mova-phase1"]  # nothing was submitted
    index = json.loads((site / "exported" / "model_index.json").read_text())
    assert all((site / "exported" / name).is_dir() for name, value in index.items() if isinstance(value, list))
