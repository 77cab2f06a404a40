"""MOVA's encoders against the reference classes, called directly on the same weights, and against published names."""

import copy
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.codec import Codec, CodecError, Codecs, EncoderConfig, open_codec
from data.codec.mova.audio import dac_config
from data.codec.mova.dac import Dac, DacConfig, fused
from data.codec.mova.device import computing
from data.codec.mova.originals import TEXT, text_names, vae_names
from data.codec.mova.text import SETTINGS, clean
from data.codec.mova.video import vae_config
from data.errors import DataError
from tests.encoders import tiny_encoders

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_encoders()


@pytest.fixture(scope="module")
def codecs(folder: Path) -> Codecs:
    return Codecs(EncoderConfig("mova", "mova", "mova", str(folder)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def as_exact(found: Tensor, reference: Tensor, truth: Tensor) -> bool:
    """Whether rounding explains the difference: within three times the error of the float32 `reference` against the
    same computation in float64. Processors sum in different orders, so no fixed bound is right for all."""
    return relative(found.double(), truth) <= 3 * relative(reference.double(), truth) < 1e-5


# --- sound


def test_the_audio_network_has_the_published_names() -> None:
    published = json.loads((HERE / "dac_names.json").read_text())
    with torch.device("meta"):
        model = Dac(DacConfig())
    names: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight") and not name.startswith(("quant_conv", "post_quant_conv")):
            names |= {f"{name}_v": list(tensor.shape), f"{name}_g": [len(tensor), 1, 1]}
        else:
            names[name] = list(tensor.shape)
    assert names == published
    assert sum(torch.Size(shape).numel() for shape in published.values()) == 371_589_058


def independent_dac(state: dict[str, Tensor], config: dict[str, Any]) -> tuple[Any, Any]:
    """Encoder and decoder of transformers' blocks, with weights of plain g v / |v| under their names."""
    from transformers.models.dac.configuration_dac import DacConfig as TheirConfig
    from transformers.models.dac.modeling_dac import DacDecoder, DacEncoder

    theirs = TheirConfig(
        encoder_hidden_size=config["encoder_dim"], downsampling_ratios=config["encoder_rates"],
        decoder_hidden_size=config["decoder_dim"], upsampling_ratios=config["decoder_rates"], hidden_size=128,
    )  # fmt: skip
    theirs.hidden_size = 128
    encoder, decoder = DacEncoder(theirs), DacDecoder(theirs)
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(("weight_g", "weight_v"))}
    for name in [name for name in state if name.endswith("weight_v")]:
        v = state[name]
        plain[name[:-2]] = state[name[:-1] + "g"] * v / v.flatten(1).norm(dim=1).view(-1, 1, 1)
    inside = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}
    found: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        side, _, *rest = name.split(".")
        if side == "encoder":
            number = int(rest[0])
            stem = {0: "conv1", 6: "snake1", 7: "conv2"}.get(number, f"block.{number - 1}")
            if stem.startswith("block"):
                part = int(rest[2])
                stem += f".{ {3: 'snake1', 4: 'conv1'}.get(part, f'res_unit{part + 1}') }".replace(" ", "")
                if part < 3:
                    stem += f".{inside[rest[4]]}"
        elif side == "decoder":
            number = int(rest[0])
            stem = {0: "conv1", 6: "snake1", 7: "conv2"}.get(number, f"block.{number - 1}")
            if stem.startswith("block"):
                part = int(rest[2])
                stem += f".{ {0: 'snake1', 1: 'conv_t1'}.get(part, f'res_unit{part - 1}') }".replace(" ", "")
                if part > 1:
                    stem += f".{inside[rest[4]]}"
        else:
            continue
        found[f"{side}.{stem}.{name.rsplit('.', 1)[1]}"] = tensor
    for side, module in (("encoder", encoder), ("decoder", decoder)):
        own = {name.removeprefix(f"{side}."): one for name, one in found.items() if name.startswith(side)}
        module.load_state_dict(own, strict=True)
    for block, rate in zip(decoder.block, config["decoder_rates"], strict=True):
        block.conv_t1.output_padding = (rate % 2,)  # without it odd rates give other lengths
    return encoder.eval(), decoder.eval()


