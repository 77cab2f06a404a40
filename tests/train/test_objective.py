"""The objective and its draws: invariants 4, 6, 7, 8 and the loss contract, in one process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.train import cases
from train.noise import draw, generator
from train.objective import Objective, ObjectiveConfig, loss_share, shift_sigma, unshift_sigma
from train.optim import OptimConfig, ShardedOptimizer, lr_factor

CONF = Path(__file__).parents[2] / "conf"
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
        for config in (ObjectiveConfig(), ObjectiveConfig(hold_video=0.2, hold_audio=0.3, pair=0.1))
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
    both = Objective(ObjectiveConfig(hold_video=1.0), BOTH)
    assert both.timesteps(*u, "high")[0].min() >= 900 and both.timesteps(*u, "low")[0].max() == 0
    with pytest.raises(ValueError, match="sum to 1"):
        ObjectiveConfig(hold_video=0.7, hold_audio=0.7)


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
        ({"text_dropout": 1.5}, "text_dropout is 1.5"),
        ({"shift_audio": 0.0}, "shift_audio is 0.0"),
        ({"expert_cycle": ["hihg"]}, "expert_cycle is .*'hihg'"),
        ({"boundary": 1000.0}, "boundary is 1000.0"),
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
            bridge_scale=one.draws.keep_bridge,
        )  # fmt: skip
        mse_v = (out.video - (one.draws.noise_video - video)).square().mean()
        mse_a = (out.audio - (one.draws.noise_audio - audio)).square().mean()
        total += batch.weight[i] * (1.0 * mse_v + 0.2 * batch.audio_weight[i] * mse_a)
    assert loss_of(network, prepared).share.item() == pytest.approx((total / 3.0).item(), rel=1e-10)
    assert {0.0, 1.0} == set(draws.keep_text.tolist() + draws.keep_image.tolist() + draws.keep_bridge.tolist())


def test_weight_zero_silences_a_sample_and_a_modality_trains_alone():
    network, prepared = model(), cases.global_batch(0, torch.float64)
    prepared.draws.keep_bridge[:] = 0
    base = loss_of(network, prepared).share.item()
    prepared.batch.video[2] += 3  # the left-over slot
    prepared.batch.audio[1] += 3  # the sample without sound
    assert loss_of(network, prepared).share.item() == pytest.approx(base, rel=1e-12)
    prepared.batch.audio_weight[:] = 0  # pictures without any sound: the audio tower's gradient is zero, not missing
    loss_of(network, prepared).share.backward()
    assert network.audio_dit.head.head.weight.grad.abs().max() == 0
    assert network.video_dit.head.head.weight.grad.abs().max() > 0


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
    wsd = OptimConfig(warmup=0, schedule="wsd", decay=10, final_ratio=0.0)
    assert [lr_factor(wsd, k, 100) for k in (0, 89, 94, 99)] == [1.0, 1.0, pytest.approx(0.5), 0.0]


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"schedule": "cosin"}, "'cosin' is not one of constant, cosine, wsd"),
        ({"betas": [0.9]}, "betas is"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"schedule": "wsd"}, "needs optim.decay"),
    ],
)
def test_impossible_optimizers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**bad)
