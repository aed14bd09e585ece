"""Which member moves which entry of a batch, and by how much: against digits and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs.utils import check_env_specs
from torchrl.modules import CEMPlanner

from layeredrl_torchrl import (
    TS1,
    EnsembleDisagreement,
    Expectation,
    Model,
    PredictorEnv,
    Propagation,
    TSInfinity,
)
from layeredrl_torchrl.imagination._members import step_by_members

PROPAGATIONS = [Expectation(), TS1(), TSInfinity()]
SAMPLING = [TS1(), TSInfinity()]
shared = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def name(x):
    return type(x).__name__


def digits(states, n_models):
    """How often each member moved an entry, ``[..., M]``."""
    value = states.squeeze(-1).round().long()
    return torch.stack([(value // 10**m) % 10 for m in range(n_models)], -1)


def starts(*batch):
    return TensorDict({"state": torch.zeros(*batch, 1), "context": torch.zeros(*batch, 1)}, batch)


def imagine(env, start, horizon):
    return env.rollout(
        horizon, auto_reset=False, tensordict=start, break_when_any_done=False, set_truncated=False
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
@pytest.mark.parametrize(
    "options", [{}, {"sample_termination": True}, {"batch_size": [3]}], ids=str
)
def test_specs_are_what_torchrl_expects(make_predictor, propagation, options):
    for space in (Bounded(-1.0, 1.0, (2,)), OneHot(3), Categorical(3)):
        predictor = make_predictor(model={"action_space": space, "n_modes": 2})
        env = PredictorEnv(predictor, propagation=propagation, **options)
        check_env_specs(env)
        kept = "imagined_member" in env.rollout(2).keys()
        assert kept == isinstance(propagation, TSInfinity)


@shared
@given(
    n_models=st.integers(1, 4),
    batch=st.sampled_from([(), (1,), (5,), (2, 3)]),
    seed=st.integers(0, 10),
)
def test_each_entry_is_moved_by_its_member_as_one_by_one(make_shifts, n_models, batch, seed):
    """The slow twin steps entry by entry, with all members, and picks one."""
    generator = torch.Generator().manual_seed(seed)
    model = make_shifts(n_models).model
    member = torch.randint(n_models, (*batch, 1), generator=generator)
    state, context, action = torch.randn(3, *batch, 1, generator=generator)
    following, term_prob = step_by_members(model, member, state, context, action)
    assert following.shape == state.shape
    assert term_prob.shape == batch
    inputs = (x.reshape(-1, 1) for x in (state, context, action))
    for i, row in enumerate(zip(*inputs, strict=True)):
        (mean, _), _, p = model.predict_members(*(x.expand(n_models, 1, 1) for x in row))
        m = int(member.reshape(-1)[i])
        assert following.reshape(-1)[i] == mean[m, 0, 0, 0]
        assert term_prob.reshape(-1)[i] == p[m, 0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("n_modes", [1, 2])
def test_networks_are_stepped_as_the_member_predicts(make_ensemble, grad, n_modes):
    """With many copies of a row, sample moments are those of the member's own mixture."""
    ensemble = make_ensemble(state_dim=2, n_models=3, n_modes=n_modes, hidden=(16,))
    n = 4000
    row = torch.randn(3, 2), torch.zeros(3, 0), torch.rand(3, 1)
    mean, weights, std, _ = ensemble.predict(*row)
    member = torch.arange(3).repeat_interleave(n)
    with torch.set_grad_enabled(grad):
        following, _ = step_by_members(ensemble, member[:, None], *(x[member] for x in row))
    assert following.requires_grad == grad
    for m in range(3):
        w, mu, sigma = weights[m, m, :, None], mean[m, m], std[m, m]
        expected = (w * mu).sum(0)
        var = (w * (sigma**2 + mu**2)).sum(0) - expected**2
        got = following[member == m]
        assert ((got.mean(0) - expected).abs() < 5 * (var / n).sqrt()).all()
        torch.testing.assert_close(got.var(0), var, rtol=0.15, atol=0)


def test_members_share_the_rows(make_shifts):
    predictor = make_shifts(5)
    env = PredictorEnv(predictor, propagation=TS1())
    env.step(env.rand_action(starts(1000)))
    (rows,) = predictor.model.rows
    assert 200 <= rows < 300  # not 1000: each is evaluated on about its fifth


def test_tsinfinity_stays_with_its_member(make_shifts):
    env = PredictorEnv(make_shifts(3), propagation=TSInfinity())
    data = imagine(env, starts(300), 6)
    moved = digits(data["next", "state"][:, -1], 3)
    assert (moved.max(-1).values == 6).all()
    assert (moved.sum(-1) == 6).all()
    counts = torch.bincount(moved.argmax(-1), minlength=3) / 300
    assert (counts - 1 / 3).abs().max() < 5 * (2 / 9 / 300) ** 0.5
    assert torch.equal(data["next", "imagined_member"][:, -1, 0], moved.argmax(-1))
    # given ones are kept
    given_member = torch.arange(300).remainder(3).unsqueeze(-1)
    data = imagine(env, starts(300).set("imagined_member", given_member), 2)
    assert torch.equal(digits(data["next", "state"][:, -1], 3).argmax(-1), given_member[:, 0])


