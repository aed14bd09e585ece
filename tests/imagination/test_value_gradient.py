"""Value gradients: closed forms, finite differences, slow twins, and TorchRL's own SAC."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_parts import ACTION, make_learned, make_line, make_steps
from tensordict import TensorDict
from torchrl.collectors.utils import split_trajectories
from torchrl.objectives import SACLoss, ValueEstimators

from layeredrl_torchrl.nets import QValueOperator, TanhActor

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


@pytest.mark.parametrize("horizon", [0, 1, 4])
def test_the_gradient_is_that_of_a_linear_quadratic_problem(horizon):
    """``J(k) = -sum_h g^h (1 + k^2 / 2) c^2h s^2 - g^H w c^2H s^2``, with ``c = 0.9 + k``."""
    gamma, k, weight = 0.8, 0.3, 2.0
    loss = make_line(gain=k, weight=weight, horizon=horizon)
    loss.make_value_estimator(gamma=gamma)
    start = torch.tensor([[1.5], [-0.5]])
    value, _ = loss.actor_loss(TensorDict({"state": start}, [2]))
    (found,) = torch.autograd.grad(
        value, loss.actor_network_params["module", "0", "module", "gain"]
    )
    c, square = 0.9 + k, start.square().mean().item()
    total, slope = 0.0, 0.0
    for h in range(horizon):
        total += gamma**h * (1 + k**2 / 2) * c ** (2 * h)
        slope += gamma**h * (k * c ** (2 * h) + (1 + k**2 / 2) * 2 * h * c ** (2 * h - 1))
    total += gamma**horizon * weight * c ** (2 * horizon)
    slope += gamma**horizon * weight * 2 * horizon * c ** (2 * horizon - 1)
    assert value.item() == pytest.approx(total * square, rel=1e-3)
    assert found.item() == pytest.approx(slope * square, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mean_qvalue", [False, True])
def test_the_gradient_is_that_of_finite_differences(mean_qvalue):
    loss = make_learned(torch.float64, horizon=3, mean_qvalue=mean_qvalue)
    starts = TensorDict({"state": torch.randn(32, 2, dtype=torch.float64)}, [32])
    parameters = list(loss.actor_network_params.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def value(shift):
        torch.manual_seed(3)  # common noise
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += shift * d
            out = loss.actor_loss(starts)[0].item()
            for p, d in zip(parameters, directions, strict=True):
                p -= shift * d
        return out

    torch.manual_seed(3)
    grads = torch.autograd.grad(loss.actor_loss(starts)[0], parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert slope.item() == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-4)


def test_the_defaults_are_those_that_are_documented():
    loss, steps = make_learned(), make_steps(4)
    terms = loss(steps)
    assert terms["alpha"].item() == pytest.approx(0.1)
    assert (loss.horizon, loss.num_qvalue_nets) == (5, 2)
    assert loss.target_entropy.item() == -2.0  # minus the number of action dimensions


def test_without_imagined_steps_it_is_sac():
    loss = make_learned(horizon=0, alpha_init=0.3)
    actor, critic = TanhActor(2, 0, ACTION, (8,)), QValueOperator(2, 0, 2, (8,))
    sac = SACLoss(actor, critic, loss_function="l2", alpha_init=0.3, target_entropy=-2.0)
    sac.make_value_estimator(gamma=0.9)
    loss.make_value_estimator(gamma=0.9)
    shared = {k: v for k, v in loss.state_dict().items() if k not in ("target_entropy", "bounds")}
    sac.load_state_dict(sac.state_dict() | shared)
    steps = make_steps(64)
    for ours, theirs in (
        (loss.qvalue_loss, sac.qvalue_v2_loss),
        (loss.actor_loss, sac.actor_loss),
    ):
        torch.manual_seed(0)
        found, info = ours(steps.clone())
        torch.manual_seed(0)
        expected, their_info = theirs(steps.clone())
        torch.testing.assert_close(found, expected)
        for part in ("actor", "qvalue"):
            names = [n for n, _ in loss.named_parameters() if n.startswith(part)]
            for name in names:
                pair = [dict(x.named_parameters())[name] for x in (loss, sac)]
                grads = [
                    torch.autograd.grad(x, p, retain_graph=True, allow_unused=True)[0]
                    for x, p in zip((found, expected), pair, strict=True)
                ]
                if grads[0] is not None or grads[1] is not None:
                    torch.testing.assert_close(*grads)
    torch.testing.assert_close(info["log_prob"], their_info["log_prob"])
    torch.testing.assert_close(
        loss.alpha_loss(info["log_prob"]), sac.alpha_loss(info["log_prob"]).mean()
    )


@pytest.mark.parametrize(
    ("kind", "options", "lmbda"),
    [
        (ValueEstimators.TD0, {}, 0.0),
        (ValueEstimators.TDLambda, {"lmbda": 0.7}, 0.7),
        (ValueEstimators.TD1, {}, 1.0),
    ],
)
def test_targets_are_lambda_returns(kind, options, lmbda):
    """Without entropy, with values that ignore the action: nothing is random."""
    gamma, n, length = 0.9, 5, 7
    loss = make_line(horizon=2, weight=0.5).make_value_estimator(kind, gamma=gamma, **options)
    steps = make_steps(n, length)
    for part in (steps, steps["next"]):
        part["state"] = part["state"][..., :1]
    steps["action"] = steps["action"][..., :1]
    loss.value_targets(steps)
    after = steps["next"]
    value = -0.5 * after["state"].square()
    expected = torch.empty(n, length, 1)
    for i in range(n):
        following = None
        for t in reversed(range(length)):
            v = value[i, t]
            on = (
                v
                if following is None or after["done"][i, t]
                else (1 - lmbda) * v + lmbda * following
            )
            alive = 0.0 if after["terminated"][i, t] else 1.0
            following = after["reward"][i, t] + gamma * alive * on
            expected[i, t] = following
    torch.testing.assert_close(steps["value_target"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["root", "collector", "own"])
def test_targets_end_before_padding(where):
    """A trajectory that is cut off has the targets that it has by itself."""
    loss = make_line(horizon=2, weight=0.5).make_value_estimator(gamma=0.9, lmbda=0.8)
    steps = make_steps(12)
    for part in (steps, steps["next"]):
        part["state"] = part["state"][..., :1]
    steps["action"] = steps["action"][..., :1]
    steps["next", "done"][:] = steps["next", "terminated"][:] = False
    lengths = (2, 7, 3)
    ids = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    key = "traj_ids" if where == "root" else ("collector", "traj_ids")
    steps[key] = ids
    padded = split_trajectories(steps, trajectory_key=key)
    assert padded.shape == (3, 7)
    if where == "own":
        loss.loss_mask_key = ("masks", "mine")
        padded["masks", "mine"] = padded["collector", "mask"]
        padded = padded.exclude("collector")
    loss.value_targets(padded)
    for found, alone in zip(padded, steps.split(lengths), strict=True):
        expected = loss.value_targets(alone.clone().unsqueeze(0))["value_target"][0]
        torch.testing.assert_close(found["value_target"][: len(alone)], expected)


def test_targets_count_the_entropy_of_what_follows():
    """Of a Gaussian of std s it is log(s sqrt(2 pi e)) nats a step."""
    alpha, std, gamma = 0.5, 0.2, 0.9
    entropy = math.log(std * math.sqrt(2 * math.pi * math.e))
    nothing = lambda state, context, action: 0.0 * state[..., 0]  # noqa: E731
    options = {"std": std, "weight": 0.0, "alpha": alpha, "reward": nothing}
    loss = make_line(horizon=3, **options).make_value_estimator(gamma=gamma)
    starts = TensorDict({"state": torch.zeros(20_000, 1)}, [20_000])
    expected = alpha * entropy * (gamma + gamma**2 + gamma**3)
    episode = loss._imagine(starts)
    assert loss._return_of(episode).mean().item() == pytest.approx(expected, abs=0.02)
    _, info = loss.actor_loss(starts)
    assert info["value"].mean().item() == pytest.approx(expected + alpha * entropy, abs=0.02)


@pytest.mark.parametrize("mean_qvalue", [False, True])
def test_each_step_is_paid_with_its_own_entropy(mean_qvalue):
    """By hand, start by start and step by step; the critics' return leaves the first one out."""
    loss = make_learned(horizon=3, alpha_init=0.5, mean_qvalue=mean_qvalue)
    starts = TensorDict({"state": torch.randn(4, 2)}, [4])
    torch.manual_seed(0)
    episode = loss._imagine(starts)
    torch.manual_seed(0)
    found = loss.actor_loss(starts)[1]["value"]
    critics = loss.qvalues(episode.last)
    last = critics.mean(0) if mean_qvalue else critics.min(0).values
    returns, targets = loss._return_of(episode), loss.qvalues(episode.last, loss._targets())
    for i in range(4):
        value, worth = 0.0, 0.0
        for h in range(3):
            value += episode.share[h, i] * (episode.reward[h, i] - 0.5 * episode.log_prob[h, i])
            worth += episode.share[h, i] * episode.reward[h, i]
            worth -= episode.share[h + 1, i] * 0.5 * episode.log_prob[h + 1, i]
        value += episode.share[3, i] * (last[i] - 0.5 * episode.log_prob[3, i])
        worth += episode.share[3, i] * targets[:, i].min()
        assert found[i].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-4)
        assert returns[i].item() == pytest.approx(worth.item(), rel=1e-4, abs=1e-4)


