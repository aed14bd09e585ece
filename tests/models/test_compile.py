"""The formula that is compiled, against the mixture that the ensemble predicts."""

from __future__ import annotations

import copy
import math
import pickle

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl import TS1, ProbabilisticEnsemble, TSInfinity
from layeredrl_torchrl.models.fused import Draws, FusedStep, fused_step


@pytest.fixture
def eager():
    """What is compiled runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def inputs(n_models, rows, *, d=3, c=2, a=2, discrete=0):
    """State, context and action for each member, some beyond the range of the data."""
    generator = torch.Generator().manual_seed(5)
    parts = [3 * torch.randn(n_models, rows, n, generator=generator) for n in (d, c)]
    if discrete:
        return *parts, torch.randint(discrete, (n_models, rows), generator=generator)
    return *parts, torch.randn(n_models, rows, a, generator=generator)


@settings(max_examples=30, deadline=None)
@given(
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
    n_models,
    n_modes,
    rows,
    discrete,
    predict_delta,
    normalize,
    ignore_context,
    data,
    fc,
    recorded,
    transitions,
):
    model, _ = recorded(
        lambda *args: fc(*args, ignore_context=ignore_context),
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
    model.compile()
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

        step = model.make_step()
        one_hot = torch.nn.functional.one_hot(action, discrete).float() if discrete else action
        features = [state, one_hot] if ignore_context else [state, context, one_hot]
        draws = Draws(noise.mT, height if n_modes > 1 else None)
        got, got_term = fused_step(features, state, step.parts, draws)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got_term, term_prob)
        means, _ = fused_step(features, state, step.parts, None)
        average = (weights.unsqueeze(-1) * mean).sum(-2)
        torch.testing.assert_close(means, average, atol=1e-4, rtol=1e-4)


def test_modes_are_drawn_as_often_as_their_weights_say(eager, fc, recorded):
    model, _ = recorded(fc, n_models=2, n_modes=3, n_particles_per_model=30_000)
    with torch.no_grad():
        for members in (model.members, model.averaged_members):
            members.biases[-1][..., 9:18] = -20.0  # narrow modes
    model.compile()
    state, context, action = (x[0, :1] for x in inputs(1, 1))
    mean, weights, _, _ = model.predict(state, context, action)
    torch.manual_seed(0)
    with torch.no_grad():
        traj = model.rollout(state, context, action.unsqueeze(1))
    samples = traj["next", "state"][0, :, :, 0]  # [M, P, D]
    nearest = (samples.unsqueeze(-2) - mean[0, :, None]).norm(dim=-1).argmin(-1)
    counts = torch.nn.functional.one_hot(nearest, 3).float().mean(1)
    torch.testing.assert_close(counts, weights[0], atol=0.015, rtol=0.0)


@pytest.mark.parametrize("horizon", [1, 5, 7, 11])
@pytest.mark.parametrize(
    ("discrete", "propagation"), [(0, TSInfinity()), (4, TSInfinity()), (0, TS1())]
)
def test_several_steps_at_once_are_one_after_the_other(
    horizon, discrete, propagation, eager, fc, recorded, transitions, monkeypatch
):
    """To the same seed; as many in a call as may be, unless members are drawn between them."""
    space = gym.spaces.Discrete(discrete) if discrete else None
    model, _ = recorded(fc, action_space=space, n_models=2, n_modes=2, n_particles_per_model=3)
    model.fit_statistics(*transitions(discrete=discrete))
    model.compile()
    state, context, _ = (x[0] for x in inputs(1, 4))
    actions = inputs(4, horizon, discrete=discrete)[2]
    several, sizes = FusedStep.several, []

    def counted(step, state, context, actions):
        sizes.append(len(actions))
        return several(step, state, context, actions)

    monkeypatch.setattr(FusedStep, "several", counted)
    found = []
    for n_at_once in (1, 5):
        monkeypatch.setattr(FusedStep, "n_at_once", n_at_once)
        torch.manual_seed(3)
        sizes.clear()
        with torch.no_grad():
            found.append(model.rollout(state, context, actions, propagation=propagation))
        assert sum(sizes) == horizon
        n_calls = math.ceil(horizon / (1 if isinstance(propagation, TS1) else n_at_once))
        assert max(sizes) == math.ceil(horizon / n_calls)
    for key in (("next", "state"), ("next", "term_prob")):
        torch.testing.assert_close(found[0][key], found[1][key], atol=1e-6, rtol=1e-6)


def test_noise_is_standard_normal_and_independent(eager, fc, recorded):
    model, _ = recorded(fc, n_models=2, n_modes=1, n_particles_per_model=40_000)
    model.compile()
    state, context, action = (x[0, :1] for x in inputs(1, 1))
    mean, _, std, _ = model.predict(state, context, action)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = model.rollout(state, context, action.unsqueeze(1))["next", "state"][0, :, :, 0]
    z = (samples - mean[0]) / std[0]
    for member in z:
        torch.testing.assert_close(member.T.cov(), torch.eye(3), atol=0.03, rtol=0.0)
    assert (z[0] * z[1]).mean(0).abs().max() < 0.02


def test_with_gradients_nothing_is_compiled(fc, recorded):
    model, _ = recorded(fc)
    model.compile(backend="no such backend")
    state, context, action = (x[0] for x in inputs(1, 2))
    assert model.rollout(state, context, action.unsqueeze(1))["next", "state"].requires_grad
    with torch.no_grad(), pytest.raises(Exception, match="no such backend"):
        model.rollout(state, context, action.unsqueeze(1))


def test_members_of_another_kind_are_refused(tanh_net, recorded):
    model, _ = recorded(tanh_net)
    with pytest.raises(TypeError, match=r"for ensembles of ProbFCDynamics, but the members are"):
        model.compile()


def test_copies_and_other_processes_compile_as_well(eager, box):
    model = ProbabilisticEnsemble(box(3), None, box(2), n_models=2)
    model.compile(dynamic=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert type(other.make_step()).__name__ == "FusedStep"
    assert list(model.state_dict()) == list(
        ProbabilisticEnsemble(box(3), None, box(2), n_models=2).state_dict()
    )


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
