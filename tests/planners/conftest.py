"""A linear world, in which the optimum is known, and the planners in turn."""

from __future__ import annotations

import pytest
import torch
from helpers import known
from torchrl.data import Bounded

from layeredrl_torchrl.planners import CEMPlanner, ICEMPlanner, MPPIPlanner

A = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
B = torch.tensor([[0.02], [0.2]])
Q, R = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.1]])


def riccati():
    """The value matrix of the infinite horizon, by iterating the recursion to its fixed point."""
    Ad, Bd, Qd, Rd = (matrix.double() for matrix in (A, B, Q, R))
    P = Qd
    for _ in range(2000):
        gain = torch.linalg.solve(Rd + Bd.T @ P @ Bd, Bd.T @ P @ Ad)
        P = Qd + Ad.T @ P @ (Ad - Bd @ gain)
    return P.float()


def quadratic(x, matrix):
    return (x @ matrix * x).sum(-1)


@pytest.fixture(scope="session")
def linear():
    """``predictor, cost_to_go`` of ``x' = A x + B u``, a mass that is pushed, 0.2 s a step.

    The state is place and speed, the reward ``-(x'Qx + u'Ru)``, the value ``-x'Px`` from Riccati.
    """
    P = riccati()
    predictor = known(
        lambda state, action: state @ A.mT + action @ B.mT,
        lambda state, context, action: -quadratic(state, Q) - quadratic(action, R),
        Bounded(-4.0, 4.0, (1,)),
        width=2,
        value=lambda state, context, action: -quadratic(state, P),
    )
    return predictor, lambda x: quadratic(x, P)


@pytest.fixture(params=[CEMPlanner, ICEMPlanner, MPPIPlanner], ids=["cem", "icem", "mppi"])
def kind(request):
    """Each planner in turn."""
    return request.param
