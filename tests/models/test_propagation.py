"""Which member moves which particle: TS-infinity, TS-1 and expectation against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shifts import Shifts, digits

from layeredrl_torchrl import TS1, Expectation, Propagation, TSInfinity


@settings(max_examples=20, deadline=None)
@given(
    n_models=st.integers(1, 4),
    n_particles=st.integers(1, 3),
    horizon=st.integers(1, 5),
    batch=st.sampled_from([(), (3,), (2, 2)]),
)
def test_each_propagation_moves_particles_by_the_members_it_says(
    n_models, n_particles, horizon, batch
):
    model = Shifts(n_models, n_particles_per_model=n_particles)
    given = torch.zeros(*batch, 1), torch.zeros(*batch, 1), torch.zeros(*batch, horizon, 1)

    stay = model.rollout(*given, propagation=TSInfinity())
    moved = digits(stay["next", "state"][..., -1, :], n_models)
    for m in range(n_models):
        expected = horizon * torch.eye(n_models, dtype=torch.long)[m]
        assert (moved[..., m, :, :] == expected).all()

    mixed = model.rollout(*given, propagation=TS1())
    assert mixed.batch_size == stay.batch_size
    moved = digits(mixed["next", "state"], n_models)  # [*B, M, P, H, M]
    steps = torch.arange(1, horizon + 1)
    assert (moved.sum(-1) == steps).all()  # one member a step
    # each member moved P of the particles of a start at every step
    for m in range(n_models):
        assert (moved[..., m].sum((-3, -2)) == n_particles * steps).all()
    # states follow upon one another, and a term_prob is that of the member that moved
    root, following = mixed["state"], mixed["next", "state"]
    assert torch.equal(root[..., 1:, :], following[..., :-1, :])
    member = digits(following - root, n_models).argmax(-1)
    torch.testing.assert_close(mixed["next", "term_prob"].squeeze(-1), member / 10.0)

    mean = model.rollout(*given, propagation=Expectation())
    assert mean.batch_size == (*batch, 1, 1, horizon)
    step = sum(10.0**m for m in range(n_models)) / n_models
    expected = (step * steps).expand(*batch, 1, 1, horizon)
    torch.testing.assert_close(mean["next", "state"].squeeze(-1), expected)
    expected = torch.full_like(expected, (n_models - 1) / 20.0)
    torch.testing.assert_close(mean["next", "term_prob"].squeeze(-1), expected)


def test_ts1_draws_every_member_equally_often_and_independently_over_steps():
    given = torch.zeros(20_000, 1), torch.zeros(20_000, 1), torch.zeros(20_000, 2, 1)
    traj = Shifts(4).rollout(*given, propagation=TS1())
    member = digits(traj["next", "state"] - traj["state"], 4).argmax(-1)  # [B, M, P, 2]
    first, second = member[:, 0, 0, 0], member[:, 0, 0, 1]
    counts = torch.bincount(4 * first + second, minlength=16) / len(first)
    assert (counts - 1 / 16).abs().max() < 5 * (1 / 16 / len(first)) ** 0.5


def test_expectation_averages_over_modes_too(fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_models=2, n_modes=3, n_particles_per_model=4)
    ensemble.fit_statistics(*transitions())
    state, context, action = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 1, 2)
    mean, weights, _, term_prob = ensemble.predict(state, context, action[:, 0])
    for grad in (False, True):  # the fast way of stepping, and the one that keeps gradients
        with torch.set_grad_enabled(grad):
            traj = ensemble.rollout(state, context, action, propagation=Expectation())
        expected = (weights.unsqueeze(-1) * mean).sum(-2).mean(-2)
        got = traj["next", "state"][:, 0, 0, 0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        got = traj["next", "term_prob"][:, 0, 0, 0, 0]
        torch.testing.assert_close(got, term_prob, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("propagation", [TSInfinity(), TS1(), Expectation()])
@pytest.mark.parametrize("n_modes", [1, 2])
def test_gradients_reach_actions_through_every_propagation(propagation, n_modes, fc, recorded):
    ensemble, _ = recorded(fc, n_models=2, n_modes=n_modes, n_particles_per_model=2)
    actions = torch.randn(3, 4, 2, requires_grad=True)
    traj = ensemble.rollout(torch.randn(3, 3), torch.randn(3, 2), actions, propagation=propagation)
    traj["next", "state"][..., -1, :].sum().backward()
    assert (actions.grad.abs().sum((0, 2)) > 0).all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cut", [lambda x: x.mean(0), lambda x: x])
@pytest.mark.parametrize("wrong", [(0, 1), (0,), (1,)], ids=str)
def test_where_a_propagation_of_ones_own_leads_is_checked(wrong, cut, grad):
    """One block is promised; without the axis, or with all members, it would be another."""

    class Own(Propagation):
        def particles(self, n_models, n_particles_per_model):
            return 1, n_particles_per_model

        def advance(self, move, n_models, particles):
            moved = move(particles.expand(n_models, -1, -1, -1))
            return tuple(cut(x) if i in wrong else x[:1] for i, x in enumerate(moved))

    given = torch.zeros(6, 1), torch.zeros(6, 1), torch.zeros(6, 3, 1)
    message = r"advance of Own gave .*expected \(1, 1, 6, 1\) and \(1, 6, 1\)"
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        Shifts(2).rollout(*given, propagation=Own())
