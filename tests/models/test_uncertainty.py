"""uncertainty against loops over members and particles, and closed forms of random walks."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BATCHES = [(), (1,), (3,), (2, 2)]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 4),
    n_particles=st.integers(1, 4),
    horizon=st.integers(1, 3),
    d=st.integers(1, 2),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_uncertainty_is_the_law_of_total_variance_in_loops(
    batch, n_models, n_particles, horizon, d, deterministic, seed, tanh_net, recorded
):
    torch.manual_seed(seed)
    ensemble, _ = recorded(tanh_net, d=d, c=0, n_models=n_models, n_particles_per_model=n_particles)
    traj = ensemble.rollout(
        torch.randn(*batch, d), None, torch.randn(*batch, horizon, 2), deterministic
    ).detach()
    out = ensemble.uncertainty(traj)
    assert out.batch_size == torch.Size((*batch, horizon))
    assert set(out.keys()) == {"mean", "epistemic_var", "aleatoric_var"}
    for index in itertools.product(*map(range, batch)):
        for h, k in itertools.product(range(horizon), range(d)):
            particles = traj[index]["next", "state"][..., h, k].double().tolist()  # [M][P]
            means = [statistics.fmean(member) for member in particles]
            epistemic = statistics.pvariance(means)
            aleatoric = statistics.fmean(map(statistics.pvariance, particles))
            got = out[(*index, h)]
            close = {"rel": 1e-3, "abs": 1e-5}
            assert got["mean"][k].item() == pytest.approx(statistics.fmean(means), **close)
            assert got["epistemic_var"][k].item() == pytest.approx(epistemic, **close)
            assert got["aleatoric_var"][k].item() == pytest.approx(aleatoric, **close)
            # the two are the variance over all particles, whatever their member
            everything = statistics.pvariance(itertools.chain.from_iterable(particles))
            total = got["epistemic_var"][k].item() + got["aleatoric_var"][k].item()
            assert total == pytest.approx(everything, **close)
            if n_particles == 1 or deterministic:
                assert got["aleatoric_var"][k].item() == pytest.approx(0, abs=1e-6)
            if n_models == 1:
                assert got["epistemic_var"][k].item() == 0


def test_of_random_walks_drifts_are_epistemic_and_noise_is_aleatoric(table_net, tables):
    """After h steps: the variance of the drifts grows with h squared, that of the noise with h."""
    torch.manual_seed(0)
    drifts, noise = [[-1.0, 0.0], [0.0, 0.0], [4.0, 0.0]], [0.5, 2.0]
    ensemble = tables([table_net([x], [noise]) for x in drifts], n_particles_per_model=8_000)
    traj = ensemble.rollout(torch.tensor([5.0, -5.0]), None, torch.zeros(4, 1))
    out = ensemble.uncertainty(traj)
    for h in range(4):
        steps = h + 1
        assert out["mean"][h].tolist() == pytest.approx([5.0 + steps, -5.0], abs=0.2)
        assert out["epistemic_var"][h, 0].item() == pytest.approx(steps**2 * 14 / 3, rel=0.05)
        assert out["epistemic_var"][h, 1].item() == pytest.approx(0, abs=0.02)
        for k in range(2):
            expected = steps * noise[k] ** 2
            assert out["aleatoric_var"][h, k].item() == pytest.approx(expected, rel=0.1)


def test_a_trajectory_without_the_next_state_is_refused_by_name(fc, recorded):
    ensemble, _ = recorded(fc)
    traj = ensemble.rollout(torch.zeros(3), torch.zeros(2), torch.zeros(4, 2))
    with pytest.raises(KeyError, match=r"next.*state"):
        ensemble.uncertainty(traj.exclude(("next", "state")))
