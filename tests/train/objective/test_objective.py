"""The objective and its draws: invariants 4, 6, 7, 8 and the loss contract, in one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.batch import Sample, assemble
from data.clip import EncodedClip
from model.shift import shift_sigma, unshift_sigma
from tests.train import cases
from train.engine import ema
from train.engine.optim import ShardedOptimizer
from train.engine.optim_config import OptimConfig
from train.engine.schedule import lr_factor
from train.objective.noise import draw, generator
from train.objective.objective import Objective, ObjectiveConfig, loss_share

CONF = Path(__file__).parents[3] / "conf"
BOTH = ("high", "low")
GOLDEN_UNIFORM = [0.2545300116454653, 0.6564873105189368, 0.6243679066083337]


def model(dtype=torch.float64):
    return cases.reference_model(cases.tiny_config(), dtype)


def loss_of(network, prepared, expert="high", config=cases.OBJECTIVE):
    return loss_share(network, prepared.batch, prepared.draws, config, expert)


# --- timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_shift_is_the_papers_and_its_inverse_inverts(shift):
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(shift_sigma(u, shift), expected)
    for value in u.tolist():
        assert unshift_sigma(shift_sigma(torch.tensor(value, dtype=torch.float64), shift).item(), shift) == (
            pytest.approx(value, abs=1e-12)
        )


def test_video_timesteps_lie_in_the_steps_experts_range_and_fill_it():
    """Invariant 6: high noise from 900 on, inclusive; the other expert below."""
    objective = Objective(ObjectiveConfig(), BOTH)
    u = torch.cat([torch.linspace(0, 1, 100_001, dtype=torch.float64), torch.tensor([1 - 1e-16, 1e-16])])
    high, low = objective.video_timestep(u, "high"), objective.video_timestep(u, "low")
    assert high.min() >= 900 and high.max() <= 1000 and high.min() < 900.01 and high.max() > 999.9
    assert low.max() < 900 and low.min() >= 0 and low.max() > 899.9 and low.min() < 0.01
    assert all(objective.expert_at(t) == "high" for t in high[::5000].tolist())
    assert all(objective.expert_at(t) == "low" for t in low[::5000].tolist())


def test_the_two_ranges_together_are_the_whole_shifted_schedule():
    """Conditioning on the expert must not bend the density: mixing by natural mass gives the one-expert schedule."""
    objective, single = Objective(ObjectiveConfig(), BOTH), Objective(ObjectiveConfig(), BOTH[:1])
    boundary = unshift_sigma(0.9, 5.0)
    assert 1 - boundary == pytest.approx(0.357, abs=1e-3)  # 35.8 % of the mass
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    mixed = torch.where(
        u < boundary,
        objective.video_timestep(u / boundary, "low"),
        objective.video_timestep((u - boundary) / (1 - boundary), "high"),
    )
    torch.testing.assert_close(mixed, single.video_timestep(u, "high"), rtol=1e-5, atol=1e-3)


def test_the_expert_alternates_by_step_and_the_cycle_sets_the_ratio():
    objective = Objective(ObjectiveConfig(), BOTH)
    assert [objective.expert(k) for k in range(4)] == ["high", "low", "high", "low"]
    assert [Objective(ObjectiveConfig(), ("high",)).expert(k) for k in range(2)] == ["high", "high"]
    thrice = Objective(ObjectiveConfig(expert_cycle=["low", "low", "high"]), BOTH)
    assert [thrice.expert(k) for k in range(4)] == ["low", "low", "high", "low"]


def test_held_modalities_and_pairs_take_their_shares_and_the_rest_is_as_without_them():
    plain, mixed = (
        Objective(config, ("high",))
        for config in (ObjectiveConfig(), ObjectiveConfig(clean_video_prob=0.2, clean_audio_prob=0.3, paired_prob=0.1))
    )
    u = torch.from_numpy(generator(0, "test", 0).random((3, 20_000)))
    t_video, t_audio = mixed.timesteps(*u, "high")
    shares = [(t_video == 0).double().mean(), (t_audio == 0).double().mean()]
    assert shares[0] == pytest.approx(0.2, abs=0.02) and shares[1] == pytest.approx(0.3, abs=0.02)
    assert not ((t_video == 0) & (t_audio == 0)).any()  # something is left to learn
    places = unshift_sigma(t_video.double() / 1000, 5.0), t_audio.double() / 1000  # the shift of phase 1 is 5 and 1
    paired = (places[0] - places[1]).abs() < 1e-4
    assert paired.double().mean() == pytest.approx(0.1, abs=0.02)
    free = (t_video > 0) & (t_audio > 0) & ~paired
    for mine, theirs in zip((t_video, t_audio), plain.timesteps(*u, "high"), strict=True):
        torch.testing.assert_close(mine[free], theirs[free], rtol=0, atol=0)
    # Picture without noise is the business of the expert for low noise.
    both = Objective(ObjectiveConfig(clean_video_prob=1.0), BOTH)
    assert both.timesteps(*u, "high")[0].min() >= 900 and both.timesteps(*u, "low")[0].max() == 0
    with pytest.raises(ValueError, match="their sum may be at most 1"):
        ObjectiveConfig(clean_video_prob=0.7, clean_audio_prob=0.7)


@pytest.mark.parametrize("expert,lowest,highest", [("high", 0.9, 1.0), ("low", 0.0, 0.9)])
def test_pairs_stand_at_one_place_of_both_schedules_for_each_expert(expert, lowest, highest):
    """As sampling has them: u of 0..1 in the part that the expert serves, through each modality's own shift."""
    objective = Objective(ObjectiveConfig(paired_prob=1.0, shift_video=5.0, shift_audio=2.0), BOTH)
    u_video, u_audio, u_kind = torch.from_numpy(generator(0, "test", 1).random((3, 5_000)))
    t_video, t_audio = objective.timesteps(u_video, u_audio, u_kind, expert)
    edges = [level / (5 - 4 * level) for level in (lowest, highest)]  # u of the part's ends
    u = edges[0] + (edges[1] - edges[0]) * u_video
    torch.testing.assert_close(t_video.double() / 1000, 5 * u / (1 + 4 * u), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(t_audio.double() / 1000, 2 * u / (1 + u), rtol=1e-5, atol=1e-6)


def test_what_is_given_adds_nothing_to_the_loss_and_low_noise_counts_less():
    network, prepared = model(), cases.global_batch(3, torch.float64)
    prepared.draws.t_video[0] = 0.0
    free = loss_of(network, prepared)
    assert free.learned[0, 0] == 0 and free.learned.sum() == free.learned.numel() - 1
    batch, config = prepared.batch, cases.OBJECTIVE
    weights = batch.weight / batch.total_weight
    video = weights * batch.video_weight * free.learned[0] * config.video_weight
    audio = weights * batch.audio_weight * config.audio_weight
    torch.testing.assert_close((video * free.video + audio * free.audio).sum(), free.share.detach())
    floored = loss_of(network, prepared, config=replace(config, noise_floor=0.3))
    for weight, t in ((video, prepared.draws.t_video), (audio, prepared.draws.t_audio)):
        weight *= (t.to(weight.dtype) / 300).clamp(max=1).square()
    torch.testing.assert_close((video * free.video + audio * free.audio).sum(), floored.share.detach())
    assert floored.share < free.share


@pytest.mark.parametrize("phase,audio_shift,text_dropout", [(1, 1.0, 0.5), (2, 5.0, 0.2), (3, 5.0, 0.2)])
def test_phases_have_the_papers_values(phase, audio_shift, text_dropout):
    """Invariant 7."""
    config = ObjectiveConfig(**yaml.safe_load((CONF / "objective" / f"phase{phase}.yaml").read_text()))
    assert (config.shift_video, config.shift_audio) == (5.0, audio_shift)
    assert (config.text_dropout, config.audio_weight, config.video_weight) == (text_dropout, 0.2, 1.0)
    objective = Objective(config, BOTH)
    assert objective.audio_timestep(torch.tensor([0.5])).item() == pytest.approx(
        1000 * audio_shift * 0.5 / (1 + (audio_shift - 1) * 0.5)
    )


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"video_weight": 0.0, "audio_weight": 0.0}, "nothing would be learned"),
        ({"expert_cycle": ["hihg"]}, "expert_cycle is .*'hihg'"),
    ],
)
def test_impossible_objectives_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**bad)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_belong_to_the_sample_not_to_its_place():
    """Invariant 4: any split of a batch draws the same numbers for the same samples."""
    prepared = cases.global_batch(0, torch.float32)
    objective = Objective(cases.OBJECTIVE, BOTH)
    for rows in ([2], [3, 1], [0, 1, 2, 3]):
        again = draw(cases.part(prepared, rows).batch, objective, seed=11)
        for name in vars(again):
            assert torch.equal(getattr(again, name), getattr(prepared.draws, name)[rows]), name