def test_a_reset_draws_the_members_of_an_episode(make_shifts):
    env = PredictorEnv(make_shifts(4), propagation=TSInfinity(), batch_size=[2000])
    first, second = (env.reset()["imagined_member"][:, 0] for _ in range(2))
    counts = torch.bincount(4 * first + second, minlength=16) / 2000
    assert (counts - 1 / 16).abs().max() < 5 * (1 / 16 / 2000) ** 0.5
    data = env.rollout(4)
    assert torch.equal(data["imagined_member"][:, 0], data["next", "imagined_member"][:, -1])
    assert torch.equal(
        digits(data["next", "state"][:, -1], 4).argmax(-1), data["imagined_member"][:, 0, 0]
    )


def test_ts1_draws_anew_for_every_entry_at_every_step(make_shifts):
    data = imagine(PredictorEnv(make_shifts(4), propagation=TS1()), starts(20_000), 2)
    moved = digits(data["next", "state"] - data["state"], 4)
    assert (moved.sum(-1) == 1).all()
    member = moved.argmax(-1)
    counts = torch.bincount(4 * member[:, 0] + member[:, 1], minlength=16) / 20_000
    assert (counts - 1 / 16).abs().max() < 5 * (1 / 16 / 20_000) ** 0.5


class TwoModes(Model):
    """Member m has modes at ``(2m + 1) * (+1, -2)`` with weights 0.8 and 0.2 and std 0.5."""

    def __init__(self):
        super().__init__(
            Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,)), n_models=2, n_modes=2
        )

    def predict_members(self, state, context, action):
        factor = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        mean = state.unsqueeze(-2) + factor * torch.tensor([1.0, -2.0]).view(1, 1, 2, 1)
        weights = torch.tensor([0.8, 0.2]).expand(*state.shape[:2], 2)
        return (mean, torch.full_like(mean, 0.5)), weights, torch.zeros(state.shape[:2])


@pytest.mark.parametrize("propagation", SAMPLING, ids=name)
def test_states_are_distributed_as_the_mixture(wrap, propagation):
    """The first step against the closed form; over steps, what stays adds up and what parts not."""
    n, horizon = 40_000, 4
    env = PredictorEnv(wrap(TwoModes()), propagation=propagation)
    data = imagine(env, starts(n), horizon)
    first = data["next", "state"][:, 0, 0]
    for x in (-7.0, -5.0, -1.0, 0.5, 1.0, 2.0, 3.2):
        components = [(0.4, 1.0), (0.1, -2.0), (0.4, 3.0), (0.1, -6.0)]
        cdf = sum(w * 0.5 * (1 + math.erf((x - mu) / 0.5 / math.sqrt(2))) for w, mu in components)
        assert abs((first <= x).float().mean().item() - cdf) < 5 * 0.5 / math.sqrt(n)
    # Member means are 0.4 and 1.2; variance within a member 0.25 + f^2 * (0.8 + 0.8 - 0.16).
    within = 0.25 + (1.44 + 9 * 1.44) / 2
    between = 0.16
    last = data["next", "state"][:, -1, 0]
    steps = horizon**2 if isinstance(propagation, TSInfinity) else horizon
    expected = horizon * within + steps * between
    assert last.var().item() == pytest.approx(expected, rel=0.04)
    assert last.mean().item() == pytest.approx(0.8 * horizon, abs=5 * math.sqrt(expected / n))


# -- termination, bonus, bad members ------------------------------------------------------------


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
def test_termination_is_a_threshold_or_a_draw(make_shifts, propagation):
    for p, ends in ((0.3, 0.0), (0.7, 1.0)):
        env = PredictorEnv(make_shifts(term_prob=p), propagation=propagation)
        td = env.step(env.rand_action(starts(10)))
        assert td["next", "terminated"].float().mean() == ends
        env = PredictorEnv(
            make_shifts(term_prob=p), propagation=propagation, sample_termination=True
        )
        td = env.step(env.rand_action(starts(5000)))
        assert abs(td["next", "done"].float().mean() - p) < 5 * math.sqrt(p * (1 - p) / 5000)
        assert torch.equal(td["next", "done"], td["next", "terminated"])
    for p in (0.0, 1.0):
        env = PredictorEnv(make_shifts(term_prob=p), sample_termination=True)
        assert (env.step(env.rand_action(starts(2000)))["next", "done"] == bool(p)).all()


