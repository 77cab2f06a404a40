"""Weights of every layout that is known, made by the libraries that publish them, under the model's names; and what
does not fit, refused with names and shapes."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.tower import Tower
from model.weights.files import PREFIX, LayoutError, open_files
from model.weights.names import from_diffusers, to_diffusers
from model.weights.parts import joint_config, open_part, parts_in
from tests import weights

EXPERTS = {"video_high": 0, "video_low": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    weights.diffusers_folder(root / "diffusers")
    weights.diffusers_folder(root / "sharded", shard="100KB")
    weights.original_folder(root / "wan")
    weights.mova_folder(root / "mova")
    return root


def whole(source) -> dict[str, torch.Tensor]:
    """All tensors of a part, read in three ranges each that end inside of rows."""
    found = {}
    for name in source.names:
        shape = source.shapes[name]
        count = torch.Size(shape).numel()
        cuts = [0, count // 3 + 1, 2 * count // 3 + 1, count]
        pieces = [source.read(name, first, last) for first, last in zip(cuts, cuts[1:], strict=False) if first < last]
        found[name] = torch.cat(pieces).view(shape)
    return found


@pytest.mark.parametrize("layout", ["diffusers", "sharded", "wan"])
def test_experts_of_wan(made: Path, layout: str) -> None:
    """High and low noise are not swapped, and every tensor is the one that diffusers computes with."""
    assert parts_in(made / layout) == ["video_high", "video_low"]
    for part, seed in EXPERTS.items():
        source = open_part(made / layout, part)
        expected = weights.own_names(weights.diffusers_model(seed).state_dict())
        found = whole(source)
        assert found.keys() == expected.keys() == Tower(source.config).state_dict().keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert source.config == weights.joint_config().video
        one = open_part(made / "diffusers", part)
        if layout != "wan":  # whatever the files: the same weights, the same fingerprint
            assert source.fingerprint() == one.fingerprint()
    assert open_part(made / layout, "video_high").fingerprint() != open_part(made / layout, "video_low").fingerprint()


def test_a_tower_answers_as_diffusers_does(made: Path) -> None:
    """As it is to 1e-5; to 1e-6 with diffusers' sinusoid in float64, the one difference that is known."""
    model = weights.diffusers_model(0)
    source = open_part(made / "wan", "video_high")
    ours = Tower(source.config)
    ours.load_state_dict(whole(source))
    torch.manual_seed(3)
    video, text, t = torch.randn(2, 36, 3, 4, 6), torch.randn(2, 5, 6), torch.tensor([937.0, 313.27])
    from model.tower import patchify, unpatchify

    with torch.no_grad():
        grid = ours.token_grid(video)
        x, (time, modulation) = ours.embed(patchify(video, [1, 2, 2])), ours.embed_time(t)
        context, rotary = ours.embed_text(text), ours.rotary(grid, video.device)
        for block in ours.blocks:
            x = block(x, context, modulation, rotary)
        answer = unpatchify(ours.project(x, time), grid, [1, 2, 2])
        theirs = model(video, timestep=t, encoder_hidden_states=text).sample
        assert (answer - theirs).norm() / theirs.norm() < 1e-5
        from model.tower import sinusoid

        model.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, 32).float()
        theirs = model(video, timestep=t, encoder_hidden_states=text).sample
        assert (answer - theirs).norm() / theirs.norm() < 1e-6


def test_names_of_diffusers_and_back() -> None:
    names = list(weights.diffusers_model(0).state_dict())
    assert [to_diffusers(from_diffusers(name) or "") for name in names] == names
    assert from_diffusers("blocks.0.norm3.weight") is None  # diffusers' norm3 has no weights: ours is its norm2


def test_a_mova_folder(made: Path) -> None:
    config = joint_config({part: open_part(made / "mova", part) for part in parts_in(made / "mova")})
    assert config == weights.joint_config()
    source = open_part(made / "mova", "bridge")
    stored = load_file(made / "mova" / "dual_tower_bridge" / weights.FILE)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in whole(source).items())
    assert source.dtype(source.names[0]) == torch.bfloat16


def test_text_to_video_experts_are_widened(tmp_path: Path) -> None:
    """A stem for 16 channels takes 36, and says the same whatever the 20 others are."""
    model = weights.diffusers_model(0, in_channels=16)
    narrow = weights.own_names(model.state_dict())
    folder = weights.write_original(tmp_path / "high_noise_model", narrow, in_dim=16, model_type="t2v")
    source = open_part(folder.parent, "video_high")
    assert source.config.in_dim == 36
    wide = whole(source)["patch_embedding.weight"]
    assert torch.equal(wide[:, :16], narrow["patch_embedding.weight"]) and not wide[:, 16:].any()


