"""Value gradients: closed forms, finite differences, slow twins, and TorchRL's own SAC."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.data import Bounded, OneHot, Unbounded
from torchrl.envs import ExcludeTransform, StepCounter, TransformedEnv
from torchrl.modules import IndependentNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate, ValueEstimators

from layeredrl_torchrl import (
    IdentityEncoder,
    Model,
    PredictorEnv,
    PredictorFactory,
    StaticPredictor,
    ValueGradientLoss,
)
from layeredrl_torchrl.imagination import Disagrees, OutOfRange, TruncateWhere
from layeredrl_torchrl.nets import QValueOperator, TanhActor

ACTION = Bounded(-1.0, 1.0, (2,))
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


class Line(Model):
    """``s' = a s + u`` in one dimension, exactly; the episode ends with ``term_prob``."""

    def __init__(self, factor=0.9, term_prob=0.0):
        super().__init__(Unbounded((1,)), None, Bounded(-9.0, 9.0, (1,)), n_models=1)
        self.factor, self.term_prob = factor, term_prob

    def predict_members(self, state, context, action):
        mean = (self.factor * state + action).unsqueeze(-2)
        term_prob = torch.full(state.shape[:2], self.term_prob, dtype=state.dtype)
        return (mean, torch.zeros_like(mean)), torch.ones_like(mean[..., 0]), term_prob


class Gain(nn.Module):
    """The linear policy ``u = gain * s``, with a fixed std."""

    def __init__(self, gain, std):
        super().__init__()
        self.gain, self.std = nn.Parameter(torch.tensor(gain)), std

    def forward(self, state):
        return self.gain * state, torch.full_like(state, self.std)


