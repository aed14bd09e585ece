"""What a predictor answers is the composition of its parts, with tensors and with TensorDicts."""

from __future__ import annotations

import pytest
import torch
from helpers import make_point, make_predictor, unchanged
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import EncoderNet, FixedEncoderNet, IdentityEncoder

OBS, A, BATCH = 4, 2, (2, 3)
ENCODERS = {
    "identity": lambda: IdentityEncoder((OBS,)),
    "fixed": lambda: FixedEncoderNet((OBS,), latent_state_dims=[2, 0], context_dims=[3]),
    "learned": lambda: EncoderNet((OBS,), latent_state_dim=3, context_dim=2),
}


def build(kind="fixed", model=None, **kwargs):
    """A predictor whose heads are random, not the zeros that they start with."""
    encoder = ENCODERS[kind]()
    if kind == "learned":
        encoder.mask[:2] = True
    dims = encoder.latent_state_dim, encoder.context_dim
    model = {"action_space": A, "n_models": 3} | (model or {})
    predictor = make_predictor(encoder, *dims, model=model, **kwargs)
    for head in (predictor.rew_func, predictor.val_func):
        if isinstance(head, nn.Module):
            nn.init.normal_(head.net[-1].weight)
    return predictor


@pytest.fixture(params=ENCODERS)
def predictor(request):
    return build(request.param, model={"n_modes": 2, "n_particles_per_model": 2})


def make_inputs(batch, *steps):
    return torch.randn(*batch, OBS), 2 * torch.rand(*batch, *steps, A) - 1


def call(predictor, name, obs, action):
    """One of the calls that take an observation and an action, or a sequence of two."""
    if name == "forward":
        return predictor(TensorDict({"observation": obs, "action": action}, obs.shape[:-1]))
    if name == "rollout":
        action = torch.stack([action, action], -2)
    return getattr(predictor, name)(obs, action)


CALLS = ["predict", "predict_reward", "rollout", "value", "forward"]


def test_one_step_calls_are_the_composition_of_the_parts(predictor):
    obs, act = make_inputs(BATCH)
    with unchanged(predictor.train()):
        for name in CALLS:
            call(predictor, name, obs, act)

    state, context = predictor.encode(obs)
    mean, weights, std, reward, term_prob = predictor.predict(obs, act)

    torch.testing.assert_close((state, context), predictor.encoder(obs))
    expected = predictor.model.predict(state, context, act)
    torch.testing.assert_close((mean, weights, std, term_prob), expected)
    torch.testing.assert_close(reward, predictor.rew_func(state, context, act))
    torch.testing.assert_close(predictor.predict_reward(obs, act), reward)
    value = predictor.val_func(state, context, act)
    torch.testing.assert_close(predictor.value(obs), value)
    torch.testing.assert_close(predictor.value(obs, act), value)
    d = predictor.latent_state_dim
    assert mean.shape == std.shape == (*BATCH, 3, 2, d)
    assert weights.shape == (*BATCH, 3, 2)
    assert reward.shape == term_prob.shape == value.shape == BATCH