def test_what_follows_a_termination_does_not_count():
    ended, alone = (make_line(horizon=h, term_prob=1.0, std=0.1) for h in (4, 1))
    starts = TensorDict({"state": torch.randn(16, 1)}, [16])
    values = []
    for loss in (ended, alone):
        torch.manual_seed(0)
        values.append(loss.actor_loss(starts)[1]["value"])
    torch.testing.assert_close(*values)


def test_the_critics_learn_the_imagined_return_or_the_target_that_is_given():
    loss = make_line(horizon=2, weight=2.0, loss_function="l1").make_value_estimator(gamma=0.8)
    start = torch.tensor([[1.5]])
    k, c, gamma = 0.3, 1.2, 0.8
    returns = -sum((gamma**h * (1 + k**2 / 2) * c ** (2 * h)) for h in (0, 1))
    returns = (returns - gamma**2 * 2.0 * c**4) * 1.5**2
    said = -2.0 * 1.5**2
    td = TensorDict({"state": start}, [1])
    out = loss(td)
    assert out["loss_qvalue"].item() == pytest.approx(2 * abs(said - returns), rel=1e-3)
    assert td["td_error"].item() == pytest.approx((said - returns) ** 2, rel=1e-3)
    td = TensorDict({"state": start, "action": start, "value_target": start}, [1])
    assert loss(td)["loss_qvalue"].item() == pytest.approx(2 * abs(said - 1.5), rel=1e-5)
    with pytest.raises(KeyError, match="action"):
        loss(TensorDict({"state": start, "value_target": start}, [1]))


