"""The discount of value gradients: it may change while a policy learns, and is never rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from gradient_parts import make_learned, make_line, make_steps
from tensordict import TensorDict

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

K, WEIGHT, HORIZON = 0.3, 2.0, 3


def worth(gamma, start):
    """Minus the mean return of the line from ``start``, ended by the critic; see `make_line`."""
    c = 0.9 + K
    paid = sum(gamma**h * (1 + K**2 / 2) * c ** (2 * h) for h in range(HORIZON))
    return (paid + gamma**HORIZON * WEIGHT * c ** (2 * HORIZON)) * start**2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_discount_that_changes_counts_at_once(compiled):
    """Where the steps are compiled it is no constant of theirs: nothing is compiled anew."""
    loss = make_line(gain=K, weight=WEIGHT, horizon=HORIZON)
    if compiled:
        loss.compile(backend="eager", dynamic=False)
    start = TensorDict({"state": torch.tensor([[1.5]])}, [1])
    loss.make_value_estimator(gamma=0.8)
    assert loss.actor_loss(start)[0].item() == pytest.approx(worth(0.8, 1.5), rel=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gamma in (0.5, 0.0, 1.0):
            loss.gamma = gamma
            assert loss.actor_loss(start)[0].item() == pytest.approx(worth(gamma, 1.5), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_does_not_round_it(dtype):
    loss = make_line(gain=K, weight=WEIGHT, horizon=HORIZON)
    loss.make_value_estimator(gamma=0.999)  # 1 in bfloat16
    assert copy.deepcopy(loss).to(dtype).discount.item() == 0.999
    assert loss.to(torch.float16).to(dtype).discount.item() == 0.999


def test_targets_follow_it_too():
    """One step: what is paid, and the discounted value of the next state."""
    loss, steps = make_learned(torch.float64, horizon=0), make_steps(40, dtype=torch.float64)
    steps["next", "terminated"] = torch.zeros(40, 1, dtype=torch.bool)
    found = {}
    for gamma in (0.0, 0.25, 0.75):
        loss.make_value_estimator(gamma=gamma, lmbda=0.0)
        torch.manual_seed(0)
        found[gamma] = loss.value_targets(steps.clone())["value_target"]
    torch.testing.assert_close(found[0.0], steps["next", "reward"])
    torch.testing.assert_close(found[0.75] - found[0.0], 3 * (found[0.25] - found[0.0]))


def test_it_is_checked_and_no_part_of_the_state():
    loss = make_line(horizon=1)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            loss.gamma = bad
    assert loss.gamma == loss.discount.item() == 0.99
    assert not [name for name in loss.state_dict() if "discount" in name]
