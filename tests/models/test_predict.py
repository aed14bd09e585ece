"""predict, forward and the statistics around them, against the members called row by row."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Categorical, OneHot

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
    kind=st.sampled_from(["fc", "fc without context", "tanh"]),
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
        tanh_net if kind == "tanh" else partial(fc, ignore_context=kind != "fc"),
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


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("space", [gym.spaces.Discrete(4), Categorical(4), OneHot(4)])
def test_discrete_actions_of_every_kind_and_form_predict_the_same(space, batch, fc, recorded):
    """The reference is fed the one-hot floats as continuous actions."""
    state, context, index = inputs(batch, discrete=4)
    rows = torch.eye(4)[index]
    torch.manual_seed(5)
    reference, _ = recorded(fc, a=4)
    torch.manual_seed(5)
    ensemble, _ = recorded(fc, action_space=space)
    expected = reference.predict(state, context, rows)
    followed = reference.rollout(state, context, rows.unsqueeze(-2), deterministic=True)
    for action in (index, index.int(), index.unsqueeze(-1), rows, rows.bool(), rows.long()):
        for x, y in zip(ensemble.predict(state, context, action), expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        plan = action.unsqueeze(len(batch))
        traj = ensemble.rollout(state, context, plan, deterministic=True)
        for key in ("state", "term_prob"):
            torch.testing.assert_close(traj["next", key], followed["next", key])
        # the actions come back as the spec has them
        choice = rows.bool() if isinstance(space, OneHot) else index
        assert traj["action"].dtype == ensemble.action_spec.dtype
        assert torch.equal(traj[..., 0, 0, 0]["action"], choice)


# -- TensorDicts ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_called_with_a_tensordict_it_writes_the_prediction(batch, fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, action = inputs(batch)
    td = TensorDict({"state": state, "context": context, "action": action}, batch_size=batch)
    assert ensemble(td) is td
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


def test_a_missing_context_counts_as_empty(fc, recorded):
    ensemble, _ = recorded(fc, c=0)
    state, _, action = inputs((4,))
    td = ensemble(TensorDict({"state": state, "action": action}, batch_size=(4,)))
    with_empty = ensemble.predict(state, torch.zeros(4, 0), action)
    assert torch.equal(td["next", "loc"], with_empty[0])
    assert torch.equal(ensemble.predict(state, None, action)[0], with_empty[0])


# -- rule 1: pure calls --------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_no_call_changes_the_model_or_its_inputs(training, net, recorded, transitions, unchanged):
    ensemble, _ = recorded(net, n_particles_per_model=2)
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


@pytest.mark.usefixtures("bf16_units")
def test_autocast_runs_the_products_in_bfloat16_and_keeps_states_in_float32(
    net, recorded, transitions
):
    ensemble, _ = recorded(net)
    ensemble.fit_statistics(*transitions())
    given = transitions(seed=4)[:3]
    full = ensemble.predict(*given)
    with torch.autocast("cpu", torch.bfloat16):
        half = ensemble.predict(*given)
    assert half[0].dtype == torch.float32
    assert not torch.equal(half[0], full[0])
    scale = ensemble.scaling.target.scale
    assert ((half[0] - full[0]).abs() < 0.1 * scale).all()
    state, context, action = given
    full = ensemble.rollout(state, context, action.unsqueeze(1), True)["next", "state"]
    with torch.autocast("cpu", torch.bfloat16):
        half = ensemble.rollout(state, context, action.unsqueeze(1), True)["next", "state"]
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert ((half - full).abs() < 0.1 * scale).all()


@pytest.mark.usefixtures("no_bf16_units")
def test_autocast_changes_nothing_where_bfloat16_is_slower(fc, recorded, transitions):
    ensemble, _ = recorded(fc)
    given = transitions(seed=4)[:3]
    full = ensemble.predict(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ensemble.predict(*given)[0], full[0])


@pytest.mark.parametrize(
    ("offset", "spread", "change", "named"),
    [
        (0.0, 1.0, 0.01, False),
        (1e4, 1.0, 0.01, False),
        (2e6, 1.0, 0.01, True),
        (2e6, 1.0, 100.0, True),  # of the state before
        (2e6, 100.0, 0.2, True),  # of the change alone
        (2e6, 100.0, 100.0, False),
        (2e6, 100.0, 0.0, False),
        (2e6, 0.0, 0.0, False),
        (1e-3, 1e-10, 1e-10, False),  # near 0 digits are not what is missing
    ],
)
def test_observations_that_rounding_buries_are_named(offset, spread, change, named, fc, recorded):
    """The second dimension lies far from 0, beside its spread or its changes."""
    ensemble, _ = recorded(fc)
    state, after = torch.randn(500, 3), torch.randn(500, 3)
    state[:, 1] = offset + spread * state[:, 1]
    after[:, 1] = state[:, 1] + change * after[:, 1]
    context, action = torch.randn(500, 2), torch.randn(500, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ensemble.fit_statistics(state, context, action, after)
    # Neighbouring numbers are 0.001 apart at 1e4, and 0.125 at 2e6.
    assert ["dimension(s) [1] of the state" in str(w.message) for w in told] == [True] * named


# -- gradients -----------------------------------------------------------------------------


def test_gradients_of_the_inputs_agree_with_finite_differences(net, recorded, transitions):
    ensemble, _ = recorded(net, n_models=2)
    ensemble.double().fit_statistics(*(x.double() for x in transitions()))
    given = tuple(x.double().requires_grad_() for x in inputs((2,)))
    assert torch.autograd.gradcheck(ensemble.predict, given)


def test_gradients_do_not_change_the_std_within_and_beyond_the_data(net, recorded, transitions):
    """Nor are they anything but numbers: the distance from the data is 0 within."""
    ensemble, _ = recorded(net, clip_inputs=True)
    ensemble.fit_statistics(*transitions())
    context, action = (x.mean(0).expand(5, -1) for x in transitions()[1:3])
    center, spread = ensemble.scaling.state.loc, ensemble.scaling.state.scale
    steps = torch.tensor([0.0, 3.0, 3.3, 4.0, 50.0]).unsqueeze(-1)  # up to a std beyond, and more
    state = center + steps * spread * torch.tensor([1.0, 0.0, 0.0])
    expected = ensemble.predict(state, context, action)[2]
    found = ensemble.predict(state.requires_grad_(), context, action)[2]
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.sum(), state)
    assert slope.isfinite().all()
    assert len(found[:, 0, 0, 1].round(decimals=3).unique()) > 3


def test_each_member_trains_its_own_parameters_only_and_the_termination_all(net, recorded):
    ensemble, _ = recorded(net)
    mean, weights, std, term_prob = ensemble.predict(*inputs((5,)))
    parameters = list(ensemble.members.parameters())  # [M, ...]
    out = (mean + std + weights.unsqueeze(-1).square())[:, 1].sum()
    for grad in torch.autograd.grad(out, parameters, retain_graph=True):
        assert [(grad[m] != 0).any().item() for m in range(3)] == [False, True, False]
    for grad in torch.autograd.grad(term_prob.sum(), parameters):
        assert all((grad[m] != 0).any() for m in range(3))


# -- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_broken", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_broken_reading_is_named(offset, n_broken, fc, recorded, transitions):
    state, context, action, next_state = transitions(n=2000)
    ensemble, _ = recorded(fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit_statistics(offset + state, context, action, offset + next_state)
    state[7 : 7 + n_broken, 1] = 1e6
    with pytest.warns(UserWarning, match=r"state: a few of 2000 rows .* dimension\(s\) \[1\]"):
        ensemble.fit_statistics(offset + state, context, action, offset + next_state)


def test_a_switch_that_is_seldom_turned_is_no_broken_reading(fc, recorded, transitions):
    state, context, action, next_state = transitions(n=2000)
    state[:, 1] = next_state[:, 1] = 0.0
    next_state[7:9, 1] = state[8, 1] = 1.0
    ensemble, _ = recorded(fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit_statistics(state, context, action, next_state)


def test_a_tail_that_falls_off_is_no_broken_reading(fc, recorded, transitions):
    state, context, action, next_state = transitions(n=2000)
    ensemble, _ = recorded(fc)
    state[7:10, 1] = torch.tensor([1e6, 6e4, 1e4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.fit_statistics(state, context, action, next_state)