def test_each_critic_says_what_its_own_weights_say():
    loss, steps = make_learned(num_qvalue_nets=3), make_steps(5, 4)
    found = loss.qvalues(steps)
    assert found.shape == (3, 5, 4)
    for params, said in zip(loss.qvalue_network_params.unbind(0), found, strict=True):
        with params.to_module(loss.qvalue_network):
            expected = loss.qvalue_network(steps.clone())["state_action_value"].squeeze(-1)
        torch.testing.assert_close(said, expected)


def test_units_of_the_rewards_do_not_matter():
    """Rewards times 1e6, after the scale was fitted: the same losses."""
    found = []
    for scale in (1.0, 1e6):
        torch.manual_seed(0)
        loss = make_learned(scale=1.0, horizon=2, alpha_init=0.1 * scale).double()
        loss.predictor.double()
        head = loss.predictor.rew_func
        head.out_scale.mul_(scale)
        for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
            params.data["module", "head", "out_scale"].mul_(scale)
        steps = make_steps(50, dtype=torch.float64)
        steps["action"] = steps["action"].double()
        steps["next", "reward"] *= scale
        before = loss.qvalues(steps)
        torch.manual_seed(1)
        loss.fit_scale(steps)
        after = loss.qvalues(steps)
        torch.testing.assert_close(before, after)
        assert not loss.qvalue_network_params["module", "head", "out_loc"].any()
        assert loss._scale().item() == pytest.approx(loss.bounds.abs().max().item() / 2)
        torch.manual_seed(2)
        out = loss(steps.select("state"))
        found.append(torch.stack([out["loss_actor"], out["loss_qvalue"]]))
    torch.testing.assert_close(*found)


def test_targets_stay_within_what_rewards_allow():
    loss = make_line(horizon=1, weight=1e4, std=0.01).make_value_estimator(gamma=0.5)
    steps = make_steps(200, 3)
    for part in (steps, steps["next"]):
        part["state"] = part["state"][..., :1]
    steps["action"] = steps["action"][..., :1]
    loss.fit_scale(steps)
    low, high = steps["next", "reward"].flatten().quantile(torch.tensor([0.01, 0.99])) * 2
    torch.testing.assert_close(loss.bounds, torch.stack((low, high)))
    loss.value_targets(steps)
    target = steps["value_target"]
    assert target.min() == low
    assert target.max() <= high
    loss.fit_scale(steps.apply(lambda x: x * 3 if x.is_floating_point() else x), rate=0.5)
    torch.testing.assert_close(loss.bounds, 2 * torch.stack((low, high)))


