"""predict, forward and the statistics around them, against the members called row by row."""

from __future__ import annotations

import itertools
import warnings

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.data import Categorical, OneHot
from torchrl.envs import GymEnv

from layeredrl_torchrl import IdentityEncoder, Model, ProbabilisticEnsemble

BATCHES = [(), (1,), (3,), (2, 2)]
OPTIONS = ("predict_delta", "normalize_inputs", "normalize_targets")


def inputs(batch, d=3, c=2, a=2, *, discrete=0, seed=7):
    generator = torch.Generator().manual_seed(seed)
    state, context = (2 * torch.randn(*batch, n, generator=generator) + 1 for n in (d, c))
    if discrete:
        return state, context, torch.randint(discrete, batch, generator=generator)
    return state, context, torch.randn(*batch, a, generator=generator)


def close(got, expected):
    """Float32 predictions of states of size 10 or so, against Python floats."""
    torch.testing.assert_close(got, torch.tensor(expected).to(got), atol=2e-4, rtol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["fc", "tanh"]),
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 3),
    d=st.integers(1, 3),
    c=st.integers(0, 2),
    discrete=st.sampled_from([False, False, True]),
    fitted=st.sampled_from([True, True, False]),
    flags=st.tuples(st.booleans(), st.sampled_from([True, True, False]), st.booleans()),
    clip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_predict_equals_each_member_row_by_row(
    kind, batch, n_models, n_modes, d, c, discrete, fitted, flags, clip, seed,
    fc, tanh_net, recorded, transitions, slow_predict,
):  # fmt: skip
    torch.manual_seed(seed)
    options = dict(zip(OPTIONS, flags, strict=True))
    options["clip_inputs"] = clip and options["normalize_inputs"]
    ensemble, nets = recorded(
        fc if kind == "fc" else tanh_net,
        d,
        c,
        n_models=n_models,
        n_modes=n_modes,
        action_space=gym.spaces.Discrete(4) if discrete else None,
        **options,
    )
    sample = transitions(d=d, c=c, discrete=4 if discrete else 0, seed=seed) if fitted else None
    if fitted:
        ensemble.fit_statistics(*sample)
    state, context, action = inputs(batch, d, c, discrete=4 if discrete else 0, seed=seed)
    mean, weights, std, term_prob = ensemble.predict(state, context, action)

    assert mean.shape == std.shape == (*batch, n_models, n_modes, d)
    assert weights.shape == (*batch, n_models, n_modes)
    assert term_prob.shape == batch
    for index in itertools.product(*map(range, batch)):
        terms = []
        for m, net in enumerate(nets):
            one = slow_predict(net, state[index], context[index], action[index], sample, **options)
            close(mean[index][m], one[0])
            close(std[index][m], one[1])
            close(weights[index][m], one[2])
            terms.append(one[3])
        close(term_prob[index], sum(terms) / n_models)


# -- options -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_has_an_effect(option, fc, recorded, transitions):
    sample, given = transitions(), inputs((4,))
    predictions = []
    for value in (True, False):
        torch.manual_seed(3)
        ensemble, _ = recorded(fc, **{option: value})
        ensemble.fit_statistics(*sample)
        predictions.append(ensemble.predict(*given)[0])
    assert ((predictions[0] - predictions[1]).abs() > 1e-3).float().mean() > 0.9