@pytest.mark.parametrize("batch", [(), BATCH])
def test_rollout_equals_a_loop_over_single_predictions(batch):
    """Each particle of each member on its own; with one mode its mean is what ``predict`` says."""
    predictor = build(model={"n_particles_per_model": 2})
    horizon = 4
    obs, act = make_inputs(batch, horizon)

    traj = predictor.rollout(obs, act, deterministic=True)

    assert traj.batch_size == (*batch, 3, 2, horizon)
    state, context = predictor.encode(obs)
    for m in range(3):
        now = state
        for h in range(horizon):
            mean, _, _, _ = predictor.model.predict(now, context, act[..., h, :])
            after = mean[..., m, 0, :]
            reward = predictor.rew_func(now, context, act[..., h, :]).unsqueeze(-1)
            for p in range(2):
                step = traj[..., m, p, h]
                torch.testing.assert_close(step["state"], now, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(step["context"], context)
                torch.testing.assert_close(step["action"], act[..., h, :])
                torch.testing.assert_close(step["next", "state"], after, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(step["next", "reward"], reward, rtol=1e-4, atol=1e-5)
            now = after


@pytest.mark.parametrize("call", ["forward", "step", "step_module", "sequential"])
def test_tensordicts_get_what_tensors_get(predictor, call):
    obs, act = make_inputs(BATCH)
    td = TensorDict({"observation": obs, "action": act}, BATCH)

    if call == "forward":
        assert predictor(td) is td
    elif call == "sequential":
        TensorDictSequential(predictor.encoder, predictor.step_module)(td)
    else:
        assert predictor.encode(td) is td
        assert getattr(predictor, call)(td) is td

    state, context = predictor.encode(obs)
    mean, weights, std, reward, term_prob = predictor.predict(obs, act)
    following = td["next"]
    torch.testing.assert_close(td["state"], state)
    torch.testing.assert_close(td["context"], context)
    torch.testing.assert_close(following["loc"], mean)
    torch.testing.assert_close(following["weights"], weights)
    torch.testing.assert_close(following["scale"], std)
    torch.testing.assert_close(following["term_prob"], term_prob.unsqueeze(-1))
    torch.testing.assert_close(following["reward"], reward.unsqueeze(-1))
    torch.testing.assert_close(following["context"], context)
    expected = sum(
        weights[..., m, k, None] * mean[..., m, k, :] / 3 for m in range(3) for k in range(2)
    )
    torch.testing.assert_close(following["state"], expected)
    for key in ("terminated", "done"):
        assert torch.equal(following[key], (term_prob > 0.5).unsqueeze(-1))
    assert torch.equal(td["observation"], obs)
    assert torch.equal(td["action"], act)
    assert set(predictor.out_keys) == set(td.keys(True, True)) - {"observation", "action"}
    assert predictor.in_keys == ["observation", "action"]


def test_observations_are_decoded_from_either_form():
    predictor = make_predictor(IdentityEncoder({"b": (2,), "a": (1,)}), 3)
    td = TensorDict({"state": torch.randn(*BATCH, 3)}, BATCH)
    whole = predictor.decode(td.clone())
    assert torch.equal(whole["b"], td["state"][..., :2])
    assert torch.equal(whole["a"], td["state"][..., 2:])
    assert torch.equal(predictor.decode(td["state"]), td["state"])


def test_a_context_that_is_left_out_is_not_made_up():
    encoder = FixedEncoderNet((3,), latent_state_dims=[2, 0], context_dims=[1])
    predictor = make_predictor(encoder, 2, 1)
    obs = torch.randn(*BATCH, 3)
    td = predictor.encode(TensorDict({"observation": obs}, BATCH)).exclude("observation")
    assert torch.equal(predictor.decode(td.clone())["observation"], obs)
    assert torch.equal(predictor.decode(td["state"], td["context"]), obs)
    for given in (td.exclude("context"), td["state"]):
        with pytest.raises(ValueError, match=r"context.*shape"):
            predictor.decode(given)


def test_termination_is_a_probability_above_one_half():
    predictor = make_point(term_prob=lambda after: after.clamp(0, 1))
    obs = torch.tensor([[0.4, 0.0], [0.5, 0.0], [0.6, 0.0]])
    td = predictor(TensorDict({"observation": obs, "action": torch.zeros(3, 1)}, [3]))
    torch.testing.assert_close(td["next", "term_prob"].squeeze(-1), obs[:, 0])
    assert td["next", "terminated"].squeeze(-1).tolist() == [False, False, True]
    assert torch.equal(td["next", "done"], td["next", "terminated"])


def test_steps_chain_as_a_world_model_does():
    """What ``step`` writes below "next" is all that the next step needs."""
    predictor = build(model={"n_models": 1})
    obs, act = make_inputs((3,), 4)
    td, states = predictor.encode(TensorDict({"observation": obs}, [3])), []
    for h in range(4):
        td = predictor.step_module(td.set("action", act[:, h]))["next"]
        states.append(td["state"])
    traj = predictor.rollout(obs, act, deterministic=True)
    torch.testing.assert_close(torch.stack(states, 1), traj["next", "state"][:, 0, 0])


def test_step_module_shares_the_parameters_and_adds_none(predictor):
    module = predictor.step_module
    assert isinstance(module, TensorDictModuleBase)
    assert {id(p) for p in module.parameters()} == {id(p) for p in predictor.parameters()}
    names = [name for name, _ in predictor.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in predictor.parameters()})


@pytest.mark.parametrize("space", [Categorical(3), OneHot(3)], ids=["integer", "one-hot"])
def test_discrete_actions_predict_the_same_in_either_form(space):
    predictor = build(model={"action_space": space})
    obs, index = torch.randn(5, OBS), torch.tensor([0, 1, 2, 0, 1])
    one_hot = nn.functional.one_hot(index, 3)
    expected = predictor.predict(obs, index)
    for act in (index.unsqueeze(-1), one_hot, one_hot.bool()):
        torch.testing.assert_close(predictor.predict(obs, act), expected)
        torch.testing.assert_close(predictor.predict_reward(obs, act), expected[3])
    assert not torch.allclose(expected[3], predictor.predict_reward(obs, (index + 1) % 3))
    plan = torch.stack([index, index.flip(0)], -1)
    traj, same = (
        predictor.rollout(obs, x, deterministic=True)
        for x in (plan, nn.functional.one_hot(plan, 3))
    )
    assert (traj == same).all()


@pytest.mark.parametrize("part", ["reward", "value", "value that plans end with"])
def test_compiling_reaches_reward_and_value(part):
    seen = []

    def noting(graph, _):
        seen.append(graph)
        return graph

    predictor = build(model={"n_models": 1})
    predictor.compile(backend=noting)
    assert predictor.model_loss.is_compiled
    assert predictor.predictor_loss.is_compiled
    assert predictor.updates.graphs is None  # those are asked for by cudagraphs=True
    obs, act = make_inputs((3,))
    state, context = predictor.encode(obs)
    with torch.no_grad():
        if part == "reward":
            predictor.predict_reward(obs, act)
        elif part == "value":
            predictor.value(obs)
        else:
            predictor.terminal_value(state, context, None)
    assert len(seen) == 1


# -- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_actions_that_do_not_fit_are_refused(predictor, name):
    obs, act = make_inputs((3,))
    for action, message in (
        (act + 5.0, "outside"),
        (act * float("nan"), r"outside|NaN"),
        (act[..., :1], r"action.*shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call(predictor, name, obs, action)


@pytest.mark.parametrize("name", CALLS)
def test_a_reward_or_value_of_another_shape_is_refused(name):
    part = "val_func" if name == "value" else "rew_func"
    predictor = build(**{part: lambda state, context, action: state[..., :1]})
    with pytest.raises(ValueError, match=rf"^{part} gave shape \(3.*1\), expected \(3"):
        call(predictor, name, *make_inputs((3,)))


def test_parts_that_were_left_out_are_named():
    predictor = build(val_func=None, rew_func=None)
    obs, act = make_inputs((3,))
    with pytest.raises(ValueError, match="val_func=None"):
        predictor.value(obs)
    with pytest.raises(ValueError, match="rew_func=None"):
        predictor.predict_reward(obs, act)
    assert ("next", "reward") not in call(predictor, "rollout", obs, act).keys(True)


@pytest.mark.parametrize(
    ("parts", "error", "match"),
    [
        ({"encoder": IdentityEncoder((3,))}, ValueError, "latent_state_dim.*encoder.*model"),
        ({"latent_state_dim": 5}, ValueError, "latent_state_dim.*encoder.*model"),
        ({"model": {"state_dim": 3}}, ValueError, "latent_state_dim.*encoder.*model"),
        (
            {"context_dim": 2, "model": {"context_dim": 0}},
            ValueError,
            "context_dim.*encoder.*model",
        ),
        (
            {"encoder": FixedEncoderNet((4,), [0, 1], [3])},
            ValueError,
            "context_dim.*encoder.*model",
        ),
        ({"val_func": 3.0}, TypeError, "val_func"),
        ({"rew_func": 3.0}, TypeError, "rew_func"),
        ({"encoder": 3.0}, TypeError, "encoder"),
        ({"encoder": IdentityEncoder((2,), out_keys=["latent", "context"])}, ValueError, "latent"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, error, match):
    with pytest.raises(error, match=match):
        make_predictor(**parts)
