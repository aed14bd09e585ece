"""Networks of one's own in a loss of value gradients: asked when it is built, and left alone."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP, Actor, ProbabilisticActor, TanhNormal, ValueOperator

from layeredrl_torchrl import PredictorFactory, ValueGradientLoss
from layeredrl_torchrl.imagination._networks import check_networks
from layeredrl_torchrl.nets import QValueOperator, TanhActor

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")
SPACES = Unbounded((4,)), Bounded(-1.0, 1.0, (2,))


def make_actor(width=4, n_actions=2, distribution=TanhNormal, net=None):
    net = net or nn.Sequential(MLP(width, 2 * n_actions, num_cells=[8]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["state"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=distribution,
    )


def make_critic(n_in=6, n_out=1, **options):
    return ValueOperator(MLP(n_in, n_out, num_cells=[8], **options), in_keys=["state", "action"])


def make_loss(actor=None, critic=None, **options):
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=2)(*SPACES)
    return ValueGradientLoss(actor or make_actor(), critic or make_critic(), predictor, **options)


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"actor": make_actor(width=3)}, r"actor_network cannot act at 'state' \[3, 4\]"),
        ({"actor": TanhActor(3, 0, SPACES[1], (8,))}, r"actor_network cannot act at .*\[3, 4\]"),
        ({"actor": make_actor(n_actions=3)}, r"actions \(3, 3\).*expected \(3, 2\)"),
        ({"actor": make_actor(distribution=torch.distributions.Normal)}, r"log-prob.*\(3, 2\)"),
        (
            {"actor": Actor(MLP(4, 2, num_cells=[8]), in_keys=["state"])},
            "deterministic policy",
        ),
        ({"critic": make_critic(n_in=5)}, r"qvalue_network cannot evaluate .*'action' \[3, 2\]"),
        ({"critic": QValueOperator(3, 0, 2, (8,))}, "qvalue_network cannot evaluate"),
        ({"critic": make_critic(n_out=2)}, r"values \(3, 2\) for 3 steps, expected \(3, 1\)"),
        ({"actor": make_actor(net=lambda x: (x[..., :2], x[..., 2:].exp()))}, "no parameters"),
    ],
    ids=range(9),
)
def test_networks_that_do_not_fit_the_predictor_are_refused_when_built(parts, message, horizon):
    with pytest.raises(ValueError, match=message):
        make_loss(**parts, horizon=horizon)


def test_asking_leaves_no_trace():
    batch_norm = {"norm_class": nn.BatchNorm1d, "norm_kwargs": {"num_features": 8}}
    actor, critic = make_actor(), make_critic(dropout=0.5, **batch_norm)
    critic.module[0].eval()
    modes = [part.training for part in critic.modules()]
    before = {key: value.clone() for key, value in critic.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    check_networks(actor, critic, ["state", "context", "action"], [4, 0, 2])
    assert torch.equal(drawn, torch.rand(3))
    assert [part.training for part in critic.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in critic.state_dict().items())


def test_the_name_of_the_values_may_be_given_later():
    net = MLP(6, 1, num_cells=[8])
    loss = make_loss(critic=TensorDictModule(net, ["state", "action"], ["worth"]))
    loss.set_keys(state_action_value="worth")
    assert loss(TensorDict({"state": torch.randn(5, 4)}, [5]))["loss_qvalue"].isfinite()


def test_a_scale_beyond_all_sense_changes_nothing(unchanged):
    critic = QValueOperator(4, 0, 2, (8,))
    loss = make_loss(critic=critic)
    steps = TensorDict({"state": torch.randn(9, 4)}, [9])
    steps["next", "reward"] = torch.full((9, 1), 1e37)  # times 1 / (1 - gamma) beyond float32
    with unchanged(loss), pytest.raises(ValueError, match="scale the rewards"):
        loss.fit_scale(steps)


def test_the_error_about_a_missing_state_shows_the_way():
    """What an error tells to do has to do."""
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=2)(*SPACES)
    loss = ValueGradientLoss(make_actor(), make_critic(), predictor, horizon=0)
    td = TensorDict({"observation": torch.randn(5, 4), "action": torch.zeros(5, 2)}, [5])
    no = torch.zeros(5, 1, dtype=torch.bool)
    after = {"observation": torch.randn(5, 4), "reward": torch.randn(5, 1), "terminated": no}
    td["next"] = TensorDict(after, [5])
    for way in ("predictor.encoder(td)", 'predictor.encoder(td["next"])'):
        with pytest.raises(KeyError, match=re.escape(way)):
            loss(td)
        eval(way, {"predictor": predictor, "td": td})
    assert loss(td)["loss_qvalue"].isfinite()


class Joined(nn.Module):
    """A network of all that it is given, side by side."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.net = MLP(n_in, n_out, num_cells=[8])

    def forward(self, *given):
        return self.net(torch.cat(given, -1))


@pytest.mark.parametrize("horizon", [0, 2])
def test_networks_may_read_the_context_of_a_task_without_one(horizon):
    torch.manual_seed(0)
    net = TensorDictModule(Joined(4, 4), ["state", "context"], ["params"])
    split = TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"])
    actor = ProbabilisticActor(
        TensorDictSequential(net, split), in_keys=["loc", "scale"], distribution_class=TanhNormal
    )
    critic = ValueOperator(Joined(6, 1), in_keys=["state", "context", "action"])
    loss = make_loss(actor, critic, horizon=horizon)
    done = torch.tensor([[False], [True]] * 4)
    after = {"state": torch.randn(8, 4), "reward": torch.randn(8, 1)}
    after |= {"done": done, "terminated": done}
    td = TensorDict({"state": torch.randn(8, 4), "action": torch.rand(8, 2), "next": after}, [8])
    given = td.clone()
    given["context"] = given["next", "context"] = torch.zeros(8, 0)

    def found(steps):
        torch.manual_seed(1)
        loss.fit_scale(steps)
        losses = loss(steps)
        targets = loss.value_targets(steps)["value_target"]
        return [loss.bounds.clone(), targets, losses["loss_actor"], losses["loss_qvalue"]]

    torch.testing.assert_close(found(td), found(given))
    assert "context" not in td.keys()
