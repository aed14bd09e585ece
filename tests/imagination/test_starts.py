"""Imagined episodes that start at stored observations: resets, collectors, and SAC on top."""

from __future__ import annotations

import pytest
import torch
from helpers import known
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import EncoderNet, FromBuffer, PredictorEnv, TSInfinity


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


def test_no_episode_starts_at_padding(make_point, make_transitions):
    """``[trajectory, time]`` as TorchRL pads it."""
    data = make_transitions(n_steps=12).reshape(3, 4)
    data["collector", "mask"] = mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    data["observation"][~mask] = 99.0
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100, ndim=2))
    buffer.extend(data)
    starts = FromBuffer(buffer, make_point())(500)["state"].flatten()
    assert set(starts.tolist()) == set(data["observation"][mask][:, 0].tolist())


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


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_specs_hold_and_a_reset_starts_at_a_stored_observation(
    make_point, point_buffer, batch, propagation
):
    predictor = make_point(val_func=lambda state, context, action: state[..., 0])
    options = {"propagation": propagation, "use_value_func": True, "discount": 0.5}
    options["initial_states"] = FromBuffer(point_buffer(), predictor)
    env = PredictorEnv(predictor, batch_size=batch, **options)
    check_env_specs(env)
    limited = TransformedEnv(env, StepCounter(2))
    check_env_specs(limited)
    free = PredictorEnv(predictor, **options)
    for td in (env.reset(), free.reset(TensorDict({}, batch))):
        assert td.batch_size == batch
        torch.testing.assert_close(td["context"], 1 + td["state"])
    data = limited.rollout(6, break_when_any_done=False)
    assert data.batch_size == (*batch, 6)
    moved = data["next", "state"] - data["state"]
    torch.testing.assert_close(moved, 0.5 * data["action"], atol=1e-5, rtol=0)
    # what is left of the value starts over with the episode
    discount = data["imagined_discount"].squeeze(-1)
    assert torch.equal(discount, torch.tensor([1.0, 0.5] * 3).expand(*batch, 6))


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


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_state_alone_is_a_start_where_there_is_no_context(batch):
    actions = Bounded(-1.0, 1.0, (1,))
    predictor = known(lambda state, action: state, lambda *step: step[0][..., 0], actions, 2)
    env = PredictorEnv(predictor, batch_size=batch)
    state = torch.randn(*batch, 2)
    assert torch.equal(env.reset(TensorDict({"state": state}, batch))["state"], state)


@pytest.mark.parametrize(("given", "missing"), [("state", "context"), ("context", "state")])
def test_a_state_without_its_context_is_no_start(make_point, given, missing):
    env = PredictorEnv(make_point(), batch_size=[3], initial_states=lambda n: zeros(n, state=1))
    with pytest.raises(KeyError, match=rf"given \['{given}'\] without '{missing}'"):
        env.rollout(2, tensordict=zeros(3, **{given: 1}))


def test_a_start_that_float32_rounds_off_is_refused(make_point):
    far = TensorDict({"state": 1e9 + torch.rand(20, 1, dtype=torch.float64)}, [20])
    far["context"] = torch.zeros(20, 1)
    told = "of initial 'state' vary by less than torch.float32"
    with pytest.raises(ValueError, match=told):
        PredictorEnv(make_point(), batch_size=[20]).reset(far)
    with pytest.raises(ValueError, match=told):
        PredictorEnv(make_point(), batch_size=[20], initial_states=lambda n: far).reset()


def zeros(n, **widths):
    return TensorDict({key: torch.zeros(n, width) for key, width in widths.items()}, [n])


@pytest.mark.parametrize(
    ("starts", "match"),
    [
        (lambda n: torch.zeros(n, 1), "Tensor"),
        (lambda n: zeros(n, state=1), "'context'"),
        (lambda n: zeros(2 * n, state=1, context=1), "batch size"),
        (lambda n: zeros(n, state=2, context=1), "state"),
        (lambda n: zeros(n, state=1, context=1).apply(lambda x: x + torch.nan), "non-finite"),
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
