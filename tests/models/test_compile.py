"""A step as a pure function of the noise, and compiled, against the predicted mixture."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl import TS1, Expectation, TSInfinity
from layeredrl_torchrl.models._step import Noise, StepInputs


def inputs(n_models, rows, *, d=3, c=2, a=2, discrete=0):
    """State, context and action for each member, some beyond the range of the data."""
    generator = torch.Generator().manual_seed(5)
    parts = [3 * torch.randn(n_models, rows, n, generator=generator) for n in (d, c)]
    if discrete:
        return *parts, torch.randint(discrete, (n_models, rows), generator=generator)
    return *parts, torch.randn(n_models, rows, a, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    built_in=st.booleans(),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 4),
    rows=st.integers(1, 9),
    discrete=st.sampled_from([0, 4]),
    predict_delta=st.booleans(),
    normalize=st.sampled_from([(False, False), (True, False), (True, True)]),
    ignore_context=st.booleans(),
    data=st.data(),
)
def test_each_draw_is_its_place_in_the_predicted_mixture(
    built_in,
    n_models,
    n_modes,
    rows,
    discrete,
    predict_delta,
    normalize,
    ignore_context,
    data,
    fc,
    tanh_net,
    recorded,
    transitions,
):
    model, _ = recorded(
        (lambda *args: fc(*args, ignore_context=ignore_context)) if built_in else tanh_net,
        action_space=gym.spaces.Discrete(discrete) if discrete else None,
        n_models=n_models,
        n_modes=n_modes,
        predict_delta=predict_delta,
        normalize_inputs=normalize[0],
        clip_inputs=normalize[1],
    )
    model.fit_statistics(*transitions(discrete=discrete))
    model.calibration.shift.fill_(0.3)
    model.calibration.slope.fill_(0.9)
    model.calibration.spread.fill_(0.2)
    state, context, action = inputs(n_models, rows, discrete=discrete)
    with torch.no_grad():
        (mean, std), weights, term_prob = model.predict_members(state, context, action)
        # Every row chooses a mode, and its height lies in the middle of that mode's share.
        modes = torch.tensor(
            [[data.draw(st.integers(0, n_modes - 1)) for _ in range(rows)] for _ in range(n_models)]
        ).unsqueeze(-1)
        share = weights.gather(-1, modes)
        height = (weights.cumsum(-1).gather(-1, modes) - share / 2).squeeze(-1)
        noise = torch.randn(n_models, rows, 3)
        chosen = modes.unsqueeze(-1).expand(-1, -1, 1, 3)
        expected = (mean + std * noise.unsqueeze(2)).gather(2, chosen).squeeze(2)

        step = model.make_step(rows=rows)
        acts = step.actions(action)
        columns = state.mT, context.mT, acts.mT if acts.ndim == 3 else acts
        drawn = Noise(noise.mT, height.unsqueeze(1) if n_modes > 1 else None)
        got, got_term = step(StepInputs(*columns, drawn))
        torch.testing.assert_close(got.mT, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got_term, term_prob)
        means, _ = model.make_step(rows=rows, deterministic=True)(StepInputs(*columns, None))
        average = (weights.unsqueeze(-1) * mean).sum(-2)
        torch.testing.assert_close(means.mT, average, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("horizon", "propagation", "discrete"),
    [(1, TSInfinity(), 0), (7, TSInfinity(), 4), (3, TS1(), 0), (3, Expectation(), 0)],
)
def test_a_compiled_rollout_is_the_rollout(
    horizon, discrete, propagation, fc, recorded, transitions
):
    """To the same seed: its steps are made several at once, from the same noise."""
    space = gym.spaces.Discrete(discrete) if discrete else None
    model, _ = recorded(fc, action_space=space, n_models=2, n_modes=2, n_particles_per_model=3)
    model.fit_statistics(*transitions(discrete=discrete))
    state, context, _ = (x[0] for x in inputs(1, 4))
    actions = inputs(4, horizon, discrete=discrete)[2]
    found = []
    for options in (None, {"options": {}}, {"cudagraphs": True}):
        if options is not None:
            model.compile(backend="eager", **options)
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(model.rollout(state, context, actions, propagation=propagation))
    for other in found[1:]:
        for key in (("next", "state"), ("next", "term_prob")):
            torch.testing.assert_close(other[key], found[0][key], atol=1e-5, rtol=1e-5)


def test_no_size_falls_back_to_what_is_not_compiled(fc, recorded):
    """Torch gives up at eight compilations of a function, without an error."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    model, _ = recorded(fc)
    state, context, action = (x[0] for x in inputs(1, 30))
    for dynamic, expected in ((False, {10}), (None, {1, 2, 3})):
        model.compile(backend=backend, dynamic=dynamic)
        compiled.clear()
        for n in range(2, 12):
            with torch.no_grad():
                model.rollout(state[:n], context[:n], action[:n, None])
        assert len(compiled) in expected


def test_members_of_another_kind_are_refused(tanh_net, recorded):
    model, _ = recorded(tanh_net)
    with pytest.raises(TypeError, match=r"for ensembles of ProbFCDynamics, but the members are"):
        model.compile()


def test_copies_and_other_processes_compile_as_well(fc, recorded):
    model, _ = recorded(fc)
    model.compile(backend="no such backend", cudagraphs=True)
    state, context, action = (x[0] for x in inputs(1, 2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # with gradients nothing is compiled
        assert other.rollout(state, context, action.unsqueeze(1))["next", "state"].requires_grad
        with torch.no_grad(), pytest.raises(Exception, match="no such backend"):
            other.rollout(state, context, action.unsqueeze(1))


@pytest.mark.slow
def test_compiled_it_is_what_it_is_uncompiled(fc, recorded, transitions):
    model, _ = recorded(fc, n_models=2, n_modes=2)
    model.fit_statistics(*transitions())
    state, context, action = (x[0] for x in inputs(1, 6))
    actions = action.unsqueeze(1).expand(-1, 4, -1)
    model.compile()
    found = []
    for stance in ("default", "force_eager"):
        torch.manual_seed(3)
        with torch.compiler.set_stance(stance), torch.no_grad():
            found.append(model.rollout(state, context, actions))
    torch.testing.assert_close(
        found[0]["next", "state"], found[1]["next", "state"], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(found[0]["next", "term_prob"], found[1]["next", "term_prob"])
