"""Imagined episodes that start at stored observations: resets, collectors, and SAC on top."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import ExplorationType, StepCounter, TransformedEnv, set_exploration_type
from torchrl.envs.utils import check_env_specs
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from layeredrl_torchrl import (
    TS1,
    EncoderNet,
    Expectation,
    FixedEncoderNet,
    FromBuffer,
    PredictorEnv,
    TSInfinity,
)

PROPAGATIONS = [Expectation(), TS1(), TSInfinity()]


def name(x):
    return type(x).__name__


@pytest.fixture
def point_buffer(make_transitions):
    """Real transitions of the point: observation ``[x, goal]``, each told apart by both."""

    def build(n=50, **kwargs):
        data = make_transitions(n_steps=n)
        data["observation"] = torch.stack([torch.arange(n) / n, 1 + torch.arange(n) / n], -1)
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), **kwargs)
        buffer.extend(data)
        return buffer

    return build


# -- where episodes start -----------------------------------------------------------------------


def test_starts_are_stored_observations_each_equally_likely(make_point, point_buffer):
    draw = FromBuffer(point_buffer(), make_point())
    starts = draw(20_000)
    assert starts.batch_size == (20_000,)
    torch.testing.assert_close(starts["context"], 1 + starts["state"])  # of one observation
    counts = torch.bincount((50 * starts["state"]).round().long().flatten(), minlength=50)
    assert len(counts) == 50
    assert (counts / 20_000 - 1 / 50).abs().max() < 5 * (0.02 / 20_000) ** 0.5


def test_starts_are_encoded_without_gradients(make_predictor, make_buffer):
    encoder = EncoderNet((3,), 2, 1, in_keys=["pixels"], out_keys=["latent", "goal"])
    keys = {"in_keys": ["latent", "goal", "action"]}
    predictor = make_predictor(encoder, context_dim=1, model=keys)
    data = TensorDict({"pixels": torch.ones(1, 3), "other": 2 * torch.ones(1, 3)}, [1])
    data["next"] = data.clone().update(
        {k: torch.zeros(1, 1, dtype=torch.bool) for k in ("done", "terminated")}
    )
    buffer = make_buffer(data)
    state, context = encoder(torch.ones(4, 3))
    starts = FromBuffer(buffer, predictor)(4)
    torch.testing.assert_close(starts["latent"], state)
    torch.testing.assert_close(starts["goal"], context)
    assert not starts["latent"].requires_grad
    starts = FromBuffer(buffer, predictor, observation_key="other")(4)
    torch.testing.assert_close(starts["latent"], encoder(2 * torch.ones(4, 3))[0])
    with pytest.raises(KeyError, match="observation"):
        FromBuffer(buffer, predictor, observation_key="observation")(4)
    env = PredictorEnv(predictor, initial_states=FromBuffer(buffer, predictor), batch_size=[3])
    check_env_specs(env)
    torch.testing.assert_close(env.reset()["latent"], state[:3])


def test_what_is_written_later_is_drawn_too_and_the_buffer_is_left_alone(make_point, point_buffer):
    buffer = point_buffer()
    draw = FromBuffer(buffer, make_point())
    assert draw(500)["state"].max() < 1
    new = buffer[:].clone()
    new["observation"] += 5
    buffer.extend(new)
    before = copy.deepcopy(buffer.state_dict())
    assert (draw(500)["state"] > 1).float().mean() == pytest.approx(0.5, abs=0.12)
    after = buffer.state_dict()
    assert after["_sampler"] == before["_sampler"]
    assert after["_writer"] == before["_writer"]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
def test_specs_and_resets(make_point, point_buffer, batch, propagation):
    predictor = make_point()
    draw = FromBuffer(point_buffer(), predictor)
    env = PredictorEnv(predictor, propagation=propagation, initial_states=draw, batch_size=batch)
    check_env_specs(env)
    check_env_specs(TransformedEnv(env, StepCounter(3)))
    td = env.reset()
    assert td.batch_size == batch
    torch.testing.assert_close(td["context"], 1 + td["state"])
    free = PredictorEnv(predictor, propagation=propagation, initial_states=draw)
    td = free.reset(TensorDict({}, batch))
    torch.testing.assert_close(td["context"], 1 + td["state"])
    data = env.rollout(7, break_when_any_done=False)
    assert data.batch_size == (*batch, 7)
    torch.testing.assert_close(
        data["next", "state"] - data["state"], 0.5 * data["action"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
def test_an_instance_that_ends_is_reset_alone(make_point, point_buffer, propagation):
    """It starts over at a stored observation; the others, and their members, go on."""
    predictor = make_point(lambda after: (after > 1.5).float(), n_models=4)
    env = PredictorEnv(
        predictor,
        propagation=propagation,
        initial_states=FromBuffer(point_buffer(), predictor),
        batch_size=[60],
    )
    data = env.rollout(30, lambda td: td.update(env.full_action_spec.rand()), break_when_any_done=0)
    ended = data["next", "done"][:, :-1, 0]
    assert ended.any(0).sum() > 5
    assert not ended.all(0).any()
    going_on = [key for key in data["next"].keys() if key in env.observation_spec.keys()]
    assert ("imagined_member" in going_on) == isinstance(propagation, TSInfinity)
    for key in going_on:
        root, following = data[key][:, 1:], data["next", key][:, :-1]
        assert torch.equal(root[~ended], following[~ended])
    state, context = data["state"][:, 1:][ended], data["context"][:, 1:][ended]
    torch.testing.assert_close(context, 1 + state)
    assert (state < 1).all()
    assert (data["next", "state"][:, :-1][ended] > 1.5).all()  # the true end is kept
    if isinstance(propagation, TSInfinity):
        member = data["imagined_member"]
        new, old = member[:, 1:][ended], member[:, :-1][ended]
        assert 0.5 < (new != old).float().mean() < 0.95  # drawn anew: 3/4 are others


def test_without_starts_nothing_is_reset(make_point):
    env = PredictorEnv(make_point(lambda after: (after > -9).float()), batch_size=[2])
    policy = lambda td: td.set("action", torch.ones(2, 1))  # noqa: E731
    data = env.rollout(4, policy, break_when_any_done=False)
    expected = 0.5 * torch.arange(1, 5).expand(2, 4)
    torch.testing.assert_close(data["next", "state"][..., 0], expected)


def test_a_shaped_reward_starts_over_with_the_episode(make_point, point_buffer):
    predictor = make_point(val_func=lambda state, context, action: state[..., 0])
    env = PredictorEnv(
        predictor,
        initial_states=FromBuffer(point_buffer(), predictor),
        batch_size=[2],
        use_value_func=True,
        discount=0.5,
    )
    env = TransformedEnv(env, StepCounter(2))
    data = env.rollout(6, break_when_any_done=False)
    assert data["imagined_discount"][0, :, 0].tolist() == [1.0, 0.5] * 3


@pytest.mark.parametrize(
    ("starts", "match"),
    [
        (lambda n: torch.zeros(n, 1), "Tensor"),
        (lambda n: TensorDict({"state": torch.zeros(n, 1)}, [n]), "'context'"),
        (lambda n: TensorDict({"state": torch.zeros(2 * n, 1)}, [2 * n]), "batch size"),
        (
            lambda n: TensorDict({"state": torch.zeros(n, 2), "context": torch.zeros(n, 1)}, [n]),
            "state",
        ),
        (
            lambda n: TensorDict(
                {"state": torch.full((n, 1), torch.nan), "context": torch.zeros(n, 1)}, [n]
            ),
            "non-finite",
        ),
    ],
    ids=["no TensorDict", "no context", "batch size", "width", "nan"],
)
def test_starts_that_do_not_fit_are_refused(make_point, starts, match):
    env = PredictorEnv(make_point(), initial_states=starts, batch_size=[3])
    with pytest.raises(ValueError, match=match):
        env.reset()


def test_an_empty_buffer_is_refused(make_point):
    predictor = make_point()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    with pytest.raises(ValueError, match="empty"):
        FromBuffer(buffer, predictor)(3)
    with pytest.raises(TypeError, match="ReplayBuffer"):
        FromBuffer(TensorDict({}, []), predictor)


# -- collected, and learned from ----------------------------------------------------------------


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=name)
@pytest.mark.parametrize("batch", [(), (5,)])
def test_a_collector_gathers_branched_rollouts(make_predictor, make_buffer, propagation, batch):
    encoder = FixedEncoderNet((3,), [0, 1], [2])
    predictor = make_predictor(encoder, context_dim=1)
    real = make_buffer(obs_dim=3)
    env = PredictorEnv(
        predictor,
        propagation=propagation,
        initial_states=FromBuffer(real, predictor),
        batch_size=batch,
    )
    env = TransformedEnv(env, StepCounter(4))
    frames = 10 * max(1, torch.Size(batch).numel())
    collector = Collector(env, frames_per_batch=frames, total_frames=2 * frames)
    data = torch.cat([data.clone() for data in collector], -1)
    collector.shutdown()
    assert data.batch_size == (*batch, 20)
    stored = torch.cat(encoder(real[:]["observation"]), -1)
    first = data["step_count"][..., 0] == 0
    ended = data["next", "done"][..., :-1, 0]
    assert first[..., 0].all()
    assert torch.equal(first[..., 1:], ended)
    assert torch.equal(data["next", "truncated"], data["next", "step_count"] == 4)
    assert data["next", "step_count"].max() == 4
    begun = torch.cat([data["state"], data["context"]], -1)[first]
    assert (begun.unsqueeze(1) == stored).all(-1).any(-1).all()
    for key in ("state", "context"):
        got, expected = data[key][..., 1:, :][~ended], data["next", key][..., :-1, :][~ended]
        assert torch.equal(got, expected)


def test_sac_learns_from_imagined_data(make_point, point_buffer):
    """Collector -> replay buffer -> SACLoss: from where episodes start, the goal is two steps on.

    Going nowhere costs 1 a step; the best is 1 + 0.25, then 0 (the point moves by at most 1/2).
    """
    torch.manual_seed(0)
    predictor = make_point()
    env = PredictorEnv(
        predictor,
        propagation=TSInfinity(),
        initial_states=FromBuffer(point_buffer(), predictor),
        batch_size=[16],
    )
    env = TransformedEnv(env, StepCounter(6))
    hidden = {"depth": 2, "num_cells": 32, "activation_class": nn.ReLU}
    actor = ProbabilisticActor(
        TensorDictSequential(
            TensorDictModule(MLP(2, 2, **hidden), ["state", "context"], ["params"]),
            TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=env.full_action_spec_unbatched["action"],
    )
    critic = ValueOperator(MLP(3, 1, **hidden), in_keys=["state", "context", "action"])
    loss = SACLoss(actor, critic, alpha_init=0.1)
    loss.make_value_estimator(gamma=0.9)
    target = SoftUpdate(loss, tau=0.05)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    imagined = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=128)

    @torch.no_grad()
    def mean_return():
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            data = env.rollout(6, actor, break_when_any_done=False)
        return data["next", "reward"].sum((-2, -1)).mean().item()

    before = mean_return()
    collector = Collector(env, actor, frames_per_batch=16 * 12, total_frames=16 * 12 * 25)
    for data in collector:
        imagined.extend(data.reshape(-1))
        for _ in range(12):
            losses = loss(imagined.sample())
            total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
            assert torch.isfinite(total)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            target.step()
    collector.shutdown()
    after = mean_return()
    assert before < -2.5
    assert after > -2  # the best is -1.25
    assert len(imagined) == 16 * 12 * 25
