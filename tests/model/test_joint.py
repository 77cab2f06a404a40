"""The joint transformer without the outside fixture: invariant 1 (per-sample time), switches, sizes, conversion."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from model.attention import DenseCore
from model.bridge import BridgeConfig, interacting_layers
from model.convert import LayoutError, load_mova, read_config, save_mova
from model.init import init_weights, initial_value
from model.joint import JointConfig, JointTransformer
from model.rope import bridge_rotary, video_rotary
from model.tower import TowerConfig, velocity_patches

FREQUENCY_INDEX = torch.arange(0, 128, 2, dtype=torch.float64)
# Recorded once: a change here would change every run that starts from a seed.
GOLDEN = [[0.03297046944499016, -0.00991260726004839], [-0.04539253190159798, -0.007910818792879581]]
CONF = Path(__file__).parents[2] / "conf" / "model"


def small_config(head=32, two_experts=True, audio_rope="dac", **bridge):
    video = TowerConfig(
        dim=2 * head, num_heads=2, num_layers=3, ffn_dim=48, in_dim=36, out_dim=16, text_dim=8, freq_dim=16
    )
    audio = TowerConfig(
        dim=head, num_heads=1, num_layers=2, ffn_dim=32, in_dim=8, out_dim=8, text_dim=8, freq_dim=16, patch_size=[1],
        rope=audio_rope,
    )  # fmt: skip
    return JointConfig(video=video, audio=audio, bridge=BridgeConfig(head_dim=head, **bridge), two_experts=two_experts)


def filled_model(config, seed=0, dtype=torch.float64):
    """Every parameter random, so that nothing hides behind a zero."""
    model = JointTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def inputs(batch=2, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return dict(
        video=rand(batch, 16, 3, 4, 6), audio=rand(batch, 8, 11), condition=rand(batch, 20, 3, 4, 6),
        text=rand(batch, 5, 8), t_video=torch.linspace(950.0, 910.0, batch, dtype=torch.float64),
        t_audio=torch.linspace(30.0, 800.0, batch, dtype=torch.float64),
    )  # fmt: skip


def rows(x, i):
    return {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}


@pytest.mark.parametrize("switches", [{}, {"pooled_adaln": True}, {"first_frame_bias": True, "cross_rope": False}])
def test_a_timestep_per_sample_equals_separate_runs(switches):
    """Invariant 1: a batch of three with its own timesteps and Bridge scales = three runs of one sample."""
    model = filled_model(small_config(**switches))
    x = inputs(batch=3) | {"bridge_scale": torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), "expert": "low"}
    together = model(**x)
    for i in range(3):
        alone = model(**rows(x, i))
        torch.testing.assert_close(together.video[i : i + 1], alone.video, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together.audio[i : i + 1], alone.audio, rtol=1e-10, atol=1e-12)


def test_bridge_scale_zero_cuts_the_towers_apart():
    model, x = filled_model(small_config()), inputs()
    cut = model(**x, bridge_scale=torch.zeros(2))
    torch.testing.assert_close(cut.video, model(**(x | {"audio": None})).video)
    torch.testing.assert_close(cut.audio, model(**(x | {"video": None})).audio)
    assert (model(**x).video - cut.video).abs().max() > 1e-3


def test_experts_differ_and_share_audio_and_bridge():
    model, x = filled_model(small_config()), inputs()
    model(**x, expert="low").video.sum().backward()
    assert all(p.grad is None for p in model.video_dit.parameters())
    assert model.video_dit_2.patch_embedding.weight.grad.abs().sum() > 0
    assert model.dual_tower_bridge.audio_to_video_conditioners["0"].inner.q.weight.grad.abs().sum() > 0
    single = filled_model(small_config(two_experts=False))
    with pytest.raises(ValueError, match="'low' does not exist.*high"):
        single(**x, expert="low")


def test_text_audio_is_for_the_audio_tower_alone():
    model, x = filled_model(small_config()), inputs()
    x |= {"bridge_scale": torch.zeros(2)}
    base, other = model(**x), model(**x, text_audio=x["text"] + 1)
    torch.testing.assert_close(base.video, other.video, rtol=0, atol=0)
    assert (base.audio - other.audio).abs().max() > 1e-3


def test_pooled_adaln_is_its_definition():
    """Against torch's own MultiheadAttention and interpolation: a probe over each frame's tokens, LayerNorm, linear in
    time to the steps of sound, (scale, shift) of the normed sound that asks. Keys are normed, what is pooled is not."""
    torch.manual_seed(0)
    model = filled_model(small_config(pooled_adaln=True))
    conditioner = model.dual_tower_bridge.video_to_audio_conditioners["0"]
    pooling = conditioner.per_frame_pooling
    video, audio = torch.randn(2, 3 * 6, 64, dtype=torch.float64), torch.randn(2, 11, 32, dtype=torch.float64)
    mha = torch.nn.MultiheadAttention(64, 1, batch_first=True).double()
    mha.load_state_dict(pooling.attention.state_dict())
    frames = video.view(2 * 3, 6, 64)
    pooled = mha(pooling.probe.expand(6, 1, 64), frames, frames, need_weights=False)[0].view(2, 3, 64)
    pooled = torch.nn.functional.layer_norm(pooled, (64,), pooling.layernorm.weight, pooling.layernorm.bias, 1e-6)
    pooled = torch.nn.functional.interpolate(pooled.mT, size=11, mode="linear", align_corners=False).mT
    projected = torch.nn.functional.silu(pooled) @ conditioner.adaln.linear.weight.T + conditioner.adaln.linear.bias
    scale, shift = projected[..., :32], projected[..., 32:]
    asking = torch.nn.functional.layer_norm(audio, (32,), eps=1e-5) * (1 + scale) + shift
    expected = conditioner.inner(asking, conditioner.y_norm(video), None, None)
    torch.testing.assert_close(conditioner(audio, video, None, None, 3), expected, rtol=1e-10, atol=1e-12)


def test_condition_scale_trains():
    model, x = filled_model(small_config(trainable_condition_scale=True)), inputs()
    model(**x).video.square().mean().backward()
    assert model.dual_tower_bridge.condition_scale.grad.abs().item() > 0


@pytest.mark.parametrize(
    "strategy,layers",
    [
        ("full", list(range(30))), ("shallow_focus", list(range(10))), ("distributed", list(range(0, 30, 3))),
        ("custom", [0, 2, 4, 6, 8, 12, 16, 20]),
        ("progressive", [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 14, 17, 20, 23, 26, 29]),
    ],
)  # fmt: skip
def test_bridge_strategies(strategy, layers):
    assert interacting_layers(strategy, 30) == layers


@pytest.mark.parametrize("strategy", ["shallow_focus", "distributed", "progressive", "custom"])
def test_every_strategy_builds_and_runs(strategy):
    config = small_config(strategy=strategy)
    model = filled_model(config)
    names = {n.split(".")[2] for n, _ in model.named_parameters() if n.startswith("dual_tower_bridge.audio_to")}
    assert names == {str(i) for i in interacting_layers(strategy, 2)}
    assert torch.isfinite(model(**inputs()).video).all()


def test_oobleck_turns_only_the_first_channels():
    dac, oobleck = (filled_model(small_config(head=48, audio_rope=form)) for form in ("dac", "oobleck"))
    x = inputs()
    assert (dac(**x).audio - oobleck(**x).audio).abs().max() > 1e-4
    rotary = oobleck.audio_dit.rotary((11,), torch.device("cpu"))
    assert rotary.cos.shape == (11, 8)  # 48 - 2·16 = 16 channels turn
    q = torch.randn(1, 11, 1, 48, dtype=torch.float64)
    torch.testing.assert_close(rotary.turn(q)[..., 16:], q[..., 16:], rtol=0, atol=0)


def test_rope_tables_are_float32_cached_and_untouched_by_bfloat16():
    model = filled_model(small_config(), dtype=torch.float32)
    before = model.video_dit.rotary((3, 2, 3), torch.device("cpu"))
    model.to(torch.bfloat16)
    after = model.video_dit.rotary((3, 2, 3), torch.device("cpu"))
    assert after is before and after.cos.dtype == torch.float32
    exact = torch.cos(torch.arange(403, dtype=torch.float64)[:, None] * 10000.0 ** (-FREQUENCY_INDEX / 128.0))
    _, audio = bridge_rotary((49, 1, 1), 403, 128, 24.0, 50.0, False, torch.device("cpu"))
    assert (audio.cos.double() - exact).abs().max() < 6e-8
    video, _ = bridge_rotary((49, 1, 1), 403, 128, 24.0, 50.0, True, torch.device("cpu"))
    position = torch.atan2(video.sin[1, 0], video.cos[1, 0])  # frequency 1: the angle is the position, modulo 2 pi
    assert position.item() == pytest.approx(50.0 / 24.0, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_patches_in_time_stand_in_the_bridge_where_their_first_latents_do(bias):
    """Positions written out in seconds: tokens of 2 latent frames at 30 frames a second, of 3 latent steps of sound."""
    config = small_config(first_frame_bias=bias, audio_fps=25.0)
    config.video.patch_size, config.audio.patch_size = [2, 2, 2], [3]
    model, seen = filled_model(config), {}
    bridge = model.dual_tower_bridge

    def watched(layer, video, audio, rotary_video, rotary_audio, *rest):
        seen.update(video=rotary_video, audio=rotary_audio)
        return type(bridge).forward(bridge, layer, video, audio, rotary_video, rotary_audio, *rest)

    bridge.forward = watched
    x = inputs()
    model(**(x | {"video": torch.randn(2, 16, 6, 4, 4), "condition": torch.zeros(2, 20, 6, 4, 4),
                  "audio": torch.randn(2, 8, 12), "fps": 30.0}))  # fmt: skip
    first = {False: 0.0, True: 3.0}[bias]  # pixel frames by which those after the first are early
    seconds = [max(0.0, 4 * latent - first) / 30 for latent in (0, 2, 4) for _ in range(4)]
    turns = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    for name, positions in (("video", [25 * s for s in seconds]), ("audio", [0.0, 3.0, 6.0, 9.0])):
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * turns
        torch.testing.assert_close(seen[name].cos, angles.cos().float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[name].sin, angles.sin().float(), rtol=0, atol=1e-6)


def test_no_table_is_built_in_a_second_step():
    model, x = filled_model(small_config()), inputs()
    model(**x)
    misses = video_rotary.cache_info().misses, bridge_rotary.cache_info().misses
    model(**x)
    assert (video_rotary.cache_info().misses, bridge_rotary.cache_info().misses) == misses


@pytest.mark.parametrize("name", ["mova_360p", "mova_720p"])
def test_released_sizes_on_the_meta_device(name):
    from_yaml = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    config = JointConfig(
        video=TowerConfig(**from_yaml.pop("video")), audio=TowerConfig(**from_yaml.pop("audio")),
        bridge=BridgeConfig(**from_yaml.pop("bridge")), **from_yaml,
    )  # fmt: skip
    with torch.device("meta"):
        model = JointTransformer(config)
    count = {part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()}
    tensors = {part: len(list(child.parameters())) for part, child in model.named_children()}
    assert count == {
        "video_dit": 14_288_901_184, "video_dit_2": 14_288_901_184, "audio_dit": 1_419_193_472,
        "dual_tower_bridge": 2_659_737_600,
    }  # fmt: skip
    assert tensors == {"video_dit": 1095, "video_dit_2": 1095, "audio_dit": 825, "dual_tower_bridge": 720}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda: small_config(head=64), "head width 64 splits into .*even parts"),
        (lambda: dataclasses.replace(small_config(), audio=dataclasses.replace(small_config().audio, num_layers=4)),
         "audio has 4 blocks, video only 3"),
        (lambda: small_config(strategy="ful"), "'ful' is not one of full, shallow_focus"),
        (lambda: dataclasses.replace(small_config().video, rope="vidoe"), "'vidoe' is not one of"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_inputs_that_do_not_fit_are_refused():
    model, x = filled_model(small_config()), inputs()
    with pytest.raises(ValueError, match="do not divide into patches"):
        model(**(x | {"video": x["video"][..., :5], "condition": x["condition"][..., :5]}))
    with pytest.raises(ValueError, match="there is nothing to do"):
        model(**(x | {"video": None, "audio": None}))


@pytest.mark.parametrize("two_experts", [True, False])
def test_save_and_load_round_trip(tmp_path, two_experts):
    config = small_config(two_experts=two_experts, pooled_adaln=True, trainable_condition_scale=True)
    model = filled_model(config, dtype=torch.float32)
    save_mova(model, tmp_path)
    again = load_mova(tmp_path)
    assert again.config == dataclasses.replace(config, text_length=512)
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and b.requires_grad
    assert (tmp_path / "video_dit_2").is_dir() == two_experts
    save_mova(again, tmp_path)  # over itself
    assert load_mova(tmp_path, torch.bfloat16).video_dit.head.head.weight.dtype == torch.bfloat16


def test_weights_split_over_files_load(tmp_path, monkeypatch):
    model = filled_model(small_config(), dtype=torch.float32)
    monkeypatch.setattr("model.weights.write.SHARD_BYTES", 100_000)
    save_mova(model, tmp_path)
    files = list((tmp_path / "video_dit").glob("*.safetensors"))
    assert len(files) > 1
    assert torch.equal(load_mova(tmp_path).video_dit.head.head.weight, model.video_dit.head.head.weight)
    files[0].unlink()
    with pytest.raises(LayoutError, match=f"names .*{files[0].name}"):
        load_mova(tmp_path)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(LayoutError, match="neither config.json nor any folder of a known layout"):
        read_config(tmp_path / "nowhere")
    save_mova(filled_model(small_config(), dtype=torch.float32), tmp_path)
    path = tmp_path / "audio_dit" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "head.modulation"}, path)
    with pytest.raises(LayoutError, match=r"head.modulation: not there -> \(1, 2, 32\)"):
        load_mova(tmp_path)
    save_file(weights | {"head.modulation": torch.zeros(1, 3, 32)}, path)
    with pytest.raises(LayoutError, match=r"head.modulation: \(1, 3, 32\) -> \(1, 2, 32\)"):
        load_mova(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LayoutError, match="not a readable safetensors"):
        load_mova(tmp_path)


def test_initial_weights_depend_on_seed_and_name_only():
    config = small_config()
    first, second = JointTransformer(config), JointTransformer(config)
    init_weights(first, depth=3, seed=5)
    init_weights(second, depth=3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.video_dit.blocks[0].ffn[0].weight, first.video_dit_2.blocks[0].ffn[0].weight)
    assert not torch.equal(initial_value("a.weight", (4,), 5, 3), initial_value("a.weight", (4,), 6, 3))
    assert first(**inputs(dtype=torch.float32)).video.abs().max() == 0  # the head starts at zero
    golden = initial_value("video_dit.blocks.0.ffn.0.weight", (2, 2), 0, 4)
    torch.testing.assert_close(golden, torch.tensor(GOLDEN), rtol=0, atol=0)


def test_what_writes_into_the_residual_stream_starts_smaller():
    """As in GPT-2: 0.02 for linears, 0.02 / sqrt(2 · blocks) for what is added to the tokens; by measured deviation."""
    model = JointTransformer(small_config(head=96))
    init_weights(model, depth=8)
    writers, others = {}, {}
    for name, p in model.named_parameters():
        if name.endswith("weight") and "norm" not in name and p.dim() > 1 and "head.head" not in name:
            ends = (".self_attn.o.weight", ".cross_attn.o.weight", ".ffn.2.weight", ".inner.o.weight")
            (writers if name.endswith(ends) else others)[name] = p.std().item()
    assert (
        len(writers) == 3 * (3 + 3 + 2) + 2 * 2
    )  # blocks of three towers, two places of the Bridge in both directions
    assert all(std == pytest.approx(0.02 / 4, rel=0.05) for std in writers.values()), writers
    assert len(others) > 60 and all(std == pytest.approx(0.02, rel=0.1) for std in others.values()), others


@pytest.mark.parametrize("form", ["tower", "bridge"])
def test_rope_turns_bfloat16_in_float32(form):
    """Rounded once, at the end: every element is within half a step of bfloat16 of the exact one, far along the clip
    too, where tables or products in bfloat16 would be off by many."""
    rotary = video_rotary((49, 2, 2), 96, torch.device("cpu"))
    if form == "bridge":
        rotary, _ = bridge_rotary((49, 2, 2), 403, 96, 24.0, 50.0, True, torch.device("cpu"))
    x = torch.randn(1, 49 * 4, 2, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotary.turn(x)
    assert turned.dtype == torch.bfloat16
    exact = dataclasses.replace(rotary, cos=rotary.cos.double(), sin=rotary.sin.double()).turn(x.double())
    # Half a unit in the last of 8 bits; and float32's error where two large products cancel.
    assert ((turned.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()


def test_bfloat16_keeps_the_timestep_exact():
    """bf16 has 8 bits: a timestep cast on its way in would move by up to 2 of 1000."""
    model = filled_model(small_config(), dtype=torch.float32).to(torch.bfloat16)
    t = torch.tensor([921.2598])
    vector, _ = model.video_dit.embed_time(t)
    rounded, _ = model.video_dit.embed_time(t.bfloat16().float())
    assert vector.dtype == torch.float32
    assert (vector - rounded).abs().max() > 1e-2


@pytest.mark.parametrize("as_patches", [False, True])
def test_a_predicted_sample_becomes_the_velocity_that_leads_to_it(as_patches):
    x = inputs()
    x["t_video"], x["t_audio"] = torch.tensor([950.0, 10.0]), torch.tensor([400.0, 0.0])  # also below LEAST_NOISE
    velocity = filled_model(small_config())
    sample = filled_model(dataclasses.replace(small_config(), prediction="sample"))
    clean, out = velocity(**x, as_patches=as_patches), sample(**x, as_patches=as_patches)
    noisy = velocity_patches(x["video"], (1, 2, 2)) if as_patches else x["video"]
    for noise, now, aim, t in (
        (noisy, out.video, clean.video, x["t_video"]),
        (x["audio"], out.audio, clean.audio, x["t_audio"]),
    ):
        for i in range(2):
            torch.testing.assert_close(noise[i] - max(t[i] / 1000, 0.05) * now[i], aim[i])
    with pytest.raises(ValueError, match="prediction 'noise'"):
        dataclasses.replace(small_config(), prediction="noise")


class SeenCore(DenseCore):
    """Keeps q and k, and answers nothing."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, q, k, v):
        self.seen["qk"] = q, k
        return v.new_zeros(q.shape)