def test_an_audio_tower_out_of_a_video_tower(tmp_path: Path) -> None:
    """All but stem and head: of 30 blocks 822 of 825 tensors, as of Wan 2.1 T2V 1.3B."""
    tensors = weights.own_names(weights.diffusers_model(0, in_channels=16, num_layers=30).state_dict())
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    weights.write_original(folder, tensors, in_dim=16, num_layers=30, model_type="t2v")
    assert parts_in(folder) == ["video_high"]
    source = open_part(folder, "audio", borrow=True)
    assert len(source.names) == 822 and len(source.shapes) == 825
    assert source.fresh == ("patch_embedding.weight", "head.head.weight", "head.head.bias")
    assert (source.config.in_dim, source.config.out_dim, source.config.patch_size) == (128, 128, [1])
    found = whole(source)
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    with pytest.raises(LayoutError, match="holds video_high, but no audio"):
        open_part(folder, "audio")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_one_file_with_a_prefix_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Without a config: sizes are read off the shapes, heads have 128 channels."""
    model = weights.diffusers_model(0, attention_head_dim=128)
    tensors = {name: tensor.to(dtype) for name, tensor in weights.own_names(model.state_dict()).items()}
    file = tmp_path / "wan.safetensors"
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()} | {"vae.conv": torch.zeros(2)}, file)
    source = open_part(file, "video_high")
    assert (source.config.dim, source.config.num_heads, source.config.text_dim) == (128, 1, 6)
    name = "blocks.1.ffn.0.weight"
    found = source.read(name, 100, 300)
    assert found.dtype == dtype and torch.equal(found.float(), tensors[name].flatten()[100:300].float())


def test_a_second_dtype_beside_a_file_stops_nothing(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    weights.diffusers_model(0).save_pretrained(folder)
    weights.diffusers_model(7).save_pretrained(folder, variant="fp16")
    source = open_part(tmp_path, "video_high")
    assert source.fingerprint() == open_part(made / "diffusers", "video_high").fingerprint()


class Trap:
    """Leaves a trace where a pickle is allowed to call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pth_files_are_read_without_their_code(tmp_path: Path) -> None:
    tensors = weights.own_names(weights.diffusers_model(0, attention_head_dim=128).state_dict())
    torch.save({"state_dict": tensors}, tmp_path / "wan.pth")
    source = open_part(tmp_path / "wan.pth", "video_high")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole(source).items())
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(LayoutError, match="trap.pth is refused, nothing in it was run"):
        open_files(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def damaged(folder: Path, change: str) -> None:
    """One of the ways in which a MOVA folder may not fit."""
    audio, config = folder / "audio_dit" / weights.FILE, folder / "video_dit" / "config.json"
    content, tensors = json.loads(config.read_text()), load_file(audio)
    if change in content:
        content.pop(change)
        config.write_text(json.dumps(content))
    elif change == "no JSON":
        config.write_text("{")
    elif change == "a list":
        config.write_text("[]")
    elif change == "switch":
        config.write_text(json.dumps(content | {"has_ref_conv": True}))
    elif change == "unknown switch":
        config.write_text(json.dumps(content | {"has_wings": True}))
    elif change == "another size":
        weights.mova_folder(folder / "other", weights.joint_config(text_dim=8))
        os.rename(folder / "other" / "video_dit_2", folder / "other" / "kept")
        os.rename(folder / "video_dit_2", folder / "old")
        os.rename(folder / "other" / "kept", folder / "video_dit_2")
    elif change == "bridge key":
        path = folder / "dual_tower_bridge" / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "visual_layers"}))
    elif change == "bridge size":
        path = folder / "dual_tower_bridge" / "config.json"
        path.write_text(path.read_text().replace('"audio_layers": 1', '"audio_layers": 2'))
    elif change == "index":
        (folder / "audio_dit" / f"{weights.FILE}.index.json").write_text('{"weight_map": [1]}')
    elif change == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != "head.modulation"}, audio)
    elif change == "unknown":
        save_file(tensors | {"extra.weight": torch.zeros(3)}, audio)
    elif change == "clip":
        save_file(tensors | {"img_emb.proj.0.weight": torch.zeros(3)}, audio)
    elif change == "cut off":
        audio.write_bytes(audio.read_bytes()[:100])
    else:
        assert change == "vae"
        (folder / "video_vae").mkdir()
        (folder / "video_vae" / "config.json").write_text('{"z_dim": 48, "is_residual": true}')


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("dim", "lacks the key 'dim'"), ("num_layers", "lacks the key 'num_layers'"), ("no JSON", "is not JSON"),
        ("a list", "holds list, not an object"), ("switch", "has_ref_conv is not as in MOVA"),
        ("unknown switch", "has_wings, which is not known"), ("another size", "have different sizes: text_dim: 6 -> 8"),
        ("bridge key", "lacks the key 'visual_layers'"), ("bridge size", "tensors do not fit|audio_layers is 2, the"),
        ("index", "has no weight_map"), ("missing", r"head.modulation: not there -> \(1, 2, 48\)"),
        ("unknown", r"extra.weight: \(3,\) -> not there"), ("clip", "CLIP image-to-video weights"),
        ("cut off", "not a readable safetensors"), ("vae", "VAE of Wan 2.2's 5B model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_layout_error(tmp_path: Path, change: str, told: str) -> None:
    from model.convert import load_mova

    weights.mova_folder(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(LayoutError, match=told):
        load_mova(tmp_path)


def test_diffusers_configs_of_other_models_are_refused(tmp_path: Path) -> None:
    weights.diffusers_model(0).save_pretrained(tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    content = json.loads(path.read_text())
    for key, value, told in (
        ("image_dim", 1280, "CLIP"), ("qk_norm", "layer_norm", "MOVA's towers have"), ("in_channels", 48, "5B model"),
    ):  # fmt: skip
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(LayoutError, match=told):
            open_part(tmp_path, "video_high")


HOSTILE = {
    "index outside": "names ../elsewhere.safetensors, which does not lie beside it",
    "absolute index": "which does not lie beside it",
    "cut off": "not a readable safetensors file",
    "a long header": "not a readable safetensors file",
    "overlapping": "not a readable safetensors file",
    "twice": "is in both .* and .*: keep one of them",
    "integers": r"holds no floating-point weights: .*torch.int8.*; give unquantized ones",
    "unknown dtype": "unknown dtypes|not a readable safetensors",
    "many blocks": "num_layers is 1000000000, the files have 2 blocks",
    "no number": "ffn_dim is '64', no whole number above 0",
    "null": "num_attention_heads|num_heads is None, no whole number above 0",
    "eps": "eps is nan, no small number above 0",
    "deep": "is not JSON",
    "not text": "is not JSON",
    "a folder": "config.json",
    "no weights": "no diffusion_pytorch_model",
}


def made_hostile(folder: Path, how: str) -> None:
    """A tower of diffusers that was damaged or forged in one way."""
    weights.diffusers_model(0).save_pretrained(folder)
    file, config = folder / weights.FILE, folder / "config.json"
    tensors, content = load_file(file), json.loads(config.read_text())
    named = {"index outside": "../elsewhere.safetensors", "absolute index": "/etc/passwd"}
    changed = {
        "many blocks": {"num_layers": 10**9}, "no number": {"ffn_dim": "64"}, "null": {"num_attention_heads": None},
        "eps": {"eps": float("nan")},
    }  # fmt: skip
    if how in named:
        os.rename(file, folder.parent / "elsewhere.safetensors")
        (folder / f"{weights.FILE}.index.json").write_text(json.dumps({"weight_map": {"a": named[how]}}))
    elif how in changed:
        config.write_text(json.dumps(content | changed[how]))
    elif how == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "a long header":
        file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    elif how in ("overlapping", "unknown dtype"):
        entry = {"dtype": "F32" if how == "overlapping" else "F3", "shape": [2], "data_offsets": [0, 8]}
        header = json.dumps({"a": entry, "b": entry}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    elif how == "twice":
        os.remove(file)
        for shard in (1, 2):
            save_file(tensors, folder / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors")
    elif how == "integers":
        save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    elif how == "deep":
        config.write_text("[" * 100_000)
    elif how == "not text":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "a folder":
        config.unlink()
        config.mkdir()
    else:
        file.unlink()


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(tmp_path: Path, how: str) -> None:
    made_hostile(tmp_path / "transformer", how)
    with pytest.raises(LayoutError, match=HOSTILE[how]) as caught:
        open_part(tmp_path, "video_high")
    assert "\n" not in str(caught.value)


def test_links_that_lead_in_circles_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(tmp_path / "transformer_2")
    (tmp_path / "transformer_2").symlink_to(tmp_path / "transformer")
    with pytest.raises(LayoutError, match="any folder of a known layout"):
        parts_in(tmp_path)
    (tmp_path / "transformer").unlink()
    weights.diffusers_model(0).save_pretrained(tmp_path / "kept")
    (tmp_path / "transformer").symlink_to("kept")  # as caches of hubs have it
    (tmp_path / "kept" / "round").symlink_to("..")
    assert open_part(tmp_path, "video_high").config == weights.joint_config().video
