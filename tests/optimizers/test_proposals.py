"""Candidates that somebody else proposes: what they change, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl.optimizers import CEM, ICEM


def far_cost(target):
    """A narrow valley around ``target``: a search that starts elsewhere sees a plain."""

    def cost(x):
        valley = torch.exp(-20 * (x - target).square().sum((-2, -1)))
        return 1 - valley + 1e-3 * x.square().sum((-2, -1))

    return cost


def test_one_iteration_against_a_slow_twin(make_gaussian):
    """Elites, mean and the best are those of all candidates, sorted one by one."""
    torch.manual_seed(0)
    optimizer = CEM(make_gaussian(), 3, n_samples=20, n_iterations=1, elite_ratio=0.3)
    noise = optimizer.draw_noise((2,))
    proposals = 1.5 * torch.randn(2, 7, 3, 2)
    target = 0.8 * torch.ones(2, 1, 3, 2)
    found = optimizer.optimize(
        lambda x: (x - target).square().sum((-2, -1)), optimizer.forget((2,)), noise, proposals
    )
    for b in range(2):
        candidates = [np.clip(0.5 * z, -1, 1) for z in noise[b, :20].double().numpy()]
        candidates += [np.clip(x, -1, 1) for x in proposals[b].double().numpy()]
        candidates.sort(key=lambda x: ((x - 0.8) ** 2).sum())
        mean = 0.9 * sum(candidates[:6]) / 6  # momentum 0.1, and the start's mean is 0
        np.testing.assert_allclose(found.mean[b], mean, atol=1e-5)
        np.testing.assert_allclose(found.best[b], candidates[0], atol=1e-6)
    assert not torch.allclose(
        found.mean, optimizer.optimize(far_cost(target), optimizer.forget((2,)), noise).mean
    )


def test_a_good_proposal_is_found_by_each_problem_alone(make):
    """Problem 1 is told where its valley is, problem 0 is told of the other's."""
    torch.manual_seed(0)
    optimizer = make()
    target = torch.tensor([-0.9, 0.9])[:, None, None, None].expand(2, 1, 4, 2)
    proposals = target[1].expand(2, 1, 4, 2)
    found = optimizer.optimize(far_cost(target), optimizer.forget((2,)), None, proposals)
    torch.testing.assert_close(found.best[1], proposals[1, 0])
    assert found.best_cost[1] < 0.1 < 0.9 < found.best_cost[0]
    without = optimizer.optimize(far_cost(target), optimizer.forget((2,)))
    assert (without.best_cost > 0.9).all()


def test_no_proposals_are_none(make):
    """An empty set of them changes nothing, and neither does the memory."""
    optimizer = make()
    noise = optimizer.draw_noise((3,))
    cost = far_cost(torch.full((3, 1, 4, 2), 0.2))
    plain = optimizer.optimize(cost, optimizer.forget((3,)), noise)
    empty = optimizer.optimize(cost, optimizer.forget((3,)), noise, torch.zeros(3, 0, 4, 2))
    assert torch.equal(plain.mean, empty.mean)
    assert torch.equal(plain.best_cost, empty.best_cost)
    assert isinstance(plain.memory, TensorDict)
    assert (plain.memory == empty.memory).all()


def test_kept_elites_may_be_proposals(make_gaussian):
    """iCEM keeps the best of all it tried, so what was proposed survives to the next call."""
    optimizer = ICEM(make_gaussian(), 4, n_samples=64, n_iterations=2)
    target = torch.full((1, 4, 2), 0.95)
    found = optimizer.optimize(far_cost(target), optimizer.forget(), None, target)
    assert any(torch.allclose(elite, target[0]) for elite in found.memory["elites"])


@pytest.mark.parametrize(
    "shape", [(2, 4, 2), (3, 5, 4, 2), (2, 5, 3, 2), (2, 5, 4, 1), (2, 5, 4, 2, 1)]
)
def test_proposals_of_another_shape_are_refused(make, shape):
    optimizer = make()
    with pytest.raises(ValueError, match=r"proposals have shape .*\(2, 'any', 4, 2\)"):
        optimizer.optimize(
            lambda x: x.sum((-2, -1)), optimizer.forget((2,)), None, torch.zeros(shape)
        )
