"""Which member moves which entry of a batch, and by how much: against digits and closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from shifts import digits
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import (
    TS1,
    EnsembleDisagreement,
    FixedEncoderNet,
    Model,
    PredictorEnv,
    ProbFCDynamics,
    TSInfinity,
)


def starts(*batch):
    return TensorDict({"state": torch.zeros(*batch, 1), "context": torch.zeros(*batch, 1)}, batch)


def imagine(env, start, horizon):
    return env.rollout(
        horizon, auto_reset=False, tensordict=start, break_when_any_done=False, set_truncated=False
    )


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


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("n_modes", [1, 2])
def test_each_entry_is_stepped_as_its_member_predicts(make_predictor, grad, n_modes):
    """With many copies of a row, sample moments are those of the member's own mixture."""
    net = partial(ProbFCDynamics, hidden_sizes=(16,), ignore_context=False)
    model = {"n_models": 3, "n_modes": n_modes, "partial_net": net}
    encoder = FixedEncoderNet((3,), [0, 1], [2])
    predictor = make_predictor(encoder, context_dim=1, model=model)
    n, member = 4000, torch.arange(3).repeat_interleave(4000)
    row = torch.randn(3, 2), torch.randn(3, 1), torch.rand(3, 1)
    mean, weights, std, _ = predictor.model.predict(*row)
    state, context, action = (x[member] for x in row)
    td = TensorDict(state=state, context=context, action=action, imagined_member=member[:, None])
    with torch.set_grad_enabled(grad):
        env = PredictorEnv(predictor, propagation=TSInfinity())
        following = env.step(td.auto_batch_size_(1))["next", "state"]
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


# -- termination, bonus, bad members ------------------------------------------------------------


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
def test_what_is_not_finite_raises_and_names_the_member(wrap, propagation, part):
    env = PredictorEnv(wrap(Broken(part)), propagation=propagation)
    with pytest.raises(ValueError, match=r"member\(s\) \[1\]"):
        env.step(env.rand_action(starts(50)))


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