def independent_sound(folder: Path, wave: Tensor) -> tuple[Tensor, Tensor]:
    """(latents [1, 128, L], sound decoded from them [1, n]) in the wave's dtype, n a multiple of 960."""
    part = folder / "audio_vae"
    state = load_file(part / "diffusion_pytorch_model.safetensors")
    coders = independent_dac(state, json.loads((part / "config.json").read_text()))
    encoder, decoder = (coder.to(wave.dtype) for coder in coders)
    outer = {name: tensor.to(wave.dtype) for name, tensor in state.items() if "quant_conv" in name}
    with torch.no_grad():
        padded = torch.nn.functional.pad(wave, (0, -wave.shape[1] % 960))[:, None]
        moments = torch.nn.functional.conv1d(encoder(padded), outer["quant_conv.weight"], outer["quant_conv.bias"])
        mean = moments[:, :128]
        hidden = torch.nn.functional.conv1d(mean, outer["post_quant_conv.weight"], outer["post_quant_conv.bias"])
        return mean, decoder(hidden)[:, 0]


@pytest.mark.parametrize("samples", [386_000, 97 * 2000, 961, 1])
def test_sound_is_encoded_and_decoded_as_by_another_implementation(folder: Path, codecs: Codecs, samples: int) -> None:
    wave = torch.randn(1, samples, generator=torch.Generator().manual_seed(1)) * 0.1
    mean, sound = independent_sound(folder, wave)
    true_mean, _ = independent_sound(folder, wave.double())
    latents = codecs.audio.encode(wave)
    assert latents.shape == (1, codecs.audio.steps(samples), 128) and latents.dtype == torch.float32
    assert as_exact(latents.mT, mean, true_mean)
    network = copy.deepcopy(codecs.audio._model).double()  # weights as fused in float32, sums without rounding
    assert relative(network.encode(wave.double()), true_mean) < 1e-6
    decoded = codecs.audio.decode(latents, samples)
    assert decoded.shape == (1, samples) and relative(decoded, sound[:, :samples]) < 1e-5
    if samples == 386_000:
        assert latents.shape[1] == 403 and codecs.audio.sample_rate == 48000


def test_both_forms_of_weight_norm_are_the_same_codec(folder: Path, codecs: Codecs, tmp_path: Path) -> None:
    state = load_file(folder / "audio_vae" / "diffusion_pytorch_model.safetensors")
    wave = torch.randn(1, 3000, generator=torch.Generator().manual_seed(2)) * 0.1
    expected = codecs.audio.encode(wave)
    forms: dict[str, dict[str, Tensor]] = {"fused": fused(state), "new": {}}
    for name, tensor in state.items():
        new = name.replace("weight_g", "parametrizations.weight.original0")
        forms["new"][new.replace("weight_v", "parametrizations.weight.original1")] = tensor
    for form, tensors in forms.items():
        (tmp_path / form / "audio_vae").mkdir(parents=True)
        shutil.copy(folder / "audio_vae" / "config.json", tmp_path / form / "audio_vae")
        save_file(tensors, tmp_path / form / "audio_vae" / "diffusion_pytorch_model.safetensors")
        codec = Codecs(EncoderConfig(audio="mova", folder=str(tmp_path / form))).audio
        assert torch.equal(codec.encode(wave), expected) and codec.fingerprint == codecs.audio.fingerprint


# --- picture