def test_no_two_samples_and_no_two_purposes_share_numbers():
    streams = {
        (seed, purpose, sample): tuple(generator(seed, purpose, sample).random(4))
        for seed in (0, 1)
        for purpose in ("scalars", "noise_video", "noise_audio")
        for sample in (0, 1, 2, 10**12)
    }
    numbers = [number for stream in streams.values() for number in stream]
    assert len(set(numbers)) == len(numbers)
    # A long draw of one sample must not run into the next sample's numbers.
    long = generator(0, "noise_video", 0).random(200_000)
    assert generator(0, "noise_video", 1).random() not in long


def test_draws_are_the_same_on_every_machine():
    """Recorded once; a change here would change every resumed run."""
    values = generator(0, "scalars", 5).random(3)
    np.testing.assert_array_equal(values, GOLDEN_UNIFORM)


def test_draws_have_the_right_distribution():
    prepared = cases.global_batch(0, torch.float32)
    prepared.batch.sample_numbers = np.arange(4)
    config = ObjectiveConfig(text_dropout=0.2, image_dropout=0.6, bridge_dropout=0.4)
    draws = []
    for step in range(0, 800, 2):
        prepared.batch.step, prepared.batch.sample_numbers = step, np.arange(4) + 4 * step
        draws.append(draw(prepared.batch, Objective(config, BOTH), seed=2))
    mean = {name: torch.cat([getattr(d, name).flatten() for d in draws]).mean().item() for name in vars(draws[0])}
    assert mean["keep_text"] == pytest.approx(0.8, abs=0.04)
    assert mean["keep_image"] == pytest.approx(0.4, abs=0.05)
    assert mean["keep_bridge"] == pytest.approx(0.6, abs=0.05)
    assert abs(mean["noise_video"]) < 0.01
    t = torch.stack([torch.cat([d.t_video for d in draws]), torch.cat([d.t_audio for d in draws])])
    assert abs(torch.corrcoef(t)[0, 1].item()) < 0.08  # independent timesteps
    assert torch.cat([d.t_video for d in draws]).unique().numel() > 1500  # one a sample


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_contracts_formula():
    network, prepared = model(), cases.global_batch(0, torch.float64)
    batch, draws = prepared.batch, prepared.draws
    total = 0.0
    for i in range(4):
        one = cases.part(prepared, [i])
        video, audio = one.batch.video.double(), one.batch.audio.double()
        sigma_v, sigma_a = one.draws.t_video.double() / 1000, one.draws.t_audio.double() / 1000
        text = one.batch.text if one.draws.keep_text.item() else batch.empty_text[None]
        out = network(
            video=(1 - sigma_v) * video + sigma_v * one.draws.noise_video,
            audio=(1 - sigma_a) * audio + sigma_a * one.draws.noise_audio,
            condition=one.batch.condition.double() * one.draws.keep_image, text=text,
            t_video=one.draws.t_video, t_audio=one.draws.t_audio, expert="high",
            bridge_scale=one.draws.keep_bridge * batch.audio_weight[i],
        )  # fmt: skip
        mse_v = (out.video - (one.draws.noise_video - video)).square().mean()
        mse_a = (out.audio - (one.draws.noise_audio - audio)).square().mean()
        total += batch.weight[i] * (1.0 * mse_v + 0.2 * batch.audio_weight[i] * mse_a)
    assert loss_of(network, prepared).share.item() == pytest.approx((total / 3.0).item(), rel=1e-10)
    assert {0.0, 1.0} == set(draws.keep_text.tolist() + draws.keep_image.tolist() + draws.keep_bridge.tolist())


