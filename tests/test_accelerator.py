"""Models, predictors and imagined environments neither wait for an accelerator nor copy to it."""

from __future__ import annotations

import pytest
import torch
from pretended import Accelerator
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded

from layeredrl_torchrl import (
    TS1,
    EnsembleDisagreement,
    Expectation,
    IdentityEncoder,
    Model,
    ModelLoss,
    PredictorEnv,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    StaticPredictor,
    TSInfinity,
    ValueGradientLoss,
    ValueNet,
    _watch,
    reads_next_state,
)
from layeredrl_torchrl.nets import QValueOperator, TanhActor

D, C, A = 5, 2, 3
SPACES = {
    "continuous": Bounded(-1.0, torch.tensor([1.0, 2.0, 3.0]), (A,)),
    "unbounded": Unbounded((A,)),
    "integer": Categorical(A),
    "one-hot": OneHot(A),
}


class Own(nn.Module):
    """A member network that somebody wrote."""

    def __init__(self, state_space, context_space, action_space, n_modes):
        super().__init__()
        self.n_modes = n_modes
        self.layer = nn.Linear(D, n_modes * D)

    def forward(self, state, context, action):
        mean = self.layer(state).unflatten(-1, (self.n_modes, D))
        weights = mean[..., 0].softmax(-1)
        return (mean, mean.exp()), weights, state[..., 0].sigmoid()


class Still(Model):
    def predict_members(self, state, context, action):
        mean = state.unsqueeze(-2).expand(-1, -1, self.n_modes, -1)
        return (mean, mean.exp()), mean[..., 0].softmax(-1), state[..., 0].sigmoid()


def make_predictor(kind="built-in", space="continuous", **options):
    torch.manual_seed(0)
    spaces = Unbounded((D,)), Unbounded((C,)), SPACES[space]
    sizes = {"n_models": 3, "n_modes": 2, "n_particles_per_model": 2} | options
    if kind == "own model":
        model = Still(*spaces, **sizes)
    else:
        net = (
            Own
            if kind == "own network"
            else lambda *args: ProbFCDynamics(*args, hidden_sizes=(8, 8), ignore_context=False)
        )
        model = ProbabilisticEnsemble(*spaces, net, **sizes)
        states = torch.randn(9, D)
        action = spaces[2].rand((9,))
        model.fit_statistics(states, torch.randn(9, C), action, states + 0.1)
    heads = ValueNet(D, C, (8,)), RewardNet(D, C, SPACES[space], (8,))
    return StaticPredictor(model, *heads, _Encoder(), D, C)


class _Encoder(IdentityEncoder):
    def __init__(self):
        super().__init__((D + C,))
        self.latent_state_dim, self.context_dim = D, C

    def split(self, observation):
        return observation[..., :D], observation[..., D:]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator()


def given(accelerator, space, *batch, horizon=None):
    """State, context and action on the device; call it where that is watched."""
    device = accelerator.device
    shape = batch if horizon is None else (*batch, horizon)
    if space == "integer":
        action = torch.zeros(shape, dtype=torch.int64, device=device)
    else:
        action = torch.rand(*shape, A, device=device)
        action = action.bool() if space == "one-hot" else action
    return torch.randn(*batch, D, device=device), torch.randn(*batch, C, device=device), action


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("kind", "space"),
    [("built-in", name) for name in SPACES]
    + [("own network", "continuous"), ("own model", "integer")],
)
def test_models_and_returns_neither_wait_nor_copy(accelerator, kind, space, grad):
    predictor = accelerator.move(make_predictor(kind, space))
    model = predictor.model
    with torch.set_grad_enabled(grad), accelerator.watched():
        one = given(accelerator, space, 4)
        model.predict(*one)
        model.get_log_prob(*one, one[0])
        model.get_log_prob(*one, one[0], std=0.1)
        td = TensorDict({"state": one[0], "context": one[1], "action": one[2]}, [4])
        model(td)
        model.dist(td)
        several = given(accelerator, space, 2, 2, horizon=3)
        for propagation in (None, TSInfinity(n_particles=3), TS1(), Expectation()):
            for deterministic in (False, True):
                traj = model.rollout(*several, deterministic, propagation=propagation)
                assert traj["next", "state"].device.type == accelerator.device.type
                options = {"deterministic": deterministic, "propagation": propagation}
                predictor.returns(*several, use_value_func=True, discount=0.9, **options)
        model.uncertainty(traj)
        if kind == "own model":
            return
        bonus = EnsembleDisagreement(model)
        bonus(*one)
        predictor.returns(*several, exploration_bonus=bonus)
        observation = torch.randn(4, D + C, device=accelerator.device)
        predictor.predict(observation, one[2])
        predictor(TensorDict({"observation": observation, "action": one[2]}, [4]))
        traj = predictor.rollout(observation, one[2].unsqueeze(1))
        assert traj["next", "reward"].device.type == accelerator.device.type