def reference_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder / "video_vae").eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 17, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_pictures_are_those_of_the_reference_class(folder: Path, codecs: Codecs, pixels: Tensor) -> None:
    vae = reference_vae(folder)
    latents = codecs.video.encode(pixels)
    mean, deviation = (
        torch.tensor(getattr(vae.config, name)).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    for number, clip in enumerate(pixels):  # what a clip is batched with does not matter
        with torch.no_grad():
            mode = vae.encode(clip[None]).latent_dist.mode()[0]
            assert torch.equal(latents[number], (mode - mean) / deviation)
            decoded = vae.decode(mode[None]).sample[0].clamp(-1, 1)
        assert relative(codecs.video.decode(latents[number : number + 1])[0], decoded) < 1e-5
    assert latents.shape == (2, 16, 5, 4, 6) and 0.2 < float(latents.std()) < 5
    for shape in ((1, 3, 16, 32, 48), (1, 3, 17, 30, 48)):
        with pytest.raises(ValueError, match="1 \\+ 4k"):
            codecs.video.encode(torch.zeros(shape))


def test_a_batch_is_another_codec(folder: Path, codecs: Codecs, pixels: Tensor) -> None:
    two = Codecs(EncoderConfig(video="mova", folder=str(folder), batch=2)).video
    with torch.no_grad():
        mode = reference_vae(folder).encode(pixels).latent_dist.mode()
    mean, deviation = two._scale  # type: ignore[attr-defined]
    assert torch.equal(two.encode(pixels), (mode - mean) / deviation)
    assert two.fingerprint != codecs.video.fingerprint


def test_the_memory_of_the_condition_is_29_latent_frames(codecs: Codecs) -> None:
    first = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    whole = torch.zeros(1, 3, 193, 16, 24)
    whole[:, :, 0] = first
    expected = codecs.video.encode(whole)
    changing = [t for t in range(1, 49) if not torch.equal(expected[:, :, t], expected[:, :, -1])]
    assert max(changing) + 1 == codecs.video.memory == 29
    assert torch.equal(codecs.video.encode_condition(first, 193), expected)
    assert torch.equal(codecs.video.encode_condition(first, 97), expected[:, :, :25])  # all of it: no tail
    clip = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    clip[:, :, 0] = first
    assert torch.equal(codecs.video.encode(clip)[:, :, 0], expected[:, :, 0])


def test_bfloat16_is_near_and_has_a_fingerprint_of_its_own(folder: Path, codecs: Codecs, pixels: Tensor) -> None:
    half = Codecs(EncoderConfig(video="mova", folder=str(folder), video_dtype="bfloat16")).video
    assert 1e-4 < relative(half.encode(pixels), codecs.video.encode(pixels)) < 0.1
    assert half.fingerprint != codecs.video.fingerprint
    with pytest.raises(DataError, match="encoder.video_dtype=fp8: choose from float32, tf32, bfloat16"):
        open_codec("video", EncoderConfig(video="mova", folder=str(folder), video_dtype="fp8"))


# --- words


def test_words_are_those_of_the_reference_class(folder: Path, codecs: Codecs) -> None:
    from transformers import AutoTokenizer, UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    assert torch.equal(model.encoder.embed_tokens.weight, model.shared.weight)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    captions = ["a red ball falls.", "", "the box hits the floor. " * 2000]
    found = codecs.text.encode(captions)
    for caption, rows in zip(captions, found, strict=True):
        tokens = tokenizer(caption.strip(), padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = model(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
        assert len(rows) == int(tokens.attention_mask.sum())
        assert relative(rows, expected[: len(rows)]) < 1e-6
    assert len(found[1]) == 1 and len(found[2]) == 512 and codecs.text.dim == 64


def test_captions_are_cleaned_as_the_reference_does() -> None:
    assert clean("  a   b\n c ") == "a b c" and clean("") == ""
    assert clean("schÃ¶n") == "schön" and clean("“x”") == '"x"' and clean("ﬁn") == "fin"
    assert clean("&amp;lt;") == "<"


# --- files


def test_names_of_original_files_map_one_to_one(folder: Path, codecs: Codecs, pixels: Tensor, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    published = json.loads((HERE / "wan_vae_names.json").read_text())
    state = load_file(folder / "video_vae" / "diffusion_pytorch_model.safetensors")
    assert set(state) == set(published)
    original = {_original_vae(name): tensor for name, tensor in state.items()}
    assert len(original) == 194
    assert {name: id(one) for name, one in vae_names(original).items()} == {
        name: id(one) for name, one in state.items()
    }
    theirs = convert_wan_vae_to_diffusers(dict(original))
    assert {name: id(one) for name, one in theirs.items()} == {name: id(one) for name, one in state.items()}
    words = load_file(folder / "text_encoder" / "model.safetensors")
    back = {value: key for key, value in TEXT.items()}
    renamed = {_original_text(name, back): tensor for name, tensor in words.items()}
    assert set(text_names(renamed)) == set(words) and "blocks.2.ffn.gate.0.weight" in renamed
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    # Its config is that of the release (base_dim 96), so that tiny weights are those of another network:
    with pytest.raises(DataError, match="Wan2.1_VAE.pth has another shape of .*these are weights of another network"):
        Codecs(EncoderConfig(video="mova", folder=str(tmp_path))).video.encode(pixels)


def test_original_files_give_the_same_latents(
    folder: Path, codecs: Codecs, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the true names, with the tiny sizes where the code has the released ones."""
    config = {part: json.loads((folder / part / "config.json").read_text()) for part in ("audio_vae", "text_encoder")}
    tiny = vae_config(folder / "video_vae")
    monkeypatch.setattr("data.codec.mova.video.vae_config", lambda path: tiny)
    monkeypatch.setattr("data.codec.mova.text.XXL", {name: config["text_encoder"][name] for name in SETTINGS})
    dac = dac_config(folder / "audio_vae")
    monkeypatch.setattr("data.codec.mova.audio.dac_config", lambda path: dac)
    back = {value: key for key, value in TEXT.items()}
    stored = {part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("video_vae", *config)}
    torch.save({_original_vae(name): one for name, one in stored["video_vae"].items()}, tmp_path / "Wan2.1_VAE.pth")
    words = {_original_text(name, back): one for name, one in stored["text_encoder"].items()}
    torch.save(words, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"state_dict": stored["audio_vae"], "metadata": {}}, tmp_path / "vae_128d_48k.pth")
    shutil.copytree(folder / "tokenizer", tmp_path / "google" / "umt5-xxl")
    found = Codecs(EncoderConfig("mova", "mova", "mova", str(tmp_path)))
    assert torch.equal(found.video.encode(pixels[:1]), codecs.video.encode(pixels[:1]))
    wave = torch.randn(1, 3000, generator=torch.Generator().manual_seed(5)) * 0.1
    assert torch.equal(found.audio.encode(wave), codecs.audio.encode(wave))
    assert torch.equal(found.text.encode(["a red ball."])[0], codecs.text.encode(["a red ball."])[0])
    assert found.fingerprints == codecs.fingerprints  # the same weights are the same codec, whatever their file


class _Malicious:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind,name", [("video", "Wan2.1_VAE.pth"), ("text", "models_t5_umt5-xxl-enc-bf16.pth")])
def test_a_pickle_with_code_is_refused_in_one_line(folder: Path, tmp_path: Path, kind: str, name: str) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    torch.save({"conv1.weight": _Malicious(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(DataError, match=f"{name} can't be read with weights_only") as caught:
        _ = open_codec(kind, EncoderConfig("mova", "mova", "mova", str(tmp_path))).fingerprint
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_words_need_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_HUB_OFFLINE: no connection is tried, no name is looked up."""
    import huggingface_hub.constants

    assert "HF_HUB_OFFLINE" not in os.environ and not huggingface_hub.constants.HF_HUB_OFFLINE
    tried: list[object] = []

    def blocked(*arguments: object, **keys: object) -> None:
        tried.append(arguments)
        raise OSError("the network is unreachable")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, blocked)
    monkeypatch.setattr(socket.socket, "connect", blocked)
    fresh = Codecs(EncoderConfig("mova", "mova", "mova", str(folder)))
    assert len(fresh.text.encode(["a red ball."])[0]) > 1
    assert fresh.video.encode(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 16, 1, 2, 2)
    assert tried == []


def _original_vae(name: str) -> str:
    """By the table of the facts, the other way round."""
    for new, old in (
        ("post_quant_conv", "conv2"), ("quant_conv", "conv1"), ("conv_in", "conv1"), ("norm_out", "head.0"),
        ("conv_out", "head.2"), ("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.2"),
        ("mid_block.attentions.0", "middle.1"), ("encoder.down_blocks.", "encoder.downsamples."),
        (".conv_shortcut", ".shortcut"),
    ):  # fmt: skip
        name = name.replace(new, old)
    parts = name.split(".")
    if parts[:2] == ["decoder", "up_blocks"]:
        place = int(parts[4]) + (3 if parts[3] == "upsamplers" else 0)
        parts = ["decoder", "upsamples", str(4 * int(parts[2]) + place), *parts[5:]]
    inside = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    return ".".join([*parts[:2], *(inside.get(part, part) for part in parts[2:])])


def _original_text(name: str, back: dict[str, str]) -> str:
    stem = name.removesuffix(".weight")
    if stem in back:
        return f"{back[stem]}.weight"
    _, _, block, inner = stem.split(".", 3)
    return f"blocks.{block}.{back[inner]}.weight"


def test_pickled_weights_are_read_without_their_code(folder: Path, codecs: Codecs, tmp_path: Path) -> None:
    state = load_file(folder / "audio_vae" / "diffusion_pytorch_model.safetensors")
    torch.save({"state_dict": state, "metadata": {"kwargs": {}}}, tmp_path / "vae_128d_48k.pth")
    with pytest.raises(DataError, match="weights of another network"):  # the tiny ones under the released sizes
        Codecs(EncoderConfig(audio="mova", folder=str(tmp_path))).audio.encode(torch.zeros(1, 960))
    torch.save({"code": print}, tmp_path / "vae_128d_48k.pth")
    with pytest.raises(DataError, match="can't be read with weights_only"):
        _ = Codecs(EncoderConfig(audio="mova", folder=str(tmp_path))).audio.fingerprint


def _changed(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        audio = key in ("continuous", "latent_dim", "sample_rate")
        part = folder / ("audio_vae" if audio else "video_vae") / "config.json"
        part.write_text(json.dumps(json.loads(part.read_text()) | {key: value}))

    return change


def _zero_table(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file(state | {"shared.weight": torch.zeros_like(state["shared.weight"])}, path, {"format": "pt"})


def _damaged_words(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(state, path, {"format": "pt"})


def _losing(part: str, name: str) -> Callable[[Path], None]:
    def lose(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        save_file({key: one for key, one in load_file(path).items() if key != name}, path, {"format": "pt"})

    return lose


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _without(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def _truncated(folder: Path) -> None:
    path = folder / "video_vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "kind,spoil,message",
    [
        ("video", _changed("is_residual", True), "is_residual is True, expected False: it is not Wan 2.1's VAE"),
        ("video", _changed("z_dim", 48), "z_dim is 48, expected 16"),
        ("video", _changed("base_dim", 16), "has another shape of"),
        ("video", _without("video_vae"), "holds none of video_vae/config.json"),
        ("video", _truncated, "can't be read as safetensors"),
        ("audio", _changed("continuous", False), "a DAC with quantizers"),
        ("audio", _changed("latent_dim", 64), "64 channels"),
        ("audio", _changed("latent_dim", 0), "config.json: latent_dim is 0; it must be 1 or more"),
        ("audio", _changed("sample_rate", "x"), "config.json: sample_rate: Value 'x'"),
        ("text", _zero_table, "does not read the table of tokens"),
        ("text", _without("tokenizer"), "no tokenizer beside"),
        ("text", _damaged_words, "gives NaN or inf for the caption ''"),
        ("text", _write("tokenizer/spiece.model", "no model"), "holds no tokenizer"),
        ("text", _write("text_encoder/config.json", "[]"), "holds no object"),
        ("text", _write("text_encoder/config.json", '{"d_model": "wide"}'), "d_model is 'wide', expected a number"),
        ("text", _losing("text_encoder", "shared.weight"), "lacks shared.weight"),
        ("audio", _losing("audio_vae", "encoder.block.0.weight_g"), "lacks encoder.block.0.weight"),
        ("video", _write("video_vae/config.json", "{"), "can't be read"),
        ("video", _changed("latents_mean", None), "latents_mean is None, expected 16 numbers"),
        ("video", _changed("latents_std", [0.0] * 16), "latents_std has a number that is not above 0"),
        ("video", _write("video_vae/x.safetensors.index.json", "{}"), "x.safetensors.index.json has no weight_map"),
        ("text", _without("text_encoder"), "holds none of text_encoder/config.json"),
        ("audio", _without("audio_vae"), "holds none of audio_vae/config.json"),
    ],
)
def test_what_is_no_such_encoder_is_refused(
    folder: Path, tmp_path: Path, kind: str, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    spoil(tmp_path / "m")
    inputs = {"video": torch.zeros(1, 3, 1, 16, 16), "audio": torch.zeros(1, 960), "text": [""]}
    with pytest.raises(CodecError, match=message) as caught:  # it ends the work: no clip is to blame
        codec: Any = open_codec(kind, EncoderConfig("mova", "mova", "mova", str(tmp_path / "m")))
        codec.encode(inputs[kind])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error,message",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "cpu has too little memory .*: CUDA out of memory.$"),
        (RuntimeError("can't allocate memory: you tried\n"), "the encoders fail on cpu: can't allocate memory"),
        (MemoryError(), "the encoders fail on cpu: MemoryError"),
    ],
)
def test_a_device_that_fails_ends_the_work_and_a_bad_clip_does_not(error: Exception, message: str) -> None:
    with pytest.raises(CodecError, match=message), computing(torch.device("cpu"), "float32"):
        raise error
    with pytest.raises(ValueError, match="of a clip"), computing(torch.device("cpu"), "float32"):
        raise ValueError("of a clip")


def test_precision_and_batch_are_part_of_the_fingerprint(folder: Path, codecs: Codecs) -> None:
    for kind, given in (
        ("video", [{}, {"video_dtype": "tf32"}, {"video_dtype": "bfloat16"}, {"batch": 2}]),
        ("text", [{}, {"text_dtype": "tf32"}, {"text_dtype": "bfloat16"}]),
    ):
        configs: list[Any] = [EncoderConfig("mova", "mova", "mova", str(folder), **keys) for keys in given]
        assert len({open_codec(kind, config).fingerprint for config in configs}) == len(given)


def test_every_number_changes_the_fingerprint(folder: Path, codecs: Codecs, tmp_path: Path) -> None:
    for kind, part in (("video", "video_vae"), ("audio", "audio_vae"), ("text", "text_encoder")):
        root = tmp_path / kind
        shutil.copytree(folder, root)

        def opened(root: Path = root, kind: str = kind) -> Codec:
            return open_codec(kind, EncoderConfig("mova", "mova", "mova", str(root)))

        assert opened().fingerprint == codecs.fingerprints[kind]
        (path,) = (root / part).glob("*.safetensors")
        state = load_file(path)
        name = sorted(state)[-1]
        state[name].view(-1)[0] += 1e-3
        save_file(state, path, {"format": "pt"})
        assert opened().fingerprint != codecs.fingerprints[kind]