def test_weight_zero_silences_a_sample():
    network, prepared = model(), cases.global_batch(0, torch.float64)
    base = loss_of(network, prepared).share.item()
    prepared.batch.video[2] += 3  # the left-over slot
    assert loss_of(network, prepared).share.item() == pytest.approx(base, rel=1e-12)


@pytest.mark.parametrize("expert", BOTH)
def test_a_mixed_batch_has_the_gradient_of_its_samples_apart_from_models_without_what_they_lack(expert):
    """One clip with both, one without sound, one without picture, one damaged; NaN where there is nothing to read."""
    network, prepared = model(), cases.global_batch(0, torch.float64)
    batch, draws, config = prepared.batch, prepared.draws, replace(cases.OBJECTIVE, noise_floor=0.0)
    batch.weight[:] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    batch.video_weight[:] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    batch.audio_weight[:] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    draws.keep_bridge[:] = 1
    batch.audio[1], batch.video[2], batch.condition[2] = float("nan"), float("nan"), float("nan")
    parts = loss_of(network, prepared, expert, config)
    parts.share.backward()
    found = gradients(network)
    assert parts.video.isfinite().all() and parts.audio.isfinite().all()
    for slot, (video, audio) in enumerate([(True, True), (True, False), (False, True)]):
        loss_apart(network, cases.part(prepared, [slot]), expert, video, audio).div(3.0).backward()
    expected = gradients(network)
    assert found.keys() == expected.keys()
    worst, name = cases.worst(found, expected)
    assert worst <= 1e-10, name