class Echo(nn.Module):
    """Predicts what it is given: shows what reaches the networks."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, *given):
        mean = given[self.which].unsqueeze(-2)
        ones = torch.ones_like(given[0][..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["state", "context", "action"])
def test_what_reaches_the_networks(which, normalize, box, transitions):
    ensemble = ProbabilisticEnsemble(
        box(2),
        box(2),
        box(2),
        lambda *_: Echo(which),
        n_models=2,
        predict_delta=False,
        normalize_targets=False,
        normalize_inputs=normalize,
        clip_inputs=False,
    )
    sample = transitions(200, d=2)
    ensemble.fit_statistics(*sample)
    mean, _, _, _ = ensemble.predict(*sample[:3])
    seen = mean[:, 0, 0]
    if not normalize:
        assert torch.equal(seen, sample[which])
        return
    assert seen.mean(0).abs().max() < 1e-4
    assert (seen.var(0, correction=0) - 1).abs().max() < 1e-3
    # still the same data: an increasing affine map of each column
    gain = (seen[1:] - seen[:1]) / (sample[which][1:] - sample[which][:1])
    assert (gain > 0).all()
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), atol=0, rtol=1e-2)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["state", "context", "action"])
def test_inputs_far_from_the_data_are_clipped(which, clip, box, transitions):
    options = {"predict_delta": False, "normalize_targets": False, "clip_inputs": clip}
    ensemble = ProbabilisticEnsemble(box(2), box(2), box(2), lambda *_: Echo(which), **options)
    sample = transitions(200, d=2)
    ensemble.fit_statistics(*sample)
    # two data points, and two 100 standard deviations away on either side
    given = [x[:4] + 100 * x.std(0) * torch.tensor([[0.0], [1.0], [-1.0], [0.0]]) for x in sample]
    seen = ensemble.predict(*given[:3])[0][:, 0, 0]
    column = sample[which]
    loc, scale = column.mean(0), column.std(0, correction=0)
    low, high = column.min(0).values, column.max(0).values
    expected = given[which]
    if clip:
        margin = (high - low) / 10
        assert ((expected < low - margin) | (expected > high + margin)).sum() == 4
        expected = torch.minimum(torch.maximum(expected, low - margin), high + margin)
    torch.testing.assert_close(seen, (expected - loc) / scale, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_what_the_networks_say_is_brought_back_to_the_state(
    delta, normalize, table_net, tables, transitions
):
    net = table_net([[0.5, -2.0], [1.5, 0.0]], [[0.1, 0.2], [0.3, 0.4]], [0.25, 0.75])
    options = {"predict_delta": delta, "normalize_targets": normalize}
    ensemble = tables([net, net], c=2, a=2, **options)
    sample = transitions(50, d=2)
    ensemble.fit_statistics(*sample)
    state, context, action = inputs((3,), d=2)
    mean, weights, std, _ = ensemble.predict(state, context, action)
    target = sample[3] - sample[0] if delta else sample[3]
    loc, scale = torch.zeros(2), torch.ones(2)
    if normalize:
        loc = sum(target) / 50
        scale = (sum((target - loc) ** 2) / 50).sqrt()
    expected = loc + scale * torch.tensor([[0.5, -2.0], [1.5, 0.0]])
    expected = expected + state[:, None] * delta
    for m in range(2):
        torch.testing.assert_close(mean[:, m], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            std[:, m], (scale * net.std).expand(3, 2, 2), atol=1e-5, rtol=1e-4
        )
    assert torch.equal(weights, net.weights.expand(3, 2, 2))


@pytest.mark.parametrize("delta", [True, False])
def test_target_is_what_the_networks_should_have_said(delta, table_net, tables, transitions):
    ensemble = tables([table_net([[0.0, 0.0]], 1.0)], c=2, a=2, predict_delta=delta)
    state, context, action, next_state = transitions(40, d=2)
    ensemble.fit_statistics(state, context, action, next_state)
    target = ensemble.target(state, next_state)
    assert target.mean(0).abs().max() < 1e-4
    assert (target.var(0, correction=0) - 1).abs().max() < 1e-3
    # a member that says exactly this predicts the true next state
    right = tables([table_net(target[4:5], 1.0)], c=2, a=2, predict_delta=delta)
    right.fit_statistics(state, context, action, next_state)
    mean, _, _, _ = right.predict(state[4], context[4], action[4])
    torch.testing.assert_close(mean[0, 0], next_state[4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize("targets_too", [True, False])
def test_fit_statistics_sets_what_its_options_name(
    inputs_too, targets_too, fc, recorded, transitions
):
    ensemble, _ = recorded(fc, normalize_inputs=inputs_too, normalize_targets=targets_too)
    ensemble.fit_statistics(*transitions())
    for name, fitted in (
        ("state", inputs_too),
        ("context", inputs_too),
        ("action", inputs_too),
        ("target", targets_too),
    ):
        normalizer = getattr(ensemble.scaling, name)
        assert (normalizer.scale != 1).all().item() is fitted
        assert (normalizer.loc != 0).all().item() is fitted


def test_statistics_of_a_model_without_context(fc, recorded, transitions):
    ensemble, _ = recorded(fc, c=0)
    state, context, action, next_state = transitions(c=0)
    ensemble.fit_statistics(state, context, action, next_state)
    assert (ensemble.scaling.state.scale != 1).all()


# -- context and actions -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ignored", "used", "somebody's own"])
def test_the_context_counts_only_where_it_is_not_ignored(kind, fc, tanh_net, recorded):
    def ignoring(*spaces):
        return fc(*spaces, ignore_context=True)

    net = {"ignored": ignoring, "used": fc, "somebody's own": tanh_net}[kind]
    ensemble, _ = recorded(net)
    state, context, action = inputs((4,))
    one, two = (ensemble.predict(state, x, action)[0] for x in (context, context + 1))
    assert torch.equal(one, two) is (kind == "ignored")


@pytest.mark.parametrize("batch", BATCHES)
def test_discrete_actions_of_every_kind_and_form_predict_the_same(batch, fc, recorded):
    state, context, index = inputs(batch, discrete=4)
    rows = torch.eye(4)[index]
    forms = [index, index.int(), index.unsqueeze(-1), rows, rows.bool(), rows.long()]
    # the reference is fed the one-hot floats as continuous actions
    torch.manual_seed(5)
    reference, _ = recorded(fc, a=4)
    expected = reference.predict(state, context, rows)
    assert torch.unique(expected[0][..., 0, 0, 0]).numel() == index.numel()
    for space in (gym.spaces.Discrete(4), Categorical(4), OneHot(4)):
        torch.manual_seed(5)
        ensemble, _ = recorded(fc, action_space=space)
        for action in forms:
            for x, y in zip(ensemble.predict(state, context, action), expected, strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_the_choice_makes_a_difference(fc, recorded):
    ensemble, _ = recorded(fc, action_space=gym.spaces.Discrete(3))
    state, context, _ = inputs(())
    means = [ensemble.predict(state, context, torch.tensor(i))[0] for i in range(3)]
    assert not torch.allclose(means[0], means[1])
    assert not torch.allclose(means[1], means[2])


def test_spaces_of_real_environments(fc):
    for name in ("InvertedPendulum-v5", "CartPole-v1"):
        env = GymEnv(name)
        ensemble = ProbabilisticEnsemble(
            env.observation_spec["observation"], None, env.action_spec, fc, n_models=2
        )
        td = env.rollout(4)
        state = td["observation"].float()
        mean, _, _, _ = ensemble.predict(state, None, td["action"])
        assert mean.shape == (*td.batch_size, 2, 1, 4)
        dist = ensemble.dist(TensorDict({"state": state, "action": td["action"]}, td.batch_size))
        assert torch.isfinite(dist.log_prob(td["next", "observation"].float())).all()


# -- TensorDicts ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_called_with_a_tensordict_it_writes_the_prediction(batch, fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, action = inputs(batch)
    td = TensorDict({"state": state, "context": context, "action": action}, batch_size=batch)
    out = ensemble(td)
    assert out is td
    mean, weights, std, term_prob = ensemble.predict(state, context, action)
    assert torch.equal(td["next", "loc"], mean)
    assert torch.equal(td["next", "weights"], weights)
    assert torch.equal(td["next", "scale"], std)
    assert td["next", "term_prob"].shape == (*batch, 1)
    assert torch.equal(td["next", "term_prob"].squeeze(-1), term_prob)
    assert td["next"].batch_size == torch.Size(batch)
    expected = torch.zeros(*batch, 3)
    for m in range(3):
        for k in range(2):
            expected += weights[..., m, k, None] * mean[..., m, k, :] / 3
    torch.testing.assert_close(td["next", "state"], expected)
    assert torch.equal(td["state"], state)


def test_a_missing_context_counts_as_empty(fc, recorded):
    ensemble, _ = recorded(fc, c=0)
    state, _, action = inputs((4,))
    td = ensemble(TensorDict({"state": state, "action": action}, batch_size=(4,)))
    with_empty = ensemble.predict(state, torch.zeros(4, 0), action)
    assert torch.equal(td["next", "loc"], with_empty[0])
    assert torch.equal(ensemble.predict(state, None, action)[0], with_empty[0])


def test_it_is_a_part_of_a_tensordict_pipeline(fc, recorded):
    ensemble, _ = recorded(fc, c=0)
    chain = TensorDictSequential(IdentityEncoder((3,)), ensemble)
    assert set(chain.in_keys) == {"observation", "action"}
    state, _, action = inputs((4,))
    td = chain(TensorDict({"observation": state, "action": action}, batch_size=(4,)))
    assert torch.equal(td["next", "loc"], ensemble.predict(state, None, action)[0])


# -- rule 1: pure calls --------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_no_call_changes_the_model_or_its_inputs(
    kind, training, fc, tanh_net, recorded, transitions, unchanged
):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, n_particles_per_model=2)
    ensemble.fit_statistics(*transitions())
    ensemble.train(training)
    state, context, action = inputs((4,))
    actions = action.unsqueeze(1).repeat(1, 3, 1)
    given = TensorDict({"state": state, "context": context, "action": action}, batch_size=(4,))
    copies = given.clone(), actions.clone()
    with unchanged(ensemble):
        ensemble.predict(state, context, action)
        ensemble(given.clone())
        ensemble.dist(given).sample()
        ensemble.get_log_prob(state, context, action, state, std=0.5)
        ensemble.target(state, state + 1)
        for deterministic in (True, False):
            ensemble.uncertainty(ensemble.rollout(state, context, actions, deterministic))
    assert ensemble.training is training
    assert set(given.keys()) == {"state", "context", "action"}
    assert (given == copies[0]).all()
    assert torch.equal(actions, copies[1])


# -- precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_a_float64_ensemble_computes_in_float64(kind, fc, tanh_net, recorded, transitions):
    ensemble, nets = recorded(fc if kind == "fc" else tanh_net, n_models=2)
    ensemble.double()
    ensemble.fit_statistics(*(x.double() for x in transitions()))
    given = [x.double() for x in inputs((4,))]
    mean, _, std, _ = ensemble.predict(*given)
    assert mean.dtype == std.dtype == torch.float64
    x, y, z = (
        normalizer(value)
        for normalizer, value in zip(
            (ensemble.scaling.state, ensemble.scaling.context, ensemble.scaling.action),
            given,
            strict=True,
        )
    )
    loc, scale = ensemble.scaling.target.loc, ensemble.scaling.target.scale
    for m, net in enumerate(nets):
        (one, one_std), _, _ = net.double()(x, y, z)
        expected = given[0].unsqueeze(-2) + one * scale + loc
        torch.testing.assert_close(mean[:, m], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(std[:, m], one_std * scale, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["fc", "tanh"])
@pytest.mark.usefixtures("bf16_units")
def test_autocast_runs_the_products_in_bfloat16_and_keeps_states_in_float32(
    kind, fc, tanh_net, recorded, transitions
):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net)
    ensemble.fit_statistics(*transitions())
    given = transitions(seed=4)[:3]
    full = ensemble.predict(*given)
    with torch.autocast("cpu", torch.bfloat16):
        half = ensemble.predict(*given)
    assert half[0].dtype == torch.float32
    assert not torch.equal(half[0], full[0])
    scale = ensemble.scaling.target.scale
    assert ((half[0] - full[0]).abs() < 0.1 * scale).all()


@pytest.mark.usefixtures("no_bf16_units")
def test_autocast_changes_nothing_where_bfloat16_is_slower(fc, recorded, transitions):
    ensemble, _ = recorded(fc)
    given = transitions(seed=4)[:3]
    full = ensemble.predict(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ensemble.predict(*given)[0], full[0])


# -- gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_gradients_of_the_inputs_agree_with_finite_differences(
    kind, fc, tanh_net, recorded, transitions
):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, n_models=2)
    ensemble.double().fit_statistics(*(x.double() for x in transitions()))
    given = tuple(x.double().requires_grad_() for x in inputs((2,)))
    assert torch.autograd.gradcheck(ensemble.predict, given)


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_each_member_trains_its_own_parameters_only(kind, fc, tanh_net, recorded):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net)
    mean, weights, std, _ = ensemble.predict(*inputs((5,)))
    out = (mean + std + weights.unsqueeze(-1).square())[:, 1].sum()
    parameters = list(ensemble.members.parameters())
    grads = torch.autograd.grad(out, parameters)
    assert parameters
    for grad in grads:  # parameters are [M, ...]
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).any()
        assert (grad[2] == 0).all()


def test_the_termination_trains_every_member(fc, recorded):
    ensemble, _ = recorded(fc)
    _, _, _, term_prob = ensemble.predict(*inputs((5,)))
    grads = torch.autograd.grad(term_prob.sum(), list(ensemble.members.parameters()))
    for grad in grads:
        assert all((grad[m] != 0).any() for m in range(3))


# -- somebody's own model ------------------------------------------------------------------


class Pendulum(Model):
    """A hand-written model: one member, one mode, no noise."""

    def predict_members(self, state, context, action):
        angle, velocity = state.unbind(-1)
        velocity = velocity + 0.1 * (torch.sin(angle) + action.squeeze(-1))
        mean = torch.stack((angle + 0.1 * velocity, velocity), -1).unsqueeze(-2)
        ended = (angle.abs() > 1).to(state.dtype)
        return (mean, torch.zeros_like(mean)), torch.ones_like(angle).unsqueeze(-1), ended


def test_a_hand_written_model_needs_only_predict_members(box):
    model = Pendulum(box(2), None, box(1))
    mean, weights, std, term_prob = model.predict(
        torch.tensor([[0.5, 1.0], [2.0, 0.0]]), None, torch.tensor([[1.0], [0.0]])
    )
    velocity = [1.0 + 0.1 * (0.479425539 + 1.0), 0.1 * 0.909297427]
    expected = [[0.5 + 0.1 * velocity[0], velocity[0]], [2 + 0.1 * velocity[1], velocity[1]]]
    close(mean[:, 0, 0], expected)
    assert weights.tolist() == [[[1]], [[1]]]
    assert std.abs().max() == 0
    assert term_prob.tolist() == [0, 1]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_broken_reading_is_named(offset, fc, recorded, transitions):
    state, context, action, next_state = transitions(n=2000)
    ensemble, _ = recorded(fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit_statistics(offset + state, context, action, offset + next_state)
    state[7, 1] = 1e6
    with pytest.warns(UserWarning, match=r"state: a few of 2000 rows .* dimension\(s\) \[1\]"):
        ensemble.fit_statistics(offset + state, context, action, offset + next_state)
