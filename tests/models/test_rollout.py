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
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import Model, ProbabilisticEnsemble

BATCHES = [(), (1,), (3,), (2, 2)]


def start(batch, horizon, d=3, c=2, a=2, *, seed=7):
    """Initial state, context and actions."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, d, generator=generator),
        torch.randn(*batch, c, generator=generator),
        torch.randn(*batch, horizon, a, generator=generator),
    )


# -- layout --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["fc", "tanh"]),
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 2),
    n_particles=st.integers(1, 3),
    horizon=st.integers(1, 4),
    c=st.integers(0, 2),
    deterministic=st.booleans(),
)
def test_the_layout_is_that_of_a_torchrl_rollout(
    kind, batch, n_models, n_modes, n_particles, horizon, c, deterministic, fc, tanh_net, recorded
):
    ensemble, _ = recorded(
        fc if kind == "fc" else tanh_net,
        c=c,
        n_models=n_models,
        n_modes=n_modes,
        n_particles_per_model=n_particles,
    )
    state, context, actions = start(batch, horizon, c=c)
    traj = ensemble.rollout(state, context if c else None, actions, deterministic)

    shape = (*batch, n_models, n_particles, horizon)
    assert traj.batch_size == torch.Size(shape)
    assert set(traj.keys(include_nested=True, leaves_only=True)) == {
        "state",
        "context",
        "action",
        ("next", "state"),
        ("next", "term_prob"),
    }
    assert traj["next"].batch_size == torch.Size(shape)
    assert traj["state"].shape == traj["next", "state"].shape == (*shape, 3)
    assert traj["context"].shape == (*shape, c)
    assert traj["action"].shape == (*shape, 2)
    assert traj["next", "term_prob"].shape == (*shape, 1)
    assert torch.equal(traj["state"][..., 1:, :], traj["next", "state"][..., :-1, :])
    for index in itertools.product(*map(range, batch)):
        for m, p in itertools.product(range(n_models), range(n_particles)):
            one = traj[(*index, m, p)]
            assert torch.equal(one["state"][0], state[index])
            assert torch.equal(one["action"], actions[index])
            for h in range(horizon):
                assert torch.equal(one["context"][h], context[index])


def test_state_and_next_state_share_their_memory(fc, recorded):
    ensemble, _ = recorded(fc, n_particles_per_model=2)
    for batch in BATCHES:
        traj = ensemble.rollout(*start(batch, 4))
        pointers = {traj[key].untyped_storage().data_ptr() for key in ("state", ("next", "state"))}
        assert len(pointers) == 1
        assert traj["state"].untyped_storage().nbytes() == traj["state"].numel() * 4 * 5 // 4


# -- deterministic -------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["fc", "tanh"]),
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 3),
    n_particles=st.integers(1, 2),
    horizon=st.integers(1, 3),
    delta=st.booleans(),
    discrete=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_deterministic_equals_a_loop_over_members_and_steps(
    kind, batch, n_models, n_modes, n_particles, horizon, delta, discrete, seed,
    fc, tanh_net, recorded, transitions, slow_predict,
):  # fmt: skip
    torch.manual_seed(seed)
    ensemble, nets = recorded(
        fc if kind == "fc" else tanh_net,
        n_models=n_models,
        n_modes=n_modes,
        n_particles_per_model=n_particles,
        predict_delta=delta,
        action_space=gym.spaces.Discrete(3) if discrete else None,
    )
    sample = transitions(discrete=3 if discrete else 0, seed=seed)
    ensemble.fit_statistics(*sample)
    state, context, actions = start(batch, horizon, seed=seed)
    if discrete:
        actions = torch.randint(3, (*batch, horizon))
    traj = ensemble.rollout(state, context, actions, deterministic=True)

    for index in itertools.product(*map(range, batch)):
        for m, net in enumerate(nets):
            x = state[index]
            for h in range(horizon):
                mean, _, weights, term = slow_predict(
                    net, x, context[index], actions[index][h], sample, predict_delta=delta
                )
                x = torch.tensor(
                    [sum(w * mu[d] for w, mu in zip(weights, mean, strict=True)) for d in range(3)]
                )
                for p in range(n_particles):
                    got = traj[(*index, m, p, h)]["next"]
                    torch.testing.assert_close(got["state"], x, atol=1e-3, rtol=1e-3)
                    assert got["term_prob"].item() == pytest.approx(term, abs=1e-3)


def test_deterministic_draws_no_random_number(fc, tanh_net, recorded):
    for net in (fc, tanh_net):
        ensemble, _ = recorded(net, n_particles_per_model=2)
        before = torch.get_rng_state()
        one = ensemble.rollout(*start((3,), 4), deterministic=True)
        assert torch.equal(torch.get_rng_state(), before)
        assert (one == ensemble.rollout(*start((3,), 4), deterministic=True)).all()


@pytest.mark.parametrize("batch", BATCHES)
def test_discrete_actions_of_every_kind_and_form_roll_out_the_same(batch, fc, recorded):
    state, context, _ = start(batch, 3)
    index = torch.randint(4, (*batch, 3))
    rows = torch.eye(4)[index]
    torch.manual_seed(5)
    reference, _ = recorded(fc, a=4)
    expected = reference.rollout(state, context, rows, deterministic=True)
    for space in (gym.spaces.Discrete(4), Categorical(4), OneHot(4)):
        torch.manual_seed(5)
        ensemble, _ = recorded(fc, action_space=space)
        for actions in (index, index.unsqueeze(-1), rows, rows.bool()):
            traj = ensemble.rollout(state, context, actions, deterministic=True)
            torch.testing.assert_close(
                traj["next", "state"], expected["next", "state"], atol=1e-5, rtol=1e-5
            )
            # the actions come back as the spec has them
            assert traj["action"].dtype == ensemble.action_spec.dtype
            choice = rows.bool() if isinstance(space, OneHot) else index
            for m in range(3):
                assert torch.equal(traj[..., m, 0, :]["action"], choice)


# -- samples -------------------------------------------------------------------------------


def separated(fc):
    """The built-in network with modes that lie apart and weights that differ."""

    def build(*spaces):
        net = fc(*spaces)
        with torch.no_grad():
            net.layers[-1].bias.mul_(6)
            net.layers[-1].weight.mul_(2)
        return net

    return build


def mixture_cdf(x, mean, std, weights):
    """Of one dimension: a sum over modes with math.erf."""
    return sum(
        w * 0.5 * (1 + math.erf((x - m) / (s * math.sqrt(2))))
        for m, s, w in zip(mean, std, weights, strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "n_modes", "calibrated", "delta"),
    [
        ("fc", 1, True, True),
        ("fc", 3, False, False),
        ("fc", 3, True, True),
        ("tanh", 1, False, True),
        ("tanh", 3, True, False),
        ("table", 3, False, True),
    ],
)
def test_one_step_samples_follow_the_predicted_mixture(
    kind, n_modes, calibrated, delta, fc, tanh_net, table_net, recorded, tables, transitions
):
    torch.manual_seed(1)
    n_particles = 20_000
    if kind == "table":
        tabled = [
            table_net(3 * torch.randn(n_modes, 2), 0.2 + torch.rand(n_modes, 2), w[:n_modes])
            for w in ([1.0, 0.0, 0.0], [0.2, 0.7, 0.1])
        ]
        ensemble = tables(tabled, c=2, a=2, n_particles_per_model=n_particles, predict_delta=delta)
    else:
        ensemble, _ = recorded(
            separated(fc) if kind == "fc" else tanh_net,
            d=2,
            n_models=2,
            n_modes=n_modes,
            n_particles_per_model=n_particles,
            predict_delta=delta,
        )
    ensemble.fit_statistics(*transitions(d=2))
    if calibrated:
        ensemble.calibration.shift.copy_(torch.tensor([0.8, -0.7]))
        ensemble.calibration.slope.copy_(torch.tensor([0.6, 1.3]))
        ensemble.calibration.spread.fill_(0.5)
    state, context, actions = start((2,), 1, d=2)
    with torch.no_grad():
        samples = ensemble.rollout(state, context, actions)["next", "state"].squeeze(-2)
        mean, weights, std, _ = ensemble.predict(state, context, actions[:, 0])
    for b, m in itertools.product(range(2), range(2)):
        w = weights[b, m].tolist()
        for d in range(2):
            column = samples[b, m, :, d].double()
            mu, sigma = mean[b, m, :, d].tolist(), std[b, m, :, d].tolist()
            expected = sum(x * y for x, y in zip(w, mu, strict=True))
            square = sum(x * (y**2 + z**2) for x, y, z in zip(w, mu, sigma, strict=True))
            variance = square - expected**2
            assert float(column.mean()) == pytest.approx(
                expected, abs=5 * math.sqrt(variance / n_particles)
            )
            # the sampling error of a variance follows from the fourth central moment
            fourth = sum(
                x * ((y - expected) ** 4 + 6 * (y - expected) ** 2 * z**2 + 3 * z**4)
                for x, y, z in zip(w, mu, sigma, strict=True)
            )
            assert float(column.var()) == pytest.approx(
                variance, abs=5 * math.sqrt((fourth - variance**2) / n_particles)
            )
            # Dvoretzky, Kiefer, Wolfowitz: a gap of 0.02 has probability 2 exp(-16)
            for q in torch.linspace(0.02, 0.98, 25).tolist():
                x = float(column.quantile(q))
                assert mixture_cdf(x, mu, sigma, w) == pytest.approx(q, abs=0.02)
        # The modes are drawn once for all dimensions.
        cross = sum(x * mu[0] * mu[1] for x, mu in zip(w, mean[b, m].tolist(), strict=True))
        products = samples[b, m].double().prod(-1)
        error = 5 * float(products.std()) / math.sqrt(n_particles)
        assert float(products.mean()) == pytest.approx(cross, abs=error)


def test_a_mode_of_weight_0_is_never_drawn(table_net, tables):
    net = table_net([[-9.0], [0.0], [9.0]], 0.1, [0.0, 1.0, 0.0])
    ensemble = tables([net], n_particles_per_model=5_000)
    states = ensemble.rollout(torch.zeros(1), None, torch.zeros(4, 1))["state"]
    assert states.abs().max() < 3


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_noise_is_drawn_anew_for_every_row_member_particle_step_and_dimension(
    kind, fc, tanh_net, recorded
):
    torch.manual_seed(2)
    n_particles, horizon = 3_000, 2
    ensemble, nets = recorded(
        fc if kind == "fc" else tanh_net,
        d=2,
        n_models=2,
        n_modes=1,
        n_particles_per_model=n_particles,
    )
    state = torch.zeros(2, 2)  # equal rows
    with torch.no_grad():
        traj = ensemble.rollout(state, torch.zeros(2, 2), torch.zeros(2, horizon, 2))
        noise = []
        for m, net in enumerate(nets):
            now = traj[:, m]
            (mean, std), _, _ = net(now["state"], now["context"], now["action"])
            residual = now["next", "state"] - now["state"] - mean.squeeze(-2)
            noise.append(residual / std.squeeze(-2))
    noise = torch.stack(noise, 1)  # [B, M, P, H, D]
    columns = noise.movedim(2, 0).reshape(n_particles, -1).double()  # one for each b, m, h, d
    assert columns.shape[1] == 16
    assert (columns.mean(0).abs() < 5 / math.sqrt(n_particles)).all()
    assert ((columns.var(0) - 1).abs() < 0.15).all()
    off_diagonal = columns.T.corrcoef() - torch.eye(16)
    assert (off_diagonal.abs() < 5 / math.sqrt(n_particles)).all()


@pytest.mark.parametrize("n_particles", [1, 3])
@pytest.mark.parametrize("batch", BATCHES)
def test_particles_stay_within_their_member(batch, n_particles, table_net, tables):
    """TS-infinity: members with clearly distinct constant drifts never mix."""
    drifts = [-10.0, 0.0, 3.0, 100.0]
    ensemble = tables(
        [table_net([[drift, -drift]], 0.01) for drift in drifts], n_particles_per_model=n_particles
    )
    horizon = 5
    state = torch.randn(*batch, 2)
    traj = ensemble.rollout(state, None, torch.zeros(*batch, horizon, 1))
    for m, drift in enumerate(drifts):
        for h in range(horizon):
            moved = traj["next", "state"][..., m, :, h, :] - state.unsqueeze(-2)
            expected = (h + 1) * torch.tensor([drift, -drift])
            assert ((moved - expected).abs() < 0.3).all()


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


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_term_prob_is_each_members_at_the_particles_own_state(
    kind, fc, tanh_net, recorded, transitions, slow_predict
):
    ensemble, nets = recorded(fc if kind == "fc" else tanh_net, n_particles_per_model=2)
    sample = transitions()
    ensemble.fit_statistics(*sample)
    state, context, actions = start((2,), 3)
    traj = ensemble.rollout(state, context, actions)
    seen = set()
    for b, m, p, h in itertools.product(*map(range, traj.batch_size)):
        now = traj[b, m, p, h]
        expected = slow_predict(nets[m], now["state"], now["context"], now["action"], sample)[3]
        assert now["next", "term_prob"].item() == pytest.approx(expected, abs=1e-4)
        seen.add(round(expected, 6))
    assert len(seen) > 12  # they differ, so the comparison says something


@pytest.mark.parametrize("kind", ["fc", "tanh"])
@pytest.mark.parametrize("n_modes", [1, 2])
def test_samples_follow_torch_manual_seed(kind, n_modes, fc, tanh_net, recorded):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, n_modes=n_modes)
    given = start((2,), 3)
    trajectories = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        trajectories.append(ensemble.rollout(*given))
    assert (trajectories[0] == trajectories[1]).all()
    differs = trajectories[0]["next", "state"] != trajectories[2]["next", "state"]
    assert differs.all()


# -- precision and gradients ---------------------------------------------------------------


@pytest.mark.usefixtures("bf16_units")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("n_modes", [1, 3])
def test_autocast_keeps_states_in_float32(fc, recorded, n_modes, grad):
    ensemble, _ = recorded(fc, n_modes=n_modes)
    given = start((5,), 4)
    with torch.set_grad_enabled(grad):
        expected = ensemble.rollout(*given, deterministic=True)["next", "state"]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        got = ensemble.rollout(*given, deterministic=True)["next", "state"]
        assert torch.isfinite(ensemble.rollout(*given)["next", "state"]).all()
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_gradients_through_a_rollout_agree_with_finite_differences(
    kind, fc, tanh_net, recorded, transitions
):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, n_models=2)
    ensemble.double().fit_statistics(*(x.double() for x in transitions()))
    given = tuple(x.double().requires_grad_() for x in start((2,), 3))

    def final(state, context, actions):
        traj = ensemble.rollout(state, context, actions, deterministic=True)
        return traj["next", "state"], traj["next", "term_prob"]

    assert torch.autograd.gradcheck(final, given)


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_samples_carry_gradients_to_every_member(kind, fc, tanh_net, recorded):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, n_particles_per_model=3)
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
def test_a_noiseless_linear_model_has_a_closed_form(box, deterministic):
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


def test_a_model_that_multiplies_the_state_can_be_trained_through_its_rollout(box):
    model = Linear(box)
    given = tuple(x.double().requires_grad_() for x in (torch.randn(2, 2), torch.randn(2, 3, 2)))

    def final(state, actions):
        return model.rollout(state, None, actions, deterministic=True)["next", "state"]

    assert torch.autograd.gradcheck(final, given)
    final(*given).square().sum().backward()
    assert (model.w.grad != 0).all()


# -- bad input -----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 0, 2), r"horizon 0.*at least one step"),
        ((4, 3, 5), r"action has shape \(4, 3, 5\), expected \(4, 3, 2\)"),
        ((3, 4, 2), r"action has shape \(3, 4, 2\), expected \(4, 4, 2\)"),
        ((4,), r"actions must be a tensor \[\*B, H, A\] with \*B = \(4,\), got \(4,\)"),
        ((4, 2), r"action has shape \(4, 2\), expected \(4, 2, 2\)"),
    ],
)
def test_actions_of_another_shape_are_refused(shape, message, fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, _ = start((4,), 3)
    with pytest.raises(ValueError, match=message):
        ensemble.rollout(state, context, torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"actions": [[0.0]]}, (TypeError, ValueError), r"actions must be a tensor.*list"),
        ({"actions": torch.full((4, 3, 2), math.nan)}, ValueError, "action holds NaN"),
        ({"state": torch.full((4, 3), math.inf)}, ValueError, r"state holds 12 non-finite"),
        ({"state": torch.zeros(4, 2)}, ValueError, r"state.*\(4, 2\), expected \[\.\.\., 3\]"),
        ({"context": torch.zeros(3, 2)}, ValueError, r"batch shape \(3,\), the state \(4,\)"),
        ({"context": None}, ValueError, r"context has shape \(4, 0\), expected \[\.\.\., 2\]"),
        ({"state": torch.zeros(0, 3)}, ValueError, "batch is empty"),
    ],
)
def test_other_bad_input_is_refused(changes, error, message, fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, actions = start((4,), 3)
    given = {"state": state, "context": context, "actions": actions} | changes
    with pytest.raises(error, match=message):
        ensemble.rollout(given["state"], given["context"], given["actions"])


@pytest.mark.parametrize("index", [4, -1])
def test_choices_out_of_range_are_refused(index, fc, recorded):
    ensemble, _ = recorded(fc, action_space=gym.spaces.Discrete(4))
    state, context, _ = start((2,), 3)
    with pytest.raises(ValueError, match="integers from 0 to 3"):
        ensemble.rollout(state, context, torch.tensor([[0, 1, index], [0, 0, 0]]))


@pytest.mark.parametrize("name", ["std", "weights", "term_prob"])
def test_members_that_say_nonsense_along_the_way_are_not_believed(name, box):
    """A member that was fine when it was built and is not once it has been trained."""

    class Spoiled(nn.Module):
        spoiled = False

        def forward(self, state, context, action):
            mean = state.unsqueeze(-2).expand(*state.shape[:-1], 2, 1)
            out = {
                "std": torch.ones_like(mean),
                "weights": torch.full_like(mean[..., 0], 0.5),
                "term_prob": torch.zeros_like(state[..., 0]),
            }
            if self.spoiled:
                out[name] = out[name] * math.nan
            return (mean, out["std"]), out["weights"], out["term_prob"]

    nets = [Spoiled() for _ in range(2)]
    in_turn = iter(nets)
    ensemble = ProbabilisticEnsemble(box(1), None, box(1), lambda *_: next(in_turn), 2, 2)
    given = torch.zeros(3, 1), None, torch.zeros(3, 4, 1)
    ensemble.rollout(*given)
    nets[1].spoiled = True
    with pytest.raises(ValueError, match="member"):
        ensemble.rollout(*given)


# -- the fast way of sampling ---------------------------------------------------------------


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


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("flags", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("discrete", [False, True])
def test_means_are_stepped_to_alike_with_and_without_gradients(
    clip, flags, discrete, fc, recorded, transitions
):
    """The fast way of stepping normalises, clips and scales on its own."""
    options = {"predict_delta": flags[0], "normalize_inputs": flags[1]}
    ensemble, _ = recorded(
        fc,
        action_space=gym.spaces.Discrete(4) if discrete else None,
        clip_inputs=clip and flags[1],
        **options,
    )
    ensemble.fit_statistics(*transitions(discrete=4 if discrete else 0))
    state, context, actions = start((4,), 3)
    if discrete:
        actions = torch.randint(4, (4, 3))
    slow = ensemble.rollout(3 * state, 3 * context, actions, deterministic=True)
    with torch.no_grad():
        fast = ensemble.rollout(3 * state, 3 * context, actions, deterministic=True)
    torch.testing.assert_close(
        fast["next", "state"], slow["next", "state"].detach(), atol=1e-3, rtol=1e-3
    )


def test_outside_the_data_samples_spread_as_the_std_says(fc, recorded, transitions):
    ensemble, _ = recorded(
        fc, n_models=2, n_modes=1, n_particles_per_model=20_000, clip_inputs=True
    )
    ensemble.fit_statistics(*transitions())
    state, context, actions = start((1,), 1)
    state = 50 + state  # far out
    _, _, std, _ = ensemble.predict(state, context, actions[:, 0])
    assert (std[0, :, 0] > ensemble.scaling.target.scale).all()
    with torch.no_grad():
        samples = ensemble.rollout(state, context, actions)["next", "state"][0, :, :, 0]
    torch.testing.assert_close(samples.std(1), std[0, :, 0], rtol=0.03, atol=0.0)


def test_members_that_diverged_are_named_before_anything_is_sampled(fc, recorded):
    ensemble, _ = recorded(fc, n_models=3, ema_decay=None)
    with torch.no_grad():
        ensemble.members.weights[-1][1, 0, -1] = torch.nan
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3 have parameters"):
            ensemble.rollout(*start((2,), 3))


def test_a_rollout_allocates_no_more_than_three_times_what_it_returns(fc, recorded, peak_bytes):
    ensemble, _ = recorded(fc, n_models=5, n_modes=1, n_particles_per_model=4)
    given = start((64,), 30)
    with torch.no_grad():
        traj = ensemble.rollout(*given)
    peak = peak_bytes(lambda: ensemble.rollout(*given))
    states = traj["state"].untyped_storage().nbytes()
    assert traj["next", "state"].untyped_storage().nbytes() == states  # views of one tensor
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
