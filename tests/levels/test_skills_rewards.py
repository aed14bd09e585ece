"""The reward of skills against closed forms, a slow twin, and what it promises."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from helpers import SMALL_SAC, known, make_predictor
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded

from layeredrl_torchrl import DADSReward, SkillLevel, SPlaTESReward
from layeredrl_torchrl.levels._outcomes import RunningMoments, identifiability, skill_features
from layeredrl_torchrl.predictors import DeltaStandardizer

BOX = Bounded(-1.0, 1.0, (2,))


class LinearNet(nn.Module):
    """A member that knows: the state changes by ``gain * z``, whatever it is."""

    def __init__(self, state_space, context_space, action_space, n_modes, gain=(0.7, 0.3)):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, state, context, action):
        mean = (action[..., :2] * self.gain).unsqueeze(-2)
        term_prob = torch.zeros(state.shape[:-1])
        return (mean, torch.ones_like(mean)), term_prob.unsqueeze(-1) + 1.0, term_prob


def make_linear(**options):
    """A predictor whose change of the state ``[2]`` is linear in the skill, exactly."""
    known = {"normalize_targets": False, "normalize_inputs": False, "ema_decay": None}
    model = {"action_space": 2, "partial_net": LinearNet, "n_models": 1, **known}
    return make_predictor(model=model | options)


def make_skills(reward, predictor=None, input_spec=BOX, **options):
    """A level for a reward, attached to a predictor if there is one."""
    given = {"input_spec": input_spec, "duration": 3, "learner_factory": SMALL_SAC}
    level = SkillLevel(skill_reward=reward, **given | options)
    if predictor is not None:
        level.attach(predictor)
    return level


def transitions(n=12, obs=2, skill_dim=2):
    """Transitions of skills of three steps each, as a hierarchy lays them out."""
    step = torch.arange(n).remainder(3).unsqueeze(-1)
    skill = torch.rand(n, skill_dim).mul(2).sub(1)
    following = {
        "parent_observation": torch.randn(n, obs),
        "reward": torch.full((n, 1), 7.0),
        "input_done": step == 2,
    }
    following["observation"] = following["parent_observation"]
    now = {"parent_observation": torch.randn(n, obs), "input": skill, "n_actions": step}
    return TensorDict({**now, "next": following}, [n])


def interval(change, gain, std):
    """``log`` of the mean over uniform z in [-1, 1] of a Gaussian around ``gain * z``."""
    normal = torch.distributions.Normal(0.0, 1.0)
    upper, lower = (change + gain) / std, (change - gain) / std
    return ((normal.cdf(upper) - normal.cdf(lower)) / (2 * gain)).log()


# -- the score ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e3), min_size=1, max_size=6), st.floats(-50.0, 50.0))
def test_score_against_sums_in_python(values, shift):
    got = identifiability(torch.tensor(values, dtype=torch.float64)).item()
    top = max(values)
    mean = sum(math.exp(v - top) for v in values) / len(values)
    assert got == pytest.approx(values[0] - top - math.log(mean), rel=1e-9, abs=1e-9)
    assert got <= math.log(len(values)) + 1e-9
    moved = identifiability(torch.tensor([v + shift for v in values], dtype=torch.float64))
    assert moved.item() == pytest.approx(got, rel=1e-6, abs=1e-6)


def test_score_far_from_everything():
    log_prob = torch.tensor([[-1e6, -1e6, -1e6], [-1e6, 0.0, 0.0], [0.0, -1e6, -1e6]])
    got = identifiability(log_prob)
    assert got.tolist() == pytest.approx([0.0, -1e6 - math.log(2 / 3), math.log(3)])


# -- against closed forms -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OneHot, Categorical])
def test_choices_closed_form(kind):
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


def test_first_the_random_linear_model_alone():
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


def test_blend_over_its_duration():
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
def test_linear_model_spreads_skills_as_changes_are_spread(spec, n):
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
def test_against_a_slow_twin(dims, std):
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


def test_never_above_the_number_of_skills_told_apart():
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


# -- as a transform -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rows"), [(SPlaTESReward, [2, 5, 8, 11]), (DADSReward, range(12))]
)
def test_which_steps_are_rewarded(kind, rows):
    reward = kind(n_skill_samples=4)
    level = make_skills(reward, make_linear())
    data = transitions()
    torch.manual_seed(2)
    got = level._sampled(data.clone())["next", "reward"]
    expected, rows = torch.zeros(12, 1), list(rows)
    torch.manual_seed(2)
    read = data["parent_observation"], data["input"], data["next", "parent_observation"]
    expected[rows, 0] = level.rate(*(x[rows] for x in read))
    assert torch.equal(got, expected)
    assert bool(expected[rows].any())
    if kind is SPlaTESReward:  # a skill that is cut short has none
        data["next", "input_done"] |= data["n_actions"] == 1
        assert not level._sampled(data[:2])["next", "reward"].any()


def test_recomputed_when_sampled():
    predictor, reward = make_linear(), SPlaTESReward()
    level = make_skills(reward, predictor)
    level.buffer.extend(transitions())

    def sample():
        torch.manual_seed(4)
        return level._sampled(level.buffer.sample(64))["next", "reward"]

    first = sample()
    with torch.no_grad():
        for parameter in predictor.model.members.parameters():
            parameter.mul_(-1.0)
    assert not torch.allclose(sample(), first)
    stored = level.buffer.storage[:]["next", "reward"]
    assert torch.equal(stored, torch.full((12, 1), 7.0))


# -- options --------------------------------------------------------------------------------


def rated(reward, level=None, n_env_steps=0, since=None, **options):
    """The reward of twelve rows, with the same skills of the prior each time."""
    level = level or make_skills(reward, make_linear(), **options)
    level.n_env_steps.fill_(n_env_steps)
    data = torch.Generator().manual_seed(5)
    start, end = (torch.randn(12, 2, generator=data) for _ in range(2))
    skill = 2 * torch.rand(12, 2, generator=data) - 1
    torch.manual_seed(1)
    return level.rate(start, skill, end, since)


def sampled(reward, data, **options):
    """What a level makes of ``data``, with the same skills of the prior each time."""
    level = make_skills(reward, make_linear(), **options)
    torch.manual_seed(1)
    return level._sampled(data.clone())["next", "reward"]


def test_what_is_told_can_be_clipped():
    plain = rated(SPlaTESReward())
    assert (plain < -1).any()
    assert (plain > 0.5).any()
    assert torch.equal(rated(SPlaTESReward(clip=(-1.0, 0.5))), plain.clamp(-1.0, 0.5))
    assert torch.equal(rated(SPlaTESReward(clip=(-1.0, math.inf))), plain.clamp(min=-1.0))


def test_an_offset_is_paid_for_every_action():
    data = transitions()
    for kind in (SPlaTESReward, DADSReward):
        plain = sampled(kind(), data)
        torch.testing.assert_close(sampled(kind(offset=0.75), data), plain + 0.75)


def test_std_may_depend_on_the_environment_steps():
    reward = SPlaTESReward(std=lambda n: 2.0 - n / 100, n_symmetry_breaking_steps=300)
    level = make_skills(reward, make_linear())
    for n in (0, 100, 150):
        fixed = SPlaTESReward(std=2.0 - n / 100, n_symmetry_breaking_steps=300)
        other = make_skills(fixed, level.parent_predictor)
        fixed.linear_model.copy_(reward.linear_model)
        torch.testing.assert_close(rated(reward, level, n), rated(fixed, other, n))
    with pytest.raises(ValueError, match=r"std\(n_env_steps\) .* got 0.0"):
        rated(reward, level, 200)


def test_normalized_rewards_by_their_own_moments():
    data = transitions(300)
    paid = data["n_actions"] == 2
    plain = sampled(SPlaTESReward(), data)[paid]
    reward = SPlaTESReward(normalize=True, offset=0.5)
    got = sampled(reward, data)
    assert (got[~paid] == 0.5).all()
    expected = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(got[paid] - 0.5, expected, atol=1e-4, rtol=1e-4)
    # Further rewards count as the first did, until there are many; then the old are forgotten.
    moments, values = RunningMoments(), torch.randn(25_000) * 3 + 2
    for part in values[:20_000].split(700):
        moments.observe(part)
    torch.testing.assert_close(moments.mean.float(), values[:20_000].mean())
    for part in values[20_000:].split(100):
        moments.observe(0 * part + 7)
    left = (1 - 100 / 20_100) ** 50
    expected = left * values[:20_000].double().mean() + (1 - left) * 7
    torch.testing.assert_close(moments.mean, expected)
    assert reward.state_dict()["moments.n_seen"] == 100
    assert not SPlaTESReward().state_dict().keys() & {"moments.n_seen"}
    torch.testing.assert_close(RunningMoments()(torch.ones(3)), torch.ones(3))


def test_differences_of_what_is_told_add_up_over_a_skill():
    """To what the outcome tells less what the start does, here in closed form."""
    reward = SPlaTESReward(potential_difference=True, n_skill_samples=40_000)
    level = make_skills(reward, make_linear())
    path = (0.3 * torch.randn(4, 2)).cumsum(0)
    data = transitions(3)
    data["parent_observation"] = path[:1].expand(3, 2)
    data["input"] = data["input"][:1].expand(3, 2).clone()
    data["parent_sees"], data["next", "parent_observation"] = path[:3], path[1:]
    torch.manual_seed(2)
    got = level._sampled(data.clone())["next", "reward"]
    gain, std = torch.tensor([0.7, 0.3]), 0.5
    change = (path - path[0]).double()
    exact = torch.distributions.Normal(gain * data["input"][0], std).log_prob(change)
    told = (exact - interval(change, gain, std)).sum(-1)
    torch.testing.assert_close(got.squeeze(-1), told.diff().float(), atol=0.05, rtol=0.02)
    assert "parent_sees" in level.stored_keys[0]


def test_below_a_known_model_changes_are_in_units_of_the_state():
    moves = lambda state, action: state + 0.7 * action  # noqa: E731
    predictor = known(moves, lambda *_: torch.zeros(()), BOX, width=2)
    skill, start = torch.rand(8, 2).mul(2).sub(1), torch.randn(8, 2)
    end = start + torch.randn(8, 2)
    for dims in ([0, 1], [1]):
        reward = SPlaTESReward(std=0.3, n_skill_samples=40_000, state_dims=dims)
        level = make_skills(reward, predictor)
        exact = torch.distributions.Normal(0.7 * skill, 0.3).log_prob(end - start)
        expected = (exact - interval(end - start, torch.tensor(0.7), 0.3))[:, dims].sum(-1)
        torch.testing.assert_close(level.rate(start, skill, end), expected, atol=0.1, rtol=0.03)
    # And the random linear model spreads skills by one unit.
    reward = SPlaTESReward(std=0.3, n_symmetry_breaking_steps=10, n_skill_samples=40_000)
    level = make_skills(reward, predictor)
    change, gain = (end - start) @ reward.linear_model, torch.tensor(math.sqrt(3.0))
    exact = torch.distributions.Normal(gain * skill, 0.3).log_prob(change)
    expected = (exact - interval(change, gain, 0.3)).sum(-1)
    torch.testing.assert_close(level.rate(start, skill, end), expected, atol=0.15, rtol=0.03)


# -- bad input ------------------------------------------------------------------------------


def test_what_cannot_be_attached():
    for options, predictor, error, message in (
        ({"state_dims": [0, 2]}, make_linear(), ValueError, "above has 2 dimensions"),
        ({"std": [1.0, 1.0, 1.0]}, make_linear(), ValueError, "3 stds for 2 dimensions"),
        ({}, make_predictor(delta_standardizer=False), ValueError, "delta_standardizer=False"),
    ):
        with pytest.raises(error, match=message):
            make_skills(SPlaTESReward(**options), predictor)


def test_data_of_another_kind():
    level = make_skills(SPlaTESReward(), make_linear())
    level.setup(Unbounded((2,)), BOX)
    for key in ("parent_observation", "n_actions", ("next", "parent_observation")):
        with pytest.raises(KeyError, match=r"is given by a Hierarchy"):
            level.learn(transitions().exclude(key))


@pytest.mark.parametrize("spec", [None, Unbounded((2,)), gym.spaces.Box(0.0, math.inf, (2,))])
def test_skills_need_a_prior(spec):
    with pytest.raises(ValueError, match="prior of skills"):
        make_skills(SPlaTESReward(), input_spec=spec)
