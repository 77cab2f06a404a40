"""The sampler against plain integration, its guidance, its orders of convergence, held modalities."""

import math

import pytest
import torch

from model.joint import Velocities
from model.sampler import SamplerConfig, sample, schedule
from tests.model.test_joint import filled_model, small_config

TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
EMPTY = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def settings(**values):
    """The schedule of a model of the last phases."""
    return SamplerConfig(**{"shift_video": 5.0, "shift_audio": 5.0, "boundary": 900.0, **values})


def start(seed=5):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return rand(2, 16, 2, 4, 4), rand(2, 8, 7), rand(2, 20, 2, 4, 4)


def run(model, config, **given):
    noise_video, noise_audio, condition = start()
    return sample(model, config, noise_video, noise_audio, condition, TEXT, EMPTY, **given)


class Counted:
    """A field that remembers how it was asked."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return self.field(**inputs)


def test_it_equals_a_plain_integration_written_out():
    """Three steps of dual guidance in float64, with the change of experts."""
    model = filled_model(small_config())
    config = settings(steps=3, shift_video=5.0, shift_audio=2.0, text_scale=3.0, bridge_scale=1.5)
    x, a, condition = start()
    seen = []
    with torch.no_grad():
        for i in range(3):
            u, w = 1 - i / 3, 1 - (i + 1) / 3
            (sv, sa), (nv, na) = ((5 * p / (1 + 4 * p), 2 * p / (1 + p)) for p in (u, w))
            expert = "high" if 1000 * sv >= 900 else "low"
            seen.append(expert)
            v = {}
            for caption, text in (("T", TEXT), ("0", EMPTY.expand(2, 5, 8))):
                for bridge in (1.0, 0.0):
                    out = model(
                        video=x, audio=a, condition=condition, text=text, t_video=torch.full((2,), 1000 * sv),
                        t_audio=torch.full((2,), 1000 * sa), expert=expert, bridge_scale=torch.full((2,), bridge),
                    )  # fmt: skip
                    v[caption, bridge] = out.video, out.audio
            guided = [
                v["0", 0.0][m] + 1.5 * (v["0", 1.0][m] - v["0", 0.0][m]) + 3.0 * (v["T", 1.0][m] - v["0", 1.0][m])
                for m in (0, 1)
            ]
            x, a = x + (nv - sv) * guided[0], a + (na - sa) * guided[1]
    video, audio = run(model, config)
    assert seen == ["high", "high", "low"]
    assert (video - x).abs().max() < 1e-12 * x.abs().max() and (audio - a).abs().max() < 1e-12 * a.abs().max()


@pytest.mark.parametrize("text,bridge,evaluations", [(1, 1, 1), (5, 1, 2), (3.5, 3.5, 2), (5, 3, 3), (1, 0, 3)])
def test_only_terms_that_count_are_evaluated(text, bridge, evaluations):
    model = Counted(filled_model(small_config()))
    run(model, settings(steps=2, text_scale=text, bridge_scale=bridge))
    assert len(model.calls) == 2 * evaluations


def test_scales_of_one_are_the_unguided_field():
    model = filled_model(small_config())
    noise_video, noise_audio, condition = start()
    config = settings(steps=4, text_scale=1, bridge_scale=1)
    video, audio = run(model, config)
    x, a = noise_video, noise_audio
    with torch.no_grad():
        levels = schedule(config)
        for (sv, sa), (nv, na) in zip(levels, levels[1:]):
            out = model(
                video=x, audio=a, condition=condition, text=TEXT, t_video=torch.full((2,), 1000 * sv),
                t_audio=torch.full((2,), 1000 * sa), expert="high" if sv >= 0.9 else "low",
            )  # fmt: skip
            x, a = x + (nv - sv) * out.video, a + (na - sa) * out.audio
    assert torch.equal(video, x) and torch.equal(audio, a)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("ab2", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """dx/dsigma = x: from x at sigma 1 to x/e at sigma 0."""

    def field(video, audio, **_):
        return Velocities(video, audio)

    errors = []
    for steps in (40, 80):
        video, audio = run(field, settings(steps=steps, solver=solver, text_scale=1, boundary=1.0))
        errors.append((video / start()[0] - math.exp(-1)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_nothing_is_extrapolated_over_a_change_of_experts():
    def field(video, audio, expert, **_):
        value = 1.0 if expert == "high" else 2.0
        return Velocities(torch.full_like(video, value), torch.full_like(audio, value))

    results = [run(field, settings(steps=10, solver=solver, text_scale=1)) for solver in ("euler", "ab2")]
    assert torch.allclose(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])


def test_a_given_modality_stays_and_is_told_to_be_clean():
    model = Counted(filled_model(small_config()))
    config = settings(steps=2, text_scale=1)
    given = torch.ones(2, 16, 2, 4, 4, dtype=torch.float64)
    video, audio = run(model, config, given_video=given)
    assert torch.equal(video, given) and not torch.equal(audio, start()[1])
    assert all(call["t_video"].eq(0).all() and call["t_audio"].gt(0).all() for call in model.calls)
    assert {call["expert"] for call in model.calls} == {"low"}
    given_sound = torch.ones(2, 8, 7, dtype=torch.float64)
    video, audio = run(model, config, given_audio=given_sound)
    assert torch.equal(audio, given_sound) and not torch.equal(video, start()[0])
    with pytest.raises(ValueError, match="nothing is left"):
        run(model, config, given_video=given, given_audio=given_sound)


@pytest.mark.parametrize("present", ["video", "audio"])
def test_a_modality_without_the_other_comes_from_its_own_tower(present):
    """Guided steps of a plain integration over a model without the other modality; what does not exist is not read."""
    model = Counted(filled_model(small_config()))
    config = settings(steps=3, shift_video=5.0, shift_audio=2.0, text_scale=3.0, bridge_scale=1.5)
    noises, condition = dict(zip(("video", "audio"), start())), start()[2]
    given = {f"noise_{name}": noise if name == present else None for name, noise in noises.items()}
    video, audio = sample(model, config, condition=condition, text=TEXT, empty_text=EMPTY, **given)
    found, other = (video, audio) if present == "video" else (audio, video)
    assert other is None and len(model.calls) == 2 * 3  # nothing for the Bridge's term
    assert {name for call in model.calls for name in ("video", "audio") if call[name] is not None} == {present}
    shift, x = {"video": 5.0, "audio": 2.0}[present], noises[present]
    with torch.no_grad():
        for i in range(3):
            now, then = (shift * u / (1 + (shift - 1) * u) for u in (1 - i / 3, 1 - (i + 1) / 3))
            expert = "low" if present == "video" and 1000 * now < 900 else "high"
            absent = {"video": None, "audio": None, "condition": None, "t_video": None, "t_audio": None}
            asked = absent | {present: x, f"t_{present}": torch.full((2,), 1000 * now), "expert": expert}
            asked |= {"condition": condition} if present == "video" else {}
            told, plain = (getattr(model.field(**asked, text=t), present) for t in (TEXT, EMPTY.expand(2, 5, 8)))
            x = x + (then - now) * (plain + 3.0 * (told - plain))
    assert (found - x).abs().max() < 1e-12 * x.abs().max()


def test_nothing_to_generate_is_refused():
    noise_video, noise_audio, condition = start()
    for noises, given in (
        ((None, None), {}),
        ((noise_video, None), {"given_video": noise_video}),
        ((None, None), {"given_audio": noise_audio}),
    ):
        with pytest.raises(ValueError, match="nothing is left to generate"):
            sample(None, settings(), *noises, condition, TEXT, EMPTY, **given)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="rk9"):
        settings(solver="rk9")


@pytest.mark.parametrize("name", ["shift_video", "shift_audio", "boundary"])
def test_what_belongs_to_the_training_has_no_default_here(name):
    assert getattr(SamplerConfig(), name) is None
    with pytest.raises(ValueError, match=f"sampler.{name} is null: give the value that the model was trained with"):
        run(filled_model(small_config()), settings(**{name: None}))