def test_with_a_clock_bias_equal_times_attract_from_the_start():
    """Before any training, sound looks at the picture of its own time; without the bias at all of it alike."""
    shares = {}
    for bias in (0.0, 1.0):
        config = small_config(cross_rope=True, first_frame_bias=True, clock_bias=bias)
        model = JointTransformer(config)
        init_weights(model, depth=3)
        attention = model.dual_tower_bridge.video_to_audio_conditioners["0"].inner
        seen = {}
        attention.core = SeenCore(seen)
        x = inputs(dtype=torch.float32)
        x |= {
            "video": torch.randn(2, 16, 13, 4, 6),
            "condition": torch.zeros(2, 20, 13, 4, 6),
            "audio": torch.randn(2, 8, 103),
        }
        model(**x)
        q, k = seen["qk"]  # [B, La, H, D], [B, Lv, H, D]
        weights = torch.einsum("qd,kd->qk", q[0, :, 0], k[0, :, 0]).div(q.shape[-1] ** 0.5).softmax(1)
        frames = weights.unflatten(1, (13, -1)).sum(2)  # [La, T]
        nearest = [
            min(range(13), key=lambda f: abs(step - (0 if f == 0 else 50 * (4 * f - 3) / 24))) for step in range(103)
        ]
        shares[bias] = frames[torch.arange(103), nearest].mean().item()
    assert shares[0.0] < 0.1 and shares[1.0] > 0.3, shares
