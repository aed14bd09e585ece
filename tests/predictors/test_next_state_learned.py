"""Learning with rewards and terminations that read the next state, known or learned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import learn, make_buffer, make_ensemble, make_predictor
from tensordict import TensorDict
from torch import nn

from layeredrl_torchrl import (
    IdentityEncoder,
    PredictorLoss,
    RewardPredictor,
    ScalarHead,
    reads_next_state,
)


def known_end(state, context, action):
    return torch.zeros(state.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize("known", [{"rew_func"}, {"term_func"}, {"rew_func", "term_func"}])
def test_learned_and_known_parts_can_be_mixed(known):
    functions = {
        "rew_func": reads_next_state(lambda s, c, a, after: after[..., 0]),
        "term_func": reads_next_state(lambda s, c, a, after: after[..., 0] > 0),
    }
    predictor = make_predictor(**{name: functions[name] for name in known})
    info = learn(predictor, make_buffer())
    assert ("loss_reward" in info) == ("rew_func" not in known)
    traj = predictor.rollout(torch.randn(4, 2), torch.zeros(4, 3, 1))
    after = traj["next", "state"][..., :1]
    assert torch.equal(traj["next", "reward"], after) == ("rew_func" in known)
    assert torch.equal(traj["next", "term_prob"], (after > 0).float()) == ("term_func" in known)


def test_with_a_known_end_the_models_is_not_learned():
    """It learns what a twin learns whose terminations weigh nothing."""
    buffer, learned = make_buffer(), []
    for options in ({"term_func": known_end}, {"termination_loss_weight": 0.0}, {}):
        torch.manual_seed(5)
        predictor = make_predictor(**options)
        predictor.learn(buffer, 5, 8, 8, 0)
        learned.append(torch.cat([p.flatten() for p in predictor.model.parameters()]))
    assert torch.equal(learned[0], learned[1])
    assert not torch.equal(learned[0], learned[2])


class Slope(nn.Module):
    """A reward to be learned: so much for each unit of progress."""

    reads_next_state = True

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, state, context, action, next_state):
        return self.slope * (next_state - state)[..., 0]


class Progress(ScalarHead):
    """A network that is shown the progress."""

    reads_next_state = True

    def __init__(self):
        super().__init__(1, (16,), nn.SiLU)

    def features(self, state, context, action, next_state):
        return (next_state - state)[..., :1]


def test_a_module_that_reads_the_next_state_learns_from_the_real_one():
    loss = PredictorLoss(IdentityEncoder((2,)), Slope(), None, k_steps=2)
    obs, following = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    after = {"observation": following, "reward": torch.randn(4, 3, 1)}
    after["terminated"] = torch.zeros(4, 3, 1, dtype=torch.bool)
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[1, 1:] = False
    following[1, 1:] = math.nan  # behind an episode's end anything may stand
    data = {"observation": obs, "action": torch.zeros(4, 3, 1), "next": after, "valid": valid}
    found = loss(TensorDict(data, [4, 3]))["loss_reward"]
    errors = [
        0.5 * (following[i, t, 0] - obs[i, t, 0]) - after["reward"][i, t, 0]
        for i, t in itertools.product(range(4), range(2))
        if valid[i, t]
    ]
    torch.testing.assert_close(found, torch.stack(errors).square().mean())
    prepared = loss.prepare(TensorDict(data, [4, 3]))
    parts = [loss.terms(part)["loss_reward"] for part in prepared.split(2)]
    torch.testing.assert_close((3 * parts[0] + 4 * parts[1]) / 7, found)


@pytest.mark.parametrize("head", [Slope, Progress])
def test_a_reward_that_reads_the_next_state_is_learned(head):
    obs = torch.randn(400, 2)
    following = obs + 3.0 * torch.randn(400, 2)
    no = torch.zeros(400, 1, dtype=torch.bool)
    after = {"observation": following, "terminated": no, "done": ~no}
    after["reward"] = 4.0 * (following - obs)[:, :1]
    data = {"observation": obs, "action": 0.0 * obs[:, :1], "next": after}
    buffer = make_buffer(TensorDict(data, [400]))
    torch.manual_seed(0)
    predictor = RewardPredictor(
        *(make_ensemble(), None, head(), IdentityEncoder((2,)), 2), n_steps=1, reward_lr=3e-2
    )
    predictor.learn(buffer, 300, 64, 16, 400)
    inputs = obs, obs[:, :0], obs[:, :1], following
    error = (predictor.reward_of(*inputs) - after["reward"][:, 0]).square().mean().sqrt()
    assert error < 1.0
    if head is Progress:  # its inputs are normalised by what it is shown
        std = (following - obs)[:, 0].std().item()
        assert predictor.rew_func.inputs.scale.item() == pytest.approx(std, rel=0.1)


def test_the_density_comes_with_the_known_end():
    predictor = make_predictor(term_func=reads_next_state(lambda s, c, a, after: after[..., 0] > 0))
    obs, following = torch.randn(8, 2), torch.randn(8, 2)
    _, term_prob, _ = predictor.get_standardized_log_prob(obs, torch.zeros(8, 1), following)
    assert torch.equal(term_prob, (following[:, 0] > 0).float())
