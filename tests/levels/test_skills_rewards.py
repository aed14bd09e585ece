"""The reward of skills against closed forms, a slow twin, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_predictor
from hypothesis import given, settings
from hypothesis import strategies as st
from skill_parts import BOX, interval, make_linear, make_skills
from torchrl.data import Bounded, Categorical, OneHot

from layeredrl_torchrl import SPlaTESReward
from layeredrl_torchrl.levels._outcomes import identifiability, skill_features
from layeredrl_torchrl.predictors import DeltaStandardizer

# -- the score ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e3), min_size=1, max_size=6), st.floats(-50.0, 50.0))
def test_the_score_is_a_log_ratio_of_sums_in_python(values, shift):
    got = identifiability(torch.tensor(values, dtype=torch.float64)).item()
    top = max(values)
    mean = sum(math.exp(v - top) for v in values) / len(values)
    assert got == pytest.approx(values[0] - top - math.log(mean), rel=1e-9, abs=1e-9)
    assert got <= math.log(len(values)) + 1e-9
    moved = identifiability(torch.tensor([v + shift for v in values], dtype=torch.float64))
    assert moved.item() == pytest.approx(got, rel=1e-6, abs=1e-6)


def test_the_score_is_finite_far_from_everything():
    log_prob = torch.tensor([[-1e6, -1e6, -1e6], [-1e6, 0.0, 0.0], [0.0, -1e6, -1e6]])
    got = identifiability(log_prob)
    assert got.tolist() == pytest.approx([0.0, -1e6 - math.log(2 / 3), math.log(3)])


# -- against closed forms -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OneHot, Categorical])
def test_of_choices_the_reward_has_its_closed_form(kind):
    """A mean over many draws of four skills is the mean over the four; learned and linear model."""
    spec = kind(4)
    predictor = make_predictor(model={"action_space": spec, "n_models": 1})
    reward = SPlaTESReward(n_skill_samples=20_000, std=0.7, n_symmetry_breaking_steps=10)
    level = make_skills(reward, predictor, input_spec=spec)
    choice, start, end = torch.tensor([0, 1, 2, 3, 3]), torch.randn(5, 2), torch.randn(5, 2)
    every = torch.eye(4, dtype=torch.int64) if kind is OneHot else torch.arange(4)
    linear = 2.0 * reward.linear_model.mT.expand(5, 4, 2) + start.unsqueeze(1)
    with torch.no_grad():
        loc = [predictor.model.predict(start, None, z.expand(5, *z.shape))[0] for z in every]
    for n_steps, means in ((0, linear), (10, torch.stack(loc, 1)[:, :, 0, 0])):
        level.n_env_steps.fill_(n_steps)
        log_prob = -0.5 * ((end.unsqueeze(1) - means) / 0.7).square().sum(-1)
        own = log_prob.gather(1, choice.unsqueeze(1)).squeeze(1)
        expected = own - log_prob.exp().mean(1).log()
        got = level.rate(start, every[choice], end)
        torch.testing.assert_close(got, expected, atol=0.03, rtol=0.01)


def test_at_first_the_random_linear_model_pays_alone():
    """In its own axes that model is a product of intervals."""
    reward = SPlaTESReward(n_skill_samples=40_000, std=0.5, n_symmetry_breaking_steps=100)
    predictor = make_linear()
    predictor.delta_standardizer.fit(torch.randn(500, 2) * torch.tensor([2.0, 0.1]) + 1.0)
    level = make_skills(reward, predictor)
    model = reward.linear_model
    torch.testing.assert_close(model @ model.mT, torch.eye(2))
    start, skill = torch.randn(8, 2), torch.rand(8, 2).mul(2).sub(1)
    end = start + torch.randn(8, 2) * torch.tensor([2.0, 0.1]) + 1.0
    # Rotated by the model's transpose, the expected change is sqrt(3) z.
    change = predictor.delta_standardizer(end - start) @ model
    gain = torch.tensor(math.sqrt(3.0))
    exact = torch.distributions.Normal(gain * skill, 0.5).log_prob(change)
    expected = (exact - interval(change, gain, 0.5)).sum(-1)
    assert int(level.n_env_steps) == 0
    torch.testing.assert_close(level.rate(start, skill, end), expected, atol=0.05, rtol=0.02)


def test_symmetry_breaking_fades_linearly_over_its_duration():
    reward = SPlaTESReward(std=0.5, n_symmetry_breaking_steps=100)
    level = make_skills(reward, make_linear())
    batch = torch.randn(6, 2), torch.rand(6, 2), torch.randn(6, 2)

    def after(n_steps):
        level.n_env_steps.fill_(n_steps)
        torch.manual_seed(1)
        return level.rate(*batch)

    first, half, last = after(0), after(50), after(100)
    assert not torch.allclose(first, last)
    torch.testing.assert_close(half, (first + last) / 2)
    assert torch.equal(after(1000), last)
    assert [reward.symmetry_breaking(n) for n in (0, 25, 100, 101)] == [1.0, 0.75, 0.0, 0.0]
    plain = make_skills(SPlaTESReward(std=0.5), level.parent_predictor)
    torch.manual_seed(1)
    assert torch.equal(plain.rate(*batch), last)


@pytest.mark.parametrize(("spec", "n"), [(BOX, 2), (OneHot(5), 5), (Bounded(2.0, 8.0, (3,)), 3)])
def test_the_linear_model_spreads_skills_as_changes_are_spread(spec, n):
    reward = SPlaTESReward(n_symmetry_breaking_steps=1)
    predictor = make_predictor(model={"action_space": spec})
    make_skills(reward, predictor, input_spec=spec)
    assert reward.linear_model.shape == (2, n)
    drawn = skill_features(spec, spec.rand((20_000,)), torch.float32)
    expected = drawn @ reward.linear_model.mT
    torch.testing.assert_close(expected.square().mean(0), torch.ones(2), atol=0.05, rtol=0.0)


# -- against a slow twin --------------------------------------------------------------------


def slow(predictor, whitening, std, start, skill, end, others):
    """One transition, skill, member and mode at a time."""
    out = []
    for s, z, e, more in zip(start, skill, end, others, strict=True):
        density = []
        for candidate in [z, *more]:
            state, context = predictor.encode(s)
            mean, weights, _, _ = predictor.model.predict(state, context, candidate)
            p = 0.0
            for member, shares in zip(mean, weights, strict=True):
                for mode, share in zip(member, shares, strict=True):
                    error = whitening @ (predictor.encode(e)[0] - mode) / std
                    p += float(share / len(mean) * torch.exp(-0.5 * error.square().sum()))
            density.append(p)
        out.append(math.log(density[0] / (sum(density) / len(density))))
    return torch.tensor(out)


@torch.no_grad()
@pytest.mark.parametrize(("dims", "std"), [(None, [0.8, 0.5, 2.0]), ([1], 0.8), ([2, 0], 0.8)])
def test_the_reward_is_that_of_a_slow_twin(dims, std):
    model = {"action_space": 2, "n_models": 3, "n_modes": 2, "state_dim": 3}
    predictor = make_predictor(state_dim=3, encoder=None, model=model)
    sample = torch.randn(400, 3) @ torch.randn(3, 3)
    predictor.delta_standardizer.fit(sample)
    reward = SPlaTESReward(n_skill_samples=4, std=std, state_dims=dims)
    level = make_skills(reward, predictor)
    start, skill = torch.randn(5, 3), torch.rand(5, 2).mul(2).sub(1)
    end = start + sample[:5]
    torch.manual_seed(3)
    got = level.rate(start, skill, end)
    torch.manual_seed(3)
    others = BOX.rand((5, 4))
    chosen = range(3) if dims is None else dims
    alone = DeltaStandardizer(len(chosen))
    alone.fit(sample[:, list(chosen)])
    whitening = torch.zeros(len(chosen), 3)
    whitening[:, list(chosen)] = alone.whitening
    twin = slow(predictor, whitening, torch.tensor(std), start, skill, end, others)
    torch.testing.assert_close(got, twin, atol=1e-3, rtol=1e-3)


def test_the_reward_is_never_above_the_number_of_skills_told_apart():
    reward = SPlaTESReward(n_skill_samples=7, std=1e-3)
    level = make_skills(reward, make_linear())
    skill, start = torch.rand(200, 2).mul(2).sub(1), torch.randn(200, 2)
    gain = torch.tensor([0.7, 0.3])
    fits = level.rate(start, skill, start + gain * skill)
    assert bool((fits <= math.log(8) + 1e-5).all())
    assert fits.mean() > 0.99 * math.log(8)
    mixed_up = level.rate(start, skill, start + gain * skill.roll(1, 0))
    assert bool(mixed_up.isfinite().all())
    assert mixed_up.mean() < -100.0