def gradients(network):
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def loss_apart(network, one, expert, video, audio):
    """A sample's loss, from a model that is given None for what the sample lacks."""
    batch, draws = one.batch, one.draws
    sigma_v, sigma_a = draws.t_video.double() / 1000, draws.t_audio.double() / 1000
    x, a = (
        (1 - sigma_v) * batch.video + sigma_v * draws.noise_video,
        (1 - sigma_a) * batch.audio + sigma_a * draws.noise_audio,
    )
    out = network(
        video=x if video else None, audio=a if audio else None,
        condition=batch.condition.double() * draws.keep_image if video else None,
        text=batch.text if draws.keep_text.item() else batch.empty_text[None],
        t_video=draws.t_video if video else None, t_audio=draws.t_audio if audio else None, expert=expert,
    )  # fmt: skip
    loss = torch.zeros((), dtype=torch.float64)
    if video:
        loss = loss + (out.video - (draws.noise_video - batch.video)).square().mean()
    if audio:
        loss = loss + torch.tensor(0.2) * (out.audio - (draws.noise_audio - batch.audio)).square().mean()
    return loss


def test_nothing_is_given_where_a_modality_is_absent():
    """Else zeros would be a picture to learn the sound from, and what there is would not be learned."""
    objective = Objective(ObjectiveConfig(clean_video_prob=0.6, clean_audio_prob=0.4), BOTH)
    free = Objective(ObjectiveConfig(), BOTH)
    batch = cases.global_batch(1, torch.float64, slots=64).batch  # of the expert for low noise
    held = draw(batch, objective, seed=3)
    assert ((held.t_video == 0) | (held.t_audio == 0)).double().mean() > 0.8
    for lacking in ("audio_weight", "video_weight"):
        single = replace(batch, **{"audio_weight": torch.ones(64), lacking: torch.zeros(64)})
        found, expected = draw(single, objective, seed=3), draw(batch, free, seed=3)
        assert torch.equal(found.t_video, expected.t_video) and torch.equal(found.t_audio, expected.t_audio)


def test_a_clip_that_lacks_what_its_bucket_has_has_no_weight_for_it():
    grid = (16, cases.BUCKET.frames, cases.BUCKET.height, cases.BUCKET.width)
    latents = torch.ones(grid).bfloat16()
    sound = torch.ones(cases.BUCKET.audio_steps, 128).bfloat16()
    clips = [
        EncodedClip("both", latents, sound, latents, {}),
        EncodedClip("mute", latents, None, latents, {}),
        EncodedClip("blind", None, sound, None, {}),
    ]
    text = torch.ones(2, cases.TEXT_DIM).bfloat16()
    samples = [Sample(clip.key, i, 1.0, clip, text) for i, clip in enumerate(clips)] + [
        Sample("bad", 3, 0.0, None, None)
    ]
    batch = assemble(0, cases.BUCKET, samples, text, cases.TEXT, 4.0)
    assert batch.video_weight[:3].tolist() == [1, 1, 0] and batch.audio_weight[:3].tolist() == [1, 0, 1]
    assert batch.weight.tolist() == [1, 1, 1, 0]


def test_dropouts_reach_the_network():
    network, prepared = model(), cases.global_batch(0, torch.float64)
    for name in ("keep_text", "keep_image", "keep_bridge"):
        getattr(prepared.draws, name)[:] = 1
    base = loss_of(network, prepared)
    for name in ("keep_text", "keep_image", "keep_bridge"):
        getattr(prepared.draws, name)[:] = 0
        dropped = loss_of(network, prepared)
        assert dropped.share != base.share, name
        getattr(prepared.draws, name)[:] = 1
    prepared.draws.keep_text[:] = 0
    prepared.batch.text += 1  # a dropped caption has no influence left
    dropped = loss_of(network, prepared).share
    prepared.batch.text += 1
    assert loss_of(network, prepared).share == dropped


# --- optimizer -------------------------------------------------------------------------------------------------------