@reads_next_state
def moved(state, context, action, next_state):
    return (next_state - state).sum(-1)


@reads_next_state
def risky(state, context, action, next_state):
    return next_state[..., 0].sigmoid()


@pytest.mark.parametrize("propagation", [TSInfinity(), TS1(), Expectation()])
def test_known_rewards_and_terminations_neither_wait_nor_copy(accelerator, propagation):
    base = make_predictor()
    parts = (base.model, base.val_func, moved, base.encoder, D, C)
    env = PredictorEnv(StaticPredictor(*parts, term_func=risky), propagation=propagation)
    env = accelerator.move(env)
    predictor = env.predictor
    with torch.no_grad(), accelerator.watched():
        env._device = accelerator.device
        state, context, action = given(accelerator, "continuous", 4)
        td = TensorDict({"state": state, "context": context, "action": action}, [4])
        env._step(td)
        predictor.step(td)
        predictor.rollout(torch.cat([state, context], -1), action.unsqueeze(1))
        several = given(accelerator, "continuous", 2, 2, horizon=3)
        found = predictor.returns(*several, propagation=propagation, use_value_func=True)
        assert found.device.type == accelerator.device.type


@pytest.mark.parametrize(
    "options", [{}, {"sample_termination": True}, {"use_value_func": True}], ids=str
)
@pytest.mark.parametrize("propagation", [TSInfinity(), TS1(), Expectation()])
def test_imagined_environments_neither_wait_nor_copy(accelerator, propagation, options):
    env = PredictorEnv(make_predictor(), propagation=propagation, **options)
    env.exploration_bonus = EnsembleDisagreement(env.predictor.model)
    env = accelerator.move(env)
    env.exploration_bonus.model = env.predictor.model
    with torch.no_grad(), accelerator.watched():
        env._device = accelerator.device
        state, context, action = given(accelerator, "continuous", 4)
        td = TensorDict({"state": state, "context": context, "action": action}, [4])
        for _ in range(2):
            after = env._step(td)
            assert after["state"].device.type == accelerator.device.type
            td = after.set("action", action)


@pytest.mark.parametrize("kind", ["built-in", "own network"])
def test_the_loss_of_a_model_neither_waits_nor_copies(accelerator, kind):
    loss = ModelLoss(make_predictor(kind).model)
    loss = accelerator.move(loss)
    with accelerator.watched():
        state, context, action = given(accelerator, "continuous", 8)
        no = torch.zeros(8, 1, dtype=torch.bool, device=accelerator.device)
        step = {"state": state, "context": context, "action": action}
        after = {"state": state, "terminated": no}
        terms = loss(TensorDict({**step, "next": after}, [8]))
        sum(value for key, value in terms.items() if key.startswith("loss_")).backward()


@pytest.mark.parametrize("given_targets", [False, True])
def test_value_gradients_neither_wait_nor_copy(accelerator, given_targets):
    actor = TanhActor(D, C, SPACES["continuous"], (8,))
    qvalue = QValueOperator(D, C, A, (8,))
    loss = ValueGradientLoss(actor, qvalue, make_predictor(), horizon=2)
    predictor = accelerator.move(loss.predictor)
    loss = accelerator.move(loss)
    loss.__dict__["predictor"] = predictor
    with accelerator.watched():
        state, context, action = given(accelerator, "continuous", 8)
        td = TensorDict({"state": state, "context": context}, [8])
        if given_targets:
            td["action"], td["value_target"] = action, state[:, :1]
        terms = loss(td)
        sum(value for key, value in terms.items() if key.startswith("loss_")).backward()


def test_what_a_device_found_is_told_later_and_names_the_member(monkeypatch):
    """The flags of a call, as an accelerator leaves them, but with values."""
    monkeypatch.setattr(_watch._WATCH, "at_once", ())
    model = make_predictor().model
    state, context, action = torch.randn(4, D), torch.randn(4, C), torch.zeros(4, 2, A)
    with torch.no_grad():
        model.members.biases[-1][1] = torch.nan
        traj = model.rollout(state, context, action)
        assert traj["next", "state"][:, 1].isnan().all()  # in sight, whoever looks
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3 .* after the call"):
            model.rollout(state, context, action)
        model.rollout(state, context, action)
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3"):
            _watch.flush()


class Predict(nn.Module):
    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, observation, action):
        return self.predictor.predict(observation, action)


def test_a_predictor_is_vmapped_exported_and_compiled():
    predictor = make_predictor()
    observation, action = torch.randn(6, D + C), torch.rand(6, A)
    expected = predictor.predict(observation, action)
    exported = torch.export.export(Predict(predictor), (observation, action)).module()
    compiled = torch.compile(predictor.predict, fullgraph=True, backend="eager")
    for call in (torch.vmap(predictor.predict), exported, compiled):
        for found, value in zip(call(observation, action), expected, strict=True):
            torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-4)