@pytest.mark.parametrize("pay", [1.0, -1.0])
def test_a_goal_that_is_hardly_ever_reached_keeps_its_worth(pay):
    """All rewards are 0 at first; then 2 steps of 500 are paid, fewer than quantiles see."""
    loss = make_learned(horizon=1, alpha_init=1e-4, fixed_alpha=True)
    steps = make_steps(500)
    steps["next", "reward"].zero_()
    for _ in range(3):
        loss.fit_scale(steps, rate=0.05)
    low, high = loss.bounds.tolist()
    assert max(-low, high) < 0.2
    steps["next", "reward"][[7, 300]] = pay
    steps["next", "terminated"][[7, 300]] = True
    steps["next", "done"][[7, 300]] = True
    loss.fit_scale(steps, rate=0.05)
    assert loss._scale().item() == pytest.approx(0.5)
    target = loss.value_targets(steps)["value_target"]
    torch.testing.assert_close(target[[7, 300]], torch.full((2, 1), pay))
    # The other side stays.
    assert abs(loss.bounds[0 if pay > 0 else 1].item()) < 0.2


@pytest.mark.parametrize("pay", [-3.0, -0.01, 0.0, 0.01, 3.0])
@pytest.mark.parametrize("gamma", [0.5, 0.99])
@pytest.mark.parametrize("lmbda", [0.0, 0.9])
def test_what_terminates_is_worth_what_it_is_paid(pay, gamma, lmbda):
    """A fall among steps that pay 1 is not worth 1 / (1 - gamma), nor a goal -1 / (1 - gamma)."""
    loss = make_learned(horizon=1, alpha_init=1e-5, fixed_alpha=True)
    loss.make_value_estimator(gamma=gamma, lmbda=lmbda)
    steps = make_steps(300)
    steps["next", "reward"].fill_(pay)
    steps["next", "terminated"][::7] = steps["next", "done"][::7] = True
    loss.fit_scale(steps)
    ended = loss.value_targets(steps)["value_target"][::7]
    torch.testing.assert_close(ended, torch.full_like(ended, pay), atol=1e-3, rtol=0)


@pytest.mark.parametrize("pay", [-3.0, 3.0])
def test_falls_need_not_cost_the_reward_of_staying_alive(pay):
    """Where rewards are positive, that is; to end costs is worth what it is in any case."""
    loss = make_learned(horizon=1, alpha_init=1e-5, fixed_alpha=True)
    loss.make_value_estimator(gamma=0.9, lmbda=0.9)
    steps = make_steps(300)
    steps["next", "reward"].fill_(pay)
    steps["next", "terminated"][::7] = steps["next", "done"][::7] = True
    loss.fit_scale(steps, falls_cost=False)
    ended = loss.value_targets(steps)["value_target"][::7]
    expected = torch.full_like(ended, pay / (1 - 0.9) if pay > 0 else pay)
    torch.testing.assert_close(ended, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("bonus", [10.0, -10.0])
def test_a_bonus_at_the_end_is_worth_what_it_is(bonus):
    """Each step costs 0.01; one of 500 reaches the goal, or crashes."""
    loss = make_learned(horizon=1, alpha_init=1e-5, fixed_alpha=True)
    steps = make_steps(500)
    steps["next", "reward"].fill_(-0.01)
    loss.fit_scale(steps)
    steps["next", "reward"][123] = bonus
    steps["next", "terminated"][123] = steps["next", "done"][123] = True
    loss.fit_scale(steps, rate=0.05)
    torch.testing.assert_close(
        loss.value_targets(steps)["value_target"][123], torch.full((1,), bonus)
    )


def test_where_nothing_is_paid_the_scale_stays():
    """It would be so small that weights overflow."""
    loss, steps = make_learned(horizon=1, alpha_init=1e-37, fixed_alpha=True), make_steps(50)
    steps["next", "reward"].zero_()
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        params.data["module", "head", "net", "3", "weight"].mul_(100.0)
    before = loss.qvalues(steps)
    loss.fit_scale(steps)
    torch.testing.assert_close(loss.qvalues(steps), before)
    assert loss._scale().item() == 1.0


def test_inputs_are_standardised_by_statistics_of_the_data():
    loss = make_learned(horizon=1)
    data = TensorDict(
        {"state": 5 + 3 * torch.randn(40, 3, 2), "action": ACTION.rand((40, 3))}, [40, 3]
    )
    loss.fit_inputs(data)
    state = data["state"].flatten(0, 1)
    inputs = loss.actor_network_params["module", "0", "module", "inputs"]
    torch.testing.assert_close(inputs["loc"], state.mean(0))
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        loc = params["module", "head", "inputs", "loc"]
        torch.testing.assert_close(loc[:, :2], state.mean(0).expand(2, 2))


def test_the_weight_of_the_entropy_is_learned_unless_it_is_fixed():
    for options, learns in (({}, True), ({"fixed_alpha": True}, False)):
        loss = make_learned(horizon=1, alpha_init=0.3, **options)
        assert loss.alpha.item() == pytest.approx(0.3)
        assert ("log_alpha" in dict(loss.named_parameters())) == learns
        assert ("log_alpha" in loss.state_dict()) == learns  # else it is an option
        assert ("log_alpha" in dict(loss.named_buffers())) != learns
