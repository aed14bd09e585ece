"""Worlds that are known exactly, and the planners in turn."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import IdentityEncoder, Model, StaticPredictor
from layeredrl_torchrl.planners import CEMPlanner, ICEMPlanner, MPPIPlanner


class LinearModel(Model):
    """``x' = A x + B u``: a mass that is pushed, 0.2 s a step; the state is place and speed."""

    A = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
    B = torch.tensor([[0.02], [0.2]])

    def __init__(self, limit=4.0):
        super().__init__(Unbounded((2,)), None, Bounded(-limit, limit, (1,)))

    def predict_members(self, state, context, action):
        after = (state @ self.A.mT + action @ self.B.mT).unsqueeze(-2)
        weights = torch.ones_like(after[..., 0])
        return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])


Q, R = torch.diag(torch.tensor([1.0, 0.1])), torch.tensor([[0.1]])


def riccati():
    """The value matrix of the infinite horizon, by iterating the recursion to its fixed point."""
    A, B, Qd, Rd = LinearModel.A.double(), LinearModel.B.double(), Q.double(), R.double()
    P = Qd
    for _ in range(2000):
        gain = torch.linalg.solve(Rd + B.T @ P @ B, B.T @ P @ A)
        P = Qd + A.T @ P @ (A - B @ gain)
    return P.float()


def quadratic(x, matrix):
    return (x @ matrix * x).sum(-1)


@pytest.fixture(scope="session")
def linear():
    """``predictor, cost_to_go``: reward ``-(x'Qx + u'Ru)``, value ``-x'Px`` from Riccati."""
    P = riccati()

    def reward(state, context, action):
        return -quadratic(state, Q) - quadratic(action, R)

    def value(state, context, action):
        return -quadratic(state, P)

    predictor = StaticPredictor(LinearModel(), value, reward, IdentityEncoder((2,)), 2)
    return predictor, lambda x: quadratic(x, P)


@pytest.fixture(params=[CEMPlanner, ICEMPlanner, MPPIPlanner], ids=["cem", "icem", "mppi"])
def kind(request):
    """Each planner in turn."""
    return request.param


@pytest.fixture
def observe():
    """``observe(planner, obs [*b, n])``: what an environment would hand to the planner."""

    def build(planner, obs):
        td = TensorDict({"observation": obs}, obs.shape[:-1])
        return td.update(planner.forget(td.batch_size))

    return build
