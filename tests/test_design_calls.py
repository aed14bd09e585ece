"""The whole way on a real task: from its spaces to a predictor, collected data, learning, plans."""

from __future__ import annotations

import copy
from functools import partial

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, GymEnv, SerialEnv, TransformedEnv
from torchrl.modules import CEMPlanner

from layeredrl_torchrl import (
    IdentityEncoder,
    PredictorEnv,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
)

ENV = "InvertedPendulum-v5"
D, A = 4, 1  # of that task


def make_env(n_envs=None):
    env = GymEnv(ENV) if n_envs is None else SerialEnv(n_envs, partial(GymEnv, ENV))
    return TransformedEnv(env, DoubleToFloat())


def make_predictor(state_space, action_space, **kwargs):
    return RewardPredictor(
        model=ProbabilisticEnsemble(
            state_space=state_space,
            context_space=None,
            action_space=action_space,
            partial_net=partial(ProbFCDynamics, hidden_sizes=(8,)),
            n_models=3,
            n_modes=2,
            n_particles_per_model=2,
        ),
        val_func=ValueNet(D, 0, (8,)),
        rew_func=RewardNet(D, 0, action_space, (8,)),
        encoder=IdentityEncoder((D,)),
        latent_state_dim=D,
        context_dim=0,
        learn_encoder=True,
        **kwargs,
    )


@pytest.fixture(params=["gymnasium", "torchrl"])
def predictor(request):
    """From the spaces of either library."""
    if request.param == "gymnasium":
        env = gym.make(ENV)
        return make_predictor(env.observation_space, env.action_space)
    env = make_env()
    return make_predictor(env.observation_spec["observation"], env.action_spec)


@pytest.fixture
def situation():
    """Three observations, and four actions after each."""
    return torch.randn(3, D), 6 * torch.rand(3, 4, A) - 3


def test_train_and_eval_set_the_mode_of_every_part(predictor):
    assert not any(module.training for module in predictor.eval().modules())
    assert all(module.training for module in predictor.train().modules())


def test_rollouts_are_random_and_follow_the_seed(predictor, situation):
    torch.manual_seed(7)
    first = predictor.rollout(*situation)["next", "state"]
    assert not torch.equal(predictor.rollout(*situation)["next", "state"], first)
    torch.manual_seed(7)
    assert torch.equal(predictor.rollout(*situation)["next", "state"], first)


def test_values_and_rewards_are_those_of_their_networks(predictor, situation):
    obs, act = situation
    *_, reward, _ = predictor.predict(obs, act[:, 0])
    torch.testing.assert_close(predictor.value(obs), predictor.val_func(obs, obs[:, :0], act))
    torch.testing.assert_close(predictor.predict_reward(obs, act[:, 0]), reward)


def test_under_autocast_predictions_are_float32_and_near_the_exact_ones(predictor, situation):
    obs, act = situation
    exact, *_ = predictor.predict(obs, act[:, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, *_ = predictor.predict(obs, act[:, 0])
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, exact, atol=0.05, rtol=0.05)


def test_steps_of_a_tensordict_are_what_predict_says(predictor, situation):
    """By name, as a module, and with the encoder before it, as TorchRL's WorldModel is called."""
    obs, act = situation[0], situation[1][:, 0]
    mean, _, _, reward, _ = predictor.predict(obs, act)
    td = TensorDict({"observation": obs, "action": act}, [3])
    encoded = predictor.encode(td.clone())
    for result in (predictor.step(encoded.clone()), predictor.step_module(encoded), predictor(td)):
        torch.testing.assert_close(result["next", "loc"], mean)
        torch.testing.assert_close(result["next", "reward"], reward.unsqueeze(-1))
        for key in ("terminated", "done"):
            assert result["next", key].shape == (3, 1)
            assert result["next", key].dtype == torch.bool


@pytest.mark.parametrize("use_value_func", [False, True])
@pytest.mark.parametrize("n_envs", [None, 2])
def test_what_a_collector_yields_is_stored_and_every_parameter_learns_from_it(
    n_envs, use_value_func
):
    real_env = make_env(n_envs)
    real_env.set_seed(0)
    space = real_env.observation_spec_unbatched["observation"], real_env.action_spec_unbatched
    predictor = make_predictor(*space, n_steps=2)
    env = PredictorEnv(predictor, action_spec=space[1], use_value_func=use_value_func)
    cem = CEMPlanner(env, planning_horizon=3, optim_steps=2, num_candidates=16, top_k=4)
    planner = TensorDictSequential(predictor.encoder, cem)
    storage = LazyTensorStorage(200, ndim=1 if n_envs is None else 2)
    buffer = TensorDictReplayBuffer(storage=storage)
    start = copy.deepcopy(predictor.state_dict())
    n_steps = 0
    collector = Collector(
        real_env,
        policy=planner,
        frames_per_batch=20,
        total_frames=60,
        auto_register_policy_transforms=True,
    )
    for data in collector:
        assert data.shape == ((20,) if n_envs is None else (n_envs, 20 // n_envs))
        assert space[1].is_in(data["action"])
        buffer.extend(data)
        n_steps += data.numel()
        loss, loss_info = predictor.learn(buffer, 3, 16, 16, n_steps)
        assert loss_info["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert torch.isfinite(loss)
    collector.shutdown()
    assert len(buffer) == n_steps == 60
    assert predictor.n_learn_updates.item() == 9
    for name, parameter in predictor.named_parameters():
        assert not torch.equal(parameter, start[name]), name


def test_learning_from_collected_experience_improves_on_unseen_steps():
    """Real MuJoCo under random actions: the model beats "nothing changes"."""
    real_env = make_env(4)
    real_env.set_seed(1)
    collector = Collector(real_env, frames_per_batch=800, total_frames=800)
    buffer = ReplayBuffer(storage=LazyTensorStorage(800, ndim=2))
    buffer.extend(next(iter(collector)))
    collector.shutdown()
    space = real_env.observation_spec_unbatched["observation"], real_env.action_spec_unbatched
    predictor = make_predictor(*space, model_lr=lambda steps: 1e-2, reward_lr=1e-2)
    predictor.learn(buffer, 150, 32, 64, 800)

    test = make_env(2).rollout(40, break_when_any_done=False).reshape(-1)
    mean, weights, *_ = predictor.predict(test["observation"], test["action"])
    mean = (weights.unsqueeze(-1) * mean).sum(-2).mean(-2)
    true = test["next", "observation"]
    error = (mean - true).square().mean(0)
    still = (test["observation"] - true).square().mean(0)
    assert (error < 0.5 * still).all()
    # 1 for every step but the last
    reward = predictor.predict_reward(test["observation"], test["action"])
    error = (reward - test["next", "reward"][:, 0]).square().mean()
    assert error < 0.8 * test["next", "reward"].var()
