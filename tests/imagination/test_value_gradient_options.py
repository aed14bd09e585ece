"""Options of value gradients: distance and reduction, entropy and targets, each by hand."""

from __future__ import annotations

import pytest
import torch
from gradient_parts import make_learned, make_line
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate, ValueEstimators

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

STATE = torch.tensor([[1.5], [-0.5], [0.1]])
ERROR = torch.tensor([[3.0], [-0.25], [0.75]])  # on both sides of where smooth_l1 changes
DISTANCES = {
    "l2": lambda x: x**2,
    "l1": lambda x: x.abs(),
    "smooth_l1": lambda x: torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5),
}
REDUCTIONS = {"mean": lambda x: x.sum() / 3, "sum": lambda x: x.sum(), "none": lambda x: x}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_function", DISTANCES)
def test_losses_are_the_distance_and_the_reduction_that_are_named(loss_function, reduction):
    """Two critics say ``-2 s^2``; the policy ``u = 0.3 s`` moves to ``1.2 s``."""
    loss = make_line(
        horizon=1, gain=0.3, weight=2.0, loss_function=loss_function, reduction=reduction
    )
    loss.make_value_estimator(gamma=0.9)
    target = -2.0 * STATE**2 - ERROR
    td = TensorDict({"state": STATE, "action": 0 * STATE, "value_target": target}, [3])
    out, reduce = loss(td), REDUCTIONS[reduction]
    error, square = ERROR.squeeze(-1), STATE.squeeze(-1) ** 2
    torch.testing.assert_close(out["loss_qvalue"], reduce(2 * DISTANCES[loss_function](error)))
    value = -(1 + 0.5 * 0.3**2 + 0.9 * 2.0 * 1.2**2) * square
    torch.testing.assert_close(out["loss_actor"], reduce(-value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [-0.5, 2.0])
def test_the_weight_of_the_entropy_moves_it_towards_its_target(target):
    """It falls where the entropy, here 0.5 nats, is above the target, and rises where below."""
    loss = make_learned(horizon=1, alpha_init=0.3, target_entropy=target)
    loss.alpha_loss(torch.tensor([1.0, -3.0, 0.5])).backward()
    torch.optim.SGD([loss.log_alpha], lr=0.1).step()
    expected = 0.3 * torch.tensor(0.1 * (target - 0.5)).exp()
    torch.testing.assert_close(loss.alpha, expected)


@pytest.mark.parametrize("delay", [True, False])
def test_targets_are_of_delayed_critics_or_of_the_critics_as_they_are(delay):
    loss = make_line(horizon=1, gain=0.3, weight=2.0, delay_qvalue=delay)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    updater = SoftUpdate(loss, tau=0.5) if delay else None
    loss.qvalue_network_params["module", "weight"].data.fill_(5.0)  # learned meanwhile
    start, reached, reward = torch.randn(3, 8, 1, 1)
    terminated = (torch.arange(8) % 2 == 0).reshape(8, 1, 1)
    after = {"state": reached, "reward": reward, "done": terminated, "terminated": terminated}
    steps = TensorDict({"state": start, "action": 0 * start, "next": after}, [8, 1])

    def check(weight):
        found = loss.value_targets(steps.clone())["value_target"]
        expected = reward - 0.9 * ~terminated * weight * reached**2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # The return of imagined steps, too, beside what the critics say.
        imagined = TensorDict({"state": start[:, 0]}, [8])
        loss(imagined)
        value = -(1 + 0.5 * 0.3**2 + 0.9 * weight * 1.2**2) * start[:, 0] ** 2
        error = (-5.0 * start[:, 0] ** 2 - value).square()
        torch.testing.assert_close(imagined["td_error"], error, rtol=1e-3, atol=1e-3)

    check(weight=2.0 if delay else 5.0)
    if updater is not None:
        updater.step()
        check(weight=3.5)
