"""Rollouts against loops over members, particles and steps, and samples against their mixture."""

from __future__ import annotations

import itertools
import math

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layeredrl_torchrl import Model, ProbabilisticEnsemble
from layeredrl_torchrl.models import GaussianMixture
from layeredrl_torchrl.models._step import Noise, sample_mixture

BATCHES = [(), (1,), (3,), (2, 2)]


def start(batch, horizon, d=3, c=2, a=2, *, seed=7):
    """Initial state, context and actions."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, d, generator=generator),
        torch.randn(*batch, c, generator=generator),
        torch.randn(*batch, horizon, a, generator=generator),
    )


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["fc", "tanh"]),
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 3),
    n_particles=st.integers(1, 3),
    horizon=st.integers(1, 4),
    c=st.integers(0, 2),
    discrete=st.booleans(),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    deterministic=st.booleans(),
    grad=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_rollout_is_laid_out_as_torchrls_and_equals_a_loop_over_members_and_steps(
    kind, batch, n_models, n_modes, n_particles, horizon, c, discrete, flags, deterministic, grad,
    seed, fc, tanh_net, recorded, transitions, slow_predict,
):  # fmt: skip
    """Without gradients steps are written in place; far inputs are clipped only where asked."""
    torch.manual_seed(seed)
    options = {"predict_delta": flags[0], "normalize_inputs": flags[1]}
    options["clip_inputs"] = flags[1] and flags[2]
    ensemble, nets = recorded(
        fc if kind == "fc" else tanh_net,
        c=c,
        n_models=n_models,
        n_modes=n_modes,
        n_particles_per_model=n_particles,
        action_space=gym.spaces.Discrete(3) if discrete else None,
        **options,
    )
    sample = transitions(c=c, discrete=3 if discrete else 0, seed=seed)
    ensemble.fit_statistics(*sample)
    state, context, actions = start(batch, horizon, c=c, seed=seed)
    if discrete:
        actions = torch.randint(3, (*batch, horizon))
    rng = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        traj = ensemble.rollout(state, context if c else None, actions, deterministic)
    assert torch.equal(torch.get_rng_state(), rng) is deterministic

    shape = (*batch, n_models, n_particles, horizon)
    assert traj.batch_size == traj["next"].batch_size == torch.Size(shape)
    following = ("next", "state"), ("next", "term_prob")
    assert set(traj.keys(True, True)) == {"state", "context", "action", *following}
    assert traj["next", "state"].shape == (*shape, 3)
    assert traj["next", "term_prob"].shape == (*shape, 1)
    assert torch.equal(traj["state"][..., 1:, :], traj["next", "state"][..., :-1, :])
    for *index, m, p in itertools.product(*map(range, shape[:-1])):
        one = traj[(*index, m, p)].detach()
        assert torch.equal(one["state"][0], state[(*index,)])
        assert torch.equal(one["action"], actions[(*index,)])
        assert torch.equal(one["context"], context[(*index,)].expand(horizon, c))
        for h in range(horizon):  # each step and its end are its member's at the particle's state
            row = (one[h][key] for key in ("state", "context", "action"))
            mean, _, weights, term = slow_predict(nets[m], *row, sample, **options)
            assert one[h]["next", "term_prob"].item() == pytest.approx(term, abs=1e-3)
            if deterministic:
                expected = (torch.tensor(weights).unsqueeze(-1) * torch.tensor(mean)).sum(0)
                got = one[h]["next", "state"]
                torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


# -- samples -------------------------------------------------------------------------------


def test_one_step_samples_follow_the_predicted_mixture(net, recorded, transitions):
    n = 20_000
    ensemble, _ = recorded(net, d=2, n_models=2, n_modes=3, n_particles_per_model=n)
    ensemble.fit_statistics(*transitions(d=2))
    ensemble.calibration.shift.copy_(torch.tensor([-2.5, -2.0]))  # modes lie apart
    ensemble.calibration.slope.copy_(torch.tensor([0.6, 1.3]))
    ensemble.calibration.spread.fill_(0.5)
    state, context, actions = start((2,), 1, d=2)
    with torch.no_grad():
        samples = ensemble.rollout(state, context, actions)["next", "state"].squeeze(-2)
        mean, weights, std, _ = ensemble.predict(state, context, actions[:, 0])
    for b, m in itertools.product(range(2), range(2)):
        mixture = GaussianMixture(mean[b, m], std[b, m], weights[b, m])
        # Dvoretzky, Kiefer, Wolfowitz: a gap of 0.02 has probability 2 exp(-16)
        uniform = mixture.cdf(samples[b, m]).sort(0).values
        expected = (torch.arange(n) + 0.5) / n
        assert (uniform - expected.unsqueeze(-1)).abs().max() < 0.02
        # The modes are drawn once for all dimensions.
        cross = (weights[b, m] * mean[b, m].prod(-1)).sum()
        products = samples[b, m].prod(-1)
        assert (products.mean() - cross).abs() < 5 * products.std() / math.sqrt(n)


def test_a_mode_of_weight_0_is_never_drawn(table_net, tables):
    net = table_net([[-9.0], [0.0], [9.0]], 0.1, [0.0, 1.0, 0.0])
    ensemble = tables([net], n_particles_per_model=5_000)
    states = ensemble.rollout(torch.zeros(1), None, torch.zeros(4, 1))["state"]
    assert states.abs().max() < 3


@pytest.mark.parametrize("height", [0.0, 1.0 - 2**-24])
def test_a_mode_of_weight_0_is_not_drawn_at_the_ends_of_uniform_numbers(height):
    """Uniform numbers in float32 begin at 0 and end just below 1."""
    mean = torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1)
    weights = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1)
    noise = Noise(torch.zeros(1, 1, 1), torch.full((1, 1, 1), height))
    assert sample_mixture(mean, torch.ones(1, 3, 1, 1), weights, noise).item() == 0.0


def test_noise_is_drawn_anew_for_every_row_member_particle_step_and_dimension(net, recorded):
    torch.manual_seed(2)
    n_particles, horizon = 3_000, 2
    ensemble, nets = recorded(net, d=2, n_models=2, n_modes=1, n_particles_per_model=n_particles)
    state = torch.zeros(2, 2)  # equal rows
    with torch.no_grad():
        traj = ensemble.rollout(state, torch.zeros(2, 2), torch.zeros(2, horizon, 2))
        noise = []
        for m, member in enumerate(nets):
            now = traj[:, m]
            (mean, std), _, _ = member(now["state"], now["context"], now["action"])
            residual = now["next", "state"] - now["state"] - mean.squeeze(-2)
            noise.append(residual / std.squeeze(-2))
    noise = torch.stack(noise, 1)  # [B, M, P, H, D]
    columns = noise.movedim(2, 0).reshape(n_particles, -1).double()  # one for each b, m, h, d
    assert columns.shape[1] == 16
    assert (columns.mean(0).abs() < 5 / math.sqrt(n_particles)).all()
    assert ((columns.var(0) - 1).abs() < 0.15).all()
    off_diagonal = columns.T.corrcoef() - torch.eye(16)
    assert (off_diagonal.abs() < 5 / math.sqrt(n_particles)).all()


def test_each_step_draws_its_mode_anew(table_net, tables):
    """A particle keeps its member, not its mode."""
    ensemble = tables(
        [table_net([[-1.0], [1.0]], 0.001, [0.25, 0.75])], n_particles_per_model=4_000
    )
    traj = ensemble.rollout(torch.zeros(1), None, torch.zeros(2, 1))
    up = (traj["next", "state"] > traj["state"]).squeeze(-1)[0]  # [P, H]
    for h in range(2):
        assert up[:, h].float().mean().item() == pytest.approx(0.75, abs=0.04)
    both = (up[:, 0] & up[:, 1]).float().mean().item()
    assert both == pytest.approx(0.75**2, abs=0.04)


# -- precision and gradients ---------------------------------------------------------------


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_keeps_states_in_float32(fc, recorded, grad):
    ensemble, _ = recorded(fc)
    given = start((5,), 4)
    with torch.set_grad_enabled(grad):
        expected = ensemble.rollout(*given, deterministic=True)["next", "state"]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        got = ensemble.rollout(*given, deterministic=True)["next", "state"]
        assert torch.isfinite(ensemble.rollout(*given)["next", "state"]).all()
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_gradients_through_a_rollout_agree_with_finite_differences(net, recorded, transitions):
    ensemble, _ = recorded(net, n_models=2)
    ensemble.double().fit_statistics(*(x.double() for x in transitions()))
    given = tuple(x.double().requires_grad_() for x in start((2,), 3))

    def final(state, context, actions):
        traj = ensemble.rollout(state, context, actions, deterministic=True)
        return traj["next", "state"], traj["next", "term_prob"]

    assert torch.autograd.gradcheck(final, given)


def test_samples_carry_gradients_to_every_member(net, recorded):
    ensemble, _ = recorded(net, n_particles_per_model=3)
    state, context, actions = start((4,), 3)
    actions.requires_grad_()
    traj = ensemble.rollout(state, context, actions)
    (traj["next", "state"].square().sum() + traj["next", "term_prob"].sum()).backward()
    assert (actions.grad != 0).all()
    parameters = list(ensemble.members.parameters())  # [M, ...]
    for parameter in parameters:
        for m in range(3):
            assert torch.isfinite(parameter.grad[m]).all()
    # what the gradient leaves out is the choice of the mode, so only its weights may have none
    assert sum((p.grad[m] != 0).any() for p in parameters for m in range(3)) >= 9


# -- somebody's own model ------------------------------------------------------------------


class Linear(Model):
    """x' = W x + a, with a learned W and no noise; M members with the same W."""

    def __init__(self, box, **options):
        super().__init__(box(2), None, box(2), **options)
        self.w = nn.Parameter(torch.tensor([[0.9, 0.2], [-0.1, 1.1]], dtype=torch.float64))

    def predict_members(self, state, context, action):
        mean = (state @ self.w.mT + action).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.zeros_like(mean)), ones.unsqueeze(-1), 0.25 * ones


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_noiseless_linear_model_has_a_closed_form_and_can_be_trained_through(box, deterministic):
    model = Linear(box, n_models=2, n_particles_per_model=3)
    state, _, actions = (x.double() for x in start((4,), 5, d=2))
    with torch.no_grad():
        traj = model.rollout(state, None, actions, deterministic)
    w = model.w.detach()
    for h in range(5):
        expected = state @ torch.linalg.matrix_power(w, h + 1).T
        for j in range(h + 1):
            expected = expected + actions[:, j] @ torch.linalg.matrix_power(w, h - j).T
        got = traj["next", "state"][..., h, :]
        torch.testing.assert_close(got, expected[:, None, None].expand_as(got))
    assert (traj["next", "term_prob"] == 0.25).all()

    def final(state, actions):
        return model.rollout(state, None, actions, deterministic)["next", "state"]

    given = state[:1].clone().requires_grad_(), actions[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(final, given)
    final(*given).square().sum().backward()
    assert (model.w.grad != 0).all()


class Fork(Model):
    """Steps to one of two places, exactly, the first three times as often."""

    def __init__(self, box):
        super().__init__(box(2), None, box(2), n_models=1, n_modes=2)

    def predict_members(self, state, context, action):
        mean = torch.stack((state + action, state - action), -2)
        weights = torch.tensor([0.75, 0.25]).expand(mean.shape[:-1])
        return (mean, torch.zeros_like(mean)), weights, torch.zeros_like(weights[..., 0])


def test_each_mode_of_somebody_s_own_model_is_taken_as_often_as_it_says(box):
    state, _, actions = start((400,), 1, d=2)
    after = Fork(box).rollout(state, None, actions)["next", "state"].flatten(0, -2)
    first, second = ((after - (state + s * actions[:, 0])).abs().amax(-1) < 1e-6 for s in (1, -1))
    assert (first | second).all()
    assert 0.65 < first.float().mean() < 0.85
    mean = Fork(box).rollout(state, None, actions, True)["next", "state"].flatten(0, -2)
    torch.testing.assert_close(mean, state + 0.5 * actions[:, 0])


# -- members that diverge ------------------------------------------------------------------


class Growing(nn.Module):
    """Multiplies the state by a constant: a member that diverges."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, state, context, action):
        mean = (self.gain * state).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


def test_a_rollout_that_diverges_names_the_member_and_the_step(box):
    gains = iter([1.0, 1e15, 1.0])
    ensemble = ProbabilisticEnsemble(
        box(1),
        None,
        box(1),
        lambda *_: Growing(next(gains)),
        3,
        predict_delta=False,
        clip_inputs=False,
    )
    # 1e15, 1e30, then beyond the 3.4e38 of float32
    state = torch.ones(2, 1)
    traj = ensemble.rollout(state, None, torch.zeros(2, 2, 1), deterministic=True)
    assert torch.isfinite(traj["next", "state"]).all()
    with pytest.raises(ValueError, match=r"member 1 diverged at step 3 of 5"):
        ensemble.rollout(state, None, torch.zeros(2, 5, 1), deterministic=True)


def test_large_states_whose_sum_overflows_have_not_diverged(box):
    options = {"predict_delta": False, "clip_inputs": False}
    ensemble = ProbabilisticEnsemble(box(1), None, box(1), lambda *_: Growing(1.0), 1, **options)
    state = torch.full((3, 1), 3e38)
    traj = ensemble.rollout(state, None, torch.zeros(3, 2, 1), deterministic=True)
    assert torch.equal(traj["next", "state"][:, 0, 0, 1], state)


# -- the fast way of stepping ---------------------------------------------------------------


def test_a_rollout_of_many_rows_is_that_of_its_parts(fc, recorded, transitions):
    """A CPU steps as many rows at a time as stay in its caches."""
    ensemble, _ = recorded(fc, n_particles_per_model=2, clip_inputs=True)
    ensemble.fit_statistics(*transitions())
    n = 2**18 // ensemble.floats_per_row()  # twice as many rows as are taken at once, and more
    state, context, actions = start((n + 3,), 2)
    with torch.no_grad():
        whole = ensemble.rollout(state, context, actions, True)
        for rows in (slice(0, 9), slice(n - 9, n + 3)):
            part = ensemble.rollout(state[rows], context[rows], actions[rows], True)
            for key in (("next", "state"), ("next", "term_prob")):
                torch.testing.assert_close(part[key], whole[rows][key], atol=1e-4, rtol=1e-4)


def test_members_that_diverged_are_named_before_anything_is_sampled(fc, recorded):
    ensemble, _ = recorded(fc, n_models=3, ema_decay=None)
    with torch.no_grad():
        ensemble.members.weights[-1][1, 0, -1] = torch.nan
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3 have parameters"):
            ensemble.rollout(*start((2,), 3))


def test_a_rollout_allocates_no_more_than_three_times_what_it_returns(fc, recorded, peak_bytes):
    """State and next state are views of one tensor."""
    ensemble, _ = recorded(fc, n_models=5, n_modes=1, n_particles_per_model=4)
    given = start((64,), 30)
    with torch.no_grad():
        traj = ensemble.rollout(*given)
    peak = peak_bytes(lambda: ensemble.rollout(*given))
    one, following = (traj[key].untyped_storage() for key in ("state", ("next", "state")))
    assert one.data_ptr() == following.data_ptr()
    states = one.nbytes()
    returned = states + traj["next", "term_prob"].untyped_storage().nbytes()
    assert 0 < peak < 3 * returned


@pytest.mark.gpu
@pytest.mark.parametrize("n_modes", [1, 3])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(n_modes, fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_modes=n_modes)
    ensemble.fit_statistics(*transitions())
    given = start((4,), 5)
    with torch.no_grad():
        expected = ensemble.rollout(*given, deterministic=True)["next", "state"]
        ensemble.cuda()
        on_gpu = [x.cuda() for x in given]
        got = ensemble.rollout(*on_gpu, deterministic=True)["next", "state"]
        torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            half = ensemble.rollout(*on_gpu, deterministic=True)["next", "state"]
        assert half.dtype == torch.float32
        assert not torch.equal(half, got)
        assert torch.isfinite(ensemble.rollout(*on_gpu)["next", "state"]).all()


def test_renamed_keys_are_those_of_a_rollout(fc, recorded):
    names = ["z", "goal", ("agents", "do")]
    written = [("next", key) for key in ("loc", "weights", "scale", "p", "z")]
    torch.manual_seed(0)
    ensemble, _ = recorded(fc, in_keys=names, out_keys=written)
    torch.manual_seed(0)
    plain, _ = recorded(fc)
    given = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 5, 2)
    found, expected = (model.rollout(*given, True) for model in (ensemble, plain))
    assert set(found.keys(True, True)) == {*names, ("next", "z"), ("next", "p")}
    torch.testing.assert_close(found["next", "p"], expected["next", "term_prob"])
    torch.testing.assert_close(found["next", "z"], expected["next", "state"])