def test_learning_rates_of_groups_and_schedule_reach_the_optimizer():
    """Invariant 7: towers 1e-5, Bridge 2e-5."""
    config = OptimConfig(**yaml.safe_load((CONF / "optim" / "adamw.yaml").read_text()))
    assert (config.lr_tower, config.lr_bridge, config.weight_decay) == (1e-5, 2e-5, 0.001)
    network = model(torch.float32)
    optimizer = ShardedOptimizer(network, config, None)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.5, optimizer.global_norm())
    for name, p in network.named_parameters():
        rate = 0.5 * (2e-5 if name.startswith("dual_tower_bridge") else 1e-5)
        moved = (start[name] * (1 - rate * 0.001) - p.detach()).mean().item()
        assert moved == pytest.approx(rate, rel=2e-2), name


def test_schedules_are_functions_of_the_step_alone():
    """Invariant 8."""
    constant = OptimConfig(warmup=4)
    assert [lr_factor(constant, k, 10) for k in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = OptimConfig(warmup=0, schedule="cosine", final_ratio=0.1)
    assert lr_factor(cosine, 0, 100) == 1.0
    assert lr_factor(cosine, 50, 100) == pytest.approx(0.55)
    assert lr_factor(cosine, 100, 100) == pytest.approx(0.1)
    wsd = OptimConfig(warmup=0, schedule="wsd", decay_steps=10, final_ratio=0.0)
    assert [lr_factor(wsd, k, 100) for k in (0, 89, 94, 99)] == [1.0, 1.0, pytest.approx(0.5), 0.0]


def test_schedules_begin_after_their_warm_up():
    """Values by hand: 4 steps of warm-up; cosine over the 16 that are left of 20, wsd down over the last 5."""
    cosine = OptimConfig(warmup=4, schedule="cosine", final_ratio=0.2)
    by_hand = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 8: 0.2 + 0.8 * 0.8535533905932737, 12: 0.6,
               16: 0.2 + 0.8 * 0.1464466094067263, 20: 0.2}  # fmt: skip
    assert {k: lr_factor(cosine, k, 20) for k in by_hand} == pytest.approx(by_hand, abs=1e-12)
    wsd = OptimConfig(warmup=4, schedule="wsd", decay_steps=5, final_ratio=0.1)
    by_hand = {0: 0.25, 3: 1.0, 4: 1.0, 14: 1.0, 15: 0.82, 16: 0.64, 17: 0.46, 18: 0.28, 19: 0.1}
    assert {k: lr_factor(wsd, k, 20) for k in by_hand} == pytest.approx(by_hand, abs=1e-12)


def test_moments_on_the_host_over_several_visits_change_no_bit(monkeypatch):
    """Visits of at most 3,000 elements: many in each group, and one for a parameter that is larger."""
    visits, found = [], []
    for on_host in (False, True):
        monkeypatch.setattr(ema, "VISIT", 3_000)
        network = model(torch.float32)
        optimizer = ShardedOptimizer(network, OptimConfig(lr_tower=1e-2, lr_bridge=2e-2, warmup=0), None, on_host)
        inner = optimizer.inner.step
        optimizer.inner.step = lambda: (visits.append(on_host), inner())  # noqa: B023  called at once
        for step in range(4):
            for number, (name, p) in enumerate(network.named_parameters()):
                if step % 2 == 0 or not name.startswith("video_dit_2."):  # which idles in every other step
                    g = torch.Generator().manual_seed(1000 * step + number)
                    p.grad = torch.randn(p.shape, generator=g)
            optimizer.step(1.0, optimizer.global_norm())
        moments = [optimizer.inner.state[shard] for shard in optimizer.shards.values()]
        found.append([*network.parameters(), *(m[key] for m in moments for key in ("exp_avg", "exp_avg_sq", "step"))])
        assert max(p.numel() for p in network.parameters()) > 3_000
    assert visits.count(False) == 4 and visits.count(True) > 4 * 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_eps_is_what_is_added_to_the_root_of_the_second_moment():
    """In a first step both moments are those of the gradient alone: the update is lr · g / (|g| + eps)."""
    network = model(torch.float32)
    config = OptimConfig(lr_tower=1e-2, lr_bridge=1e-2, weight_decay=0.0, eps=3e-3, clip=1e9, warmup=0)
    optimizer = ShardedOptimizer(network, config, None)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step(1.0, optimizer.global_norm())
    for name, p in network.named_parameters():
        torch.testing.assert_close(start[name] - p.detach(), torch.full_like(p, 2.5e-3), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"schedule": "cosin"}, "'cosin' is not one of constant, cosine, wsd"),
        ({"betas": [0.9]}, "betas is"),
        ({"schedule": "wsd"}, "needs optim.decay_steps"),
    ],
)
def test_impossible_optimizers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**bad)