class Square(nn.Module):
    """The value ``-weight * s^2``, whatever the action."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, state, action):
        return -self.weight * state.square() + 0.0 * action


def make_actor(net):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["state"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=IndependentNormal
        ),
    )


def make_line(
    *, gain=0.3, std=1e-6, weight=2.0, alpha=1e-12, term_prob=0.0, reward=None, **options
):
    reward = reward or (lambda state, context, action: -(state**2 + 0.5 * action**2)[..., 0])
    predictor = StaticPredictor(Line(term_prob=term_prob), None, reward, IdentityEncoder((1,)), 1)
    critic = ValueOperator(Square(weight), in_keys=["state", "action"])
    options = {"fixed_alpha": True, "alpha_init": alpha} | options
    return ValueGradientLoss(make_actor(Gain(gain, std)), critic, predictor, **options)


def make_learned(dtype=torch.float32, scale=1.0, **options):
    """Actor, critics and predictor with random weights, two states, two actions."""
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=3)(Unbounded((2,)), ACTION)
    actor, critic = TanhActor(2, 0, ACTION, (8,)), QValueOperator(2, 0, 2, (8,))
    for module in (predictor, critic):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    predictor.rew_func.rescale(0.0, scale)
    loss = ValueGradientLoss(actor, critic, predictor, **options)
    predictor.to(dtype)
    return loss.to(dtype)


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


def make_steps(*batch, dtype=torch.float32):
    done = torch.rand(*batch, 1) < 0.2
    after = {"state": torch.randn(*batch, 2, dtype=dtype), "done": done}
    after |= {"reward": torch.randn(*batch, 1, dtype=dtype)}
    after["terminated"] = done & (torch.rand(*batch, 1) < 0.5)
    step = {"state": torch.randn(*batch, 2, dtype=dtype), "action": 0.9 * ACTION.rand(batch)}
    return TensorDict({**step, "next": after}, batch)


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


@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_forward_leaves_the_predictor_alone_and_takes_any_batch(batch):
    loss = make_learned(horizon=2)
    td = TensorDict({"state": torch.randn(*batch, 2)}, batch)
    out = loss(td)
    assert td["td_error"].shape == (*batch, 1)
    sum(out[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    members = loss.predictor.model.members
    assert all(p.requires_grad and p.grad is None for p in members.parameters())
    assert not set(map(id, loss.parameters())) & set(map(id, loss.predictor.parameters()))


def test_reductions_and_names():
    torch.manual_seed(0)
    loss, td = (
        make_learned(horizon=1, reduction="none"),
        TensorDict({"state": torch.randn(6, 2)}, [6]),
    )
    torch.manual_seed(1)
    rows = loss(td)
    loss.reduction = "mean"
    torch.manual_seed(1)
    mean = loss(td.exclude("td_error"))
    for key in rows.keys():
        assert rows[key].shape == (6,)
        torch.testing.assert_close(rows[key].mean(), mean[key])


@pytest.mark.parametrize("horizon", [0, 2])
def test_tensors_by_name(horizon):
    loss, td = make_learned(horizon=horizon), make_steps(6)
    named = {"_".join([key] if isinstance(key, str) else key): td[key] for key in loss.in_keys}
    torch.manual_seed(0)
    found = loss(**named)
    torch.manual_seed(0)
    expected = loss(td)
    torch.testing.assert_close(found, tuple(expected[key] for key in loss.out_keys))


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


def test_torchrl_s_hooks():
    loss = make_learned(horizon=1)
    update = SoftUpdate(loss, tau=0.25)
    before = loss.target_qvalue_network_params.clone()
    with torch.no_grad():
        loss.qvalue_network_params.data.apply_(lambda x: x.add_(1) if x.is_floating_point() else x)
    update.step()
    key = ("module", "head", "net", "0", "weight")
    shift = loss.target_qvalue_network_params[key] - before[key]
    torch.testing.assert_close(shift, torch.full_like(shift, 0.25), atol=1e-5, rtol=0)
    loss.set_keys(value_target="worth")
    td = TensorDict({"state": torch.randn(4, 2), "action": ACTION.rand((4,))}, [4])
    td["worth"] = torch.zeros(4, 1)
    assert loss(td)["loss_qvalue"] > 0
    other = make_learned(horizon=1)
    other.load_state_dict(loss.state_dict())
    for a, b in zip(loss.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"horizon": -1}, ValueError, "horizon"),
        ({"horizon": 1.5}, TypeError, "horizon"),
        ({"alpha_init": 0.0}, ValueError, "alpha_init"),
        ({"num_qvalue_nets": 0}, ValueError, "num_qvalue_nets"),
        ({"loss_function": "huber"}, ValueError, "loss_function"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"mean_qvalue": "yes"}, TypeError, "mean_qvalue"),
        ({"predictor": nn.Linear(2, 2)}, TypeError, "predictor"),
        ({"actor": nn.Linear(2, 2)}, TypeError, "actor_network must be"),
        ({"actor": TanhActor(2, 0, ACTION, in_keys=["observation"])}, ValueError, "observation"),
        ({"actor": TanhActor(2, 0, ACTION, action_key="u")}, ValueError, "writes"),
        ({"critic": QValueOperator(2, 0, 2, in_keys=["z", "", "action"])}, ValueError, "'z'"),
    ],
    ids=str,
)
def test_what_is_refused_when_built(options, error, message):
    parts = {"actor": TanhActor(2, 0, ACTION), "critic": QValueOperator(2, 0, 2)}
    parts["predictor"] = PredictorFactory(hidden_sizes=(8,))(Unbounded((2,)), ACTION)
    parts |= {name: options.pop(name) for name in list(options) if name in parts}
    with pytest.raises(error, match=message):
        ValueGradientLoss(*parts.values(), **options)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("value_targets", ("next", "reward")),
        ("value_targets", ("next", "state")),
        ("fit_scale", "state"),
        ("fit_scale", ("next", "reward")),
        ("fit_inputs", "action"),
        ("qvalue_loss", "value_target"),
        ("actor_loss", "state"),
        ("forward", "action"),
    ],
)
def test_values_that_are_not_finite_are_refused(method, key, unchanged):
    loss, steps = make_learned(horizon=1), make_steps(4, 3)
    steps["value_target"] = torch.zeros(4, 3, 1)
    steps[key][1, 1] = torch.nan
    with unchanged(loss), pytest.raises(ValueError, match="non-finite"):
        getattr(loss, method)(steps)


def test_options_of_the_value_estimator_are_checked():
    loss = make_learned(horizon=1)
    with pytest.raises(NotImplementedError, match="GAE"):
        loss.make_value_estimator(ValueEstimators.GAE)
    with pytest.raises(TypeError, match="lmbda"):
        loss.make_value_estimator(ValueEstimators.TD0, lmbda=0.5)
    with pytest.raises(ValueError, match="gamma"):
        loss.make_value_estimator(gamma=1.5)
    loss.make_value_estimator(gamma=1.0)
    with pytest.raises(ValueError, match="no bounds"):
        loss.fit_scale(make_steps(4))


def test_the_weight_of_the_entropy_is_learned_unless_it_is_fixed():
    for options, learns in (({}, True), ({"fixed_alpha": True}, False)):
        loss = make_learned(horizon=1, alpha_init=0.3, **options)
        assert loss.alpha.item() == pytest.approx(0.3)
        assert ("log_alpha" in dict(loss.named_parameters())) == learns
        assert "log_alpha" in loss.state_dict()


def test_episodes_are_cut_where_the_model_leaves_its_data():
    predictor = make_learned(horizon=1).predictor
    model = predictor.model
    state, action = 0.1 * torch.randn(500, 2), ACTION.rand((500,))
    model.fit_statistics(state, state[:, :0], action, state + 0.5)
    env = PredictorEnv(predictor, batch_size=[16])
    env = env.append_transform(TruncateWhere(OutOfRange(model, limit=2.0)))
    data = env.rollout(30, break_when_any_done=False)
    far = ((data["next", "state"] - model.scaling.state.loc) / model.scaling.state.scale).abs() > 2
    after = data["next"]
    assert far.any()
    torch.testing.assert_close(after["truncated"], far.any(-1, keepdim=True) & ~after["terminated"])
    torch.testing.assert_close(after["done"], after["truncated"] | after["terminated"])
    ended = after["done"][:, :-1, 0]
    assert (data["state"][:, 1:][ended] == 0).all()  # begun anew
    agreeing = Disagrees(model, limit=1e9)
    step = state[:3], state[:3, :0], action[:3], state[:3]
    assert not agreeing(*step).any()
    assert Disagrees(model, limit=1e-9)(*step).all()
    for kind in (OutOfRange, Disagrees):
        with pytest.raises(TypeError, match="ProbabilisticEnsemble"):
            kind(predictor, limit=1.0)


@pytest.mark.parametrize("first", [True, False])
def test_what_else_truncates_is_heeded(first):
    def beyond(limit):
        return TruncateWhere(lambda state, context, action, after: after[..., 0] > limit)

    torch.manual_seed(0)
    others = [StepCounter(4), beyond(1.5)]
    env = PredictorEnv(make_line().predictor, batch_size=[8])
    for transform in [*others, beyond(3.0)] if first else [beyond(3.0), *others]:
        env = env.append_transform(transform)
    # The context is empty, and may be left out.
    env = env.append_transform(ExcludeTransform("context"))
    after = env.rollout(30, break_when_any_done=False)["next"]
    expected = (after["state"] > 1.5) | (after["step_count"] == 4)
    assert torch.equal(after["truncated"], expected)
    assert torch.equal(after["done"], expected)
    assert (expected & (after["step_count"] < 4)).any()


def test_a_condition_gives_bools_and_finds_what_it_reads():
    env = PredictorEnv(make_line().predictor, batch_size=[8])
    soft = TruncateWhere(lambda state, context, action, after: after[..., 0].sigmoid())
    with pytest.raises(TypeError, match=r"float32, expected bool"):
        TransformedEnv(env, soft).rollout(2)
    other = TruncateWhere(OutOfRange(make_learned().predictor.model), in_keys=("z", "c", "a"))
    with pytest.raises(KeyError, match="in_keys"):
        TransformedEnv(env, other).rollout(2)


def test_flags_may_be_bytes():
    loss, steps = make_learned(horizon=0), make_steps(20)
    flags = steps.clone()
    for key in ("done", "terminated"):
        flags["next", key] = flags["next", key].byte()
    found = []
    for td in (steps, flags):
        torch.manual_seed(0)
        found.append(loss.qvalue_loss(td)[0])
        torch.manual_seed(0)
        found.append(loss.value_targets(td.unsqueeze(0))["value_target"])
    assert steps["next", "terminated"].any()
    torch.testing.assert_close(found[:2], found[2:])


def test_padding_counts_nowhere():
    loss = make_learned(horizon=2)
    steps = make_steps(6)
    padded = torch.cat([steps, steps.apply(lambda x: 50 * x if x.is_floating_point() else x)])
    padded["collector", "mask"] = torch.arange(12) < 6
    loss.log_alpha.data.fill_(-60.0)  # actions are drawn at random
    states = []
    for td in (steps, padded):
        loss.fit_inputs(td)
        loss.fit_scale(td)
        states.append({k: v.clone() for k, v in loss.state_dict().items()})
    torch.testing.assert_close(*states)
    torch.manual_seed(0)
    said = loss(padded)
    torch.manual_seed(0)
    found = loss.actor_loss(padded)[1]
    torch.testing.assert_close(said["value"], found["value"][:6].mean())
    torch.testing.assert_close(said["entropy"], -found["log_prob"][:6].mean())


def test_nested_names_are_keys():
    loss = make_learned(horizon=0)
    loss.set_keys(reward=("team", "reward"), state_action_value="q")
    assert loss.in_keys[2] == ("next", "team", "reward")
    with pytest.raises(KeyError, match="state_action_value"):
        loss(make_steps(4).update({"next": {"team": {"reward": torch.zeros(4, 1)}}}))


def test_starts_of_another_shape_are_refused():
    loss = make_learned(horizon=1)
    for state, batch in (((4, 3), [4]), ((4, 2), []), ((4, 1, 2), [4])):
        with pytest.raises(ValueError, match="'state' has shape"):
            loss(TensorDict({"state": torch.zeros(state)}, batch))
    assert loss(TensorDict({"state": torch.zeros(0, 2)}, [0]))["loss_actor"].shape == ()


def test_a_policy_acts_in_the_predictors_space():
    def build(spec, own):
        predictor = PredictorFactory(hidden_sizes=(8,), n_models=2)(Unbounded((2,)), spec)
        critic = QValueOperator(2, 0, own, (8,))
        return ValueGradientLoss(TanhActor(2, 0, own, (8,)), critic, predictor, horizon=1)

    build(ACTION, Bounded(-0.5, 0.5, (2,)))
    with pytest.raises(ValueError, match="acts in"):
        build(ACTION, Bounded(-1.0, 2.0, (2,)))
    with pytest.raises(ValueError, match="choices"):
        build(OneHot(2), ACTION)
    other = build(ACTION, Bounded(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match=r"acts by \(1,\).*\(2,\)"):
        other(TensorDict({"state": torch.zeros(4, 2)}, [4]))


def test_a_copy_learns_by_itself():
    loss = make_learned(horizon=1)
    twin = copy.deepcopy(loss)
    td = TensorDict({"state": torch.randn(4, 2)}, [4])
    twin(td.clone())["loss_actor"].backward()
    assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_losses_and_gradients(backend):
    loss = make_learned(horizon=1)
    options = {"fallback_random": True} if backend == "inductor" else None
    td, found = TensorDict({"state": torch.randn(6, 2)}, [6]), []
    for compiled in (False, True):
        if compiled:
            loss.compile(backend=backend, options=options)
        torch.manual_seed(0)
        loss.zero_grad()
        out = loss(td.clone())
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        found.append([*out.values(), *(p.grad for p in loss.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    next(loss.predictor.model.members.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        loss(td)