def test_an_entry_ends_with_its_own_members_probability(make_shifts):
    env = PredictorEnv(make_shifts(8), propagation=TSInfinity())
    td = env.step(env.rand_action(starts(400)))["next"]
    assert torch.equal(td["terminated"], td["imagined_member"] > 5)  # m / 10 > 1/2


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
def test_the_bonus_is_added_to_the_reward(make_predictor, propagation):
    predictor = make_predictor(model={"n_models": 3})
    bonus = EnsembleDisagreement(predictor.model, scale=2.0)
    env = PredictorEnv(predictor, propagation=propagation, exploration_bonus=bonus)
    td = TensorDict({"state": torch.randn(2, 3, 2), "context": torch.zeros(2, 3, 0)}, [2, 3])
    td = env.step(env.rand_action(td))
    inputs = td["state"], td["context"], td["action"]
    expected = predictor.rew_func(*inputs) + bonus(*inputs)
    assert (bonus(*inputs) > 0).all()
    torch.testing.assert_close(td["next", "reward"].squeeze(-1), expected)


class Broken(Model):
    """Member 1 predicts NaN in its mean or its probability of termination."""

    def __init__(self, part):
        super().__init__(Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,)), n_models=3)
        self.part = part

    def predict_members(self, state, context, action):
        mean, term_prob = state.unsqueeze(-2).clone(), torch.zeros(state.shape[:2])
        (mean if self.part == "mean" else term_prob)[1] = torch.nan
        return (mean, torch.ones_like(mean)), torch.ones_like(mean[..., 0]), term_prob


@pytest.mark.parametrize("part", ["mean", "term_prob"])
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
def test_what_is_not_finite_raises_and_names_the_member(wrap, propagation, part):
    env = PredictorEnv(wrap(Broken(part)), propagation=propagation)
    with pytest.raises(ValueError, match=r"member\(s\) \[1\]"):
        env.step(env.rand_action(starts(50)))


def test_a_reward_that_is_not_finite_raises(wrap, make_shifts):
    predictor = wrap(make_shifts().model, lambda s, c, a: s[..., 0] / 0.0)
    with pytest.raises(ValueError, match="what rew_func gave holds 2 non-finite"):
        PredictorEnv(predictor).step(starts(2).set("action", torch.zeros(2, 1)))


@pytest.mark.parametrize(
    "member",
    [torch.full((4, 1), 3), torch.full((4, 1), -1), torch.zeros(4).long(), torch.zeros(4, 1)],
    ids=["too large", "negative", "flat", "float"],
)
def test_members_that_there_are_not_are_refused(make_shifts, member):
    env = PredictorEnv(make_shifts(3), propagation=TSInfinity())
    td = starts(4).set("action", torch.zeros(4, 1))
    with pytest.raises(ValueError, match="leave them out"):
        env.step(td.set("imagined_member", member))


class Other(Propagation):
    def advance(self, step, n_models, state, context, action):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"propagation": "ts1"}, TypeError, "TSInfinity"),
        ({"propagation": Other()}, TypeError, "TSInfinity"),
        ({"exploration_bonus": 1.0}, TypeError, "exploration_bonus"),
        ({"initial_states": torch.zeros(3)}, TypeError, "initial_states"),
        ({"use_value_func": True, "sample_termination": True}, ValueError, "twice"),
    ],
)
def test_what_does_not_fit_is_refused(make_predictor, options, error, match):
    with pytest.raises(error, match=match):
        PredictorEnv(make_predictor(), **options)


def test_a_bonus_of_another_shape_is_refused(make_point):
    env = PredictorEnv(make_point(), exploration_bonus=lambda state, context, action: state)
    with pytest.raises(ValueError, match=r"\[\*B\]"):
        env.step(starts(3).set("action", torch.zeros(3, 1)))


# -- TorchRL's planner --------------------------------------------------------------------------


class NoisyPoints(Model):
    """Two members that move a point by half the action, with a little noise, ±0.05 apart."""

    def __init__(self):
        super().__init__(Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,)), n_models=2)

    def predict_members(self, state, context, action):
        apart = torch.tensor([-0.05, 0.05]).view(2, 1, 1)
        mean = (state + 0.5 * action + apart).unsqueeze(-2)
        std = torch.full_like(mean, 0.02)
        return (mean, std), torch.ones_like(mean[..., 0]), torch.zeros(state.shape[:2])


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_torchrls_planner_works_with_every_propagation(wrap, propagation, batch):
    predictor = wrap(NoisyPoints())
    env = PredictorEnv(predictor, propagation=propagation)
    planner = CEMPlanner(env, planning_horizon=3, optim_steps=10, num_candidates=300, top_k=30)
    obs = torch.tensor([[0.0, 0.2], [0.3, 0.1], [0.0, 5.0]])[: torch.Size(batch).numel()]
    td = predictor.encode(TensorDict({"observation": obs.reshape(*batch, 2)}, batch))
    with torch.no_grad():
        action = planner(td)["action"]
    best = (2 * (obs[..., 1:] - obs[..., :1])).clamp(-1, 1).reshape(*batch, 1)
    torch.testing.assert_close(action, best, atol=0.2, rtol=0)
