"""Rewards and terminations of the tasks in closed form.

All are ``StepFunction``: batched over ``*B``, in the units of the environments, with dimensions in
the order of ``Task.state_dims`` and ``Task.context_dims``. Reward and termination of gymnasium's
MuJoCo tasks (version 5) depend on the state after a step, so most functions read ``next_state``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ForwardReward",
    "InRange",
    "double_pendulum_reward",
    "double_pendulum_termination",
    "goal_distance_reward",
    "goal_reached_reward",
    "inverted_pendulum_reward",
    "never",
    "pusher_reward",
    "reacher_reward",
    "swing_up_reward",
    "tip_reward",
]

_POLE = 0.6  # m, each pole of the double pendulum
GOAL_RADIUS = 0.45  # m; gymnasium-robotics' mazes count a goal as reached within it


def never(state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Return ``False``: the termination of tasks that end only by their time limit."""
    return torch.zeros(next_state.shape[:-1], dtype=torch.bool, device=next_state.device)


@dataclass(frozen=True)
class InRange:
    """Terminates unless ``next_state`` is finite and some of its dimensions are in range.

    Args:
        ranges: ``(dimension, low, high)`` each.
        closed: Whether the ends belong to the ranges.
    """

    ranges: tuple[tuple[int, float, float], ...]
    closed: bool = False

    def __call__(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Return whether the step terminates the episode, ``[*B]`` bool."""
        healthy = next_state.isfinite().all(-1)
        for dim, low, high in self.ranges:
            x = next_state[..., dim]
            healthy &= (low <= x) & (x <= high) if self.closed else (low < x) & (x < high)
        return ~healthy


@dataclass(frozen=True)
class ForwardReward:
    """Speed along x minus an action cost, plus 1 while healthy (for states with x first).

    Args:
        dt: Seconds in a step.
        control_cost: Weight of the squared action.
        termination: Tells when the bonus is lost; ``None`` for no bonus.
    """

    dt: float
    control_cost: float
    termination: InRange | None = None

    def __call__(
        self, state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
    ) -> Tensor:
        """Return the reward ``[*B]``."""
        speed = (next_state[..., 0] - state[..., 0]) / self.dt
        reward = speed - self.control_cost * action.square().sum(-1)
        if self.termination is None:
            return reward
        return reward + (~self.termination(state, context, action, next_state)).to(reward)


_UPRIGHT = InRange(((1, -0.2, 0.2),), closed=True)


def inverted_pendulum_reward(
    state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Return 1 unless the step terminates, that is while the pole's angle is within 0.2 rad."""
    return (~_UPRIGHT(state, context, action, next_state)).to(next_state.dtype)


def _double_pendulum_tip(state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the position ``x, y`` of the upper pole's end, ``[*B]`` each, in m."""
    x, sin_1, sin_2, cos_1, cos_2 = state[..., :5].unbind(-1)
    sin, cos = sin_1 * cos_2 + cos_1 * sin_2, cos_1 * cos_2 - sin_1 * sin_2
    return x + _POLE * (sin_1 + sin), _POLE * (cos_1 + cos)


def double_pendulum_termination(
    state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Return whether the tip is at most 1 m high; see :func:`double_pendulum_reward` for errors."""
    return ~(_double_pendulum_tip(next_state)[1] > 1.0)


def double_pendulum_reward(
    state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Return 10 while up, minus the tip's squared distances from x = 0 and 2 m height, and speeds.

    The error is about 1e-3: the environment reads the tip's position from MuJoCo's last integrator
    stage, a fraction of a millimetre off the joints at the end of the step. In addition, the
    observation clips speeds at 10 rad/s, but the environment's speed penalty does not.
    """
    x, y = _double_pendulum_tip(next_state)
    speed_1, speed_2 = next_state[..., 6], next_state[..., 7]
    penalty = 0.01 * x**2 + (y - 2.0) ** 2 + 1e-3 * speed_1**2 + 5e-3 * speed_2**2
    return 10.0 * (y > 1.0).to(penalty) - penalty


def reacher_reward(state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Return minus the distance from fingertip to target (m), minus the squared action."""
    return -next_state[..., 6:8].norm(dim=-1) - action.square().sum(-1)


def tip_reward(state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Return ``exp(-distance / 0.1 m)`` of fingertip and target; the state begins with the tip."""
    return torch.exp(-_goal_distance(context, next_state) / 0.1)


def pusher_reward(state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Return minus object-goal distance and half hand-object distance (m), minus 0.1 action²."""
    hand, thing = next_state[..., 14:17], next_state[..., 17:20]
    near, far = (hand - thing).norm(dim=-1), (thing - context).norm(dim=-1)
    return -0.5 * near - far - 0.1 * action.square().sum(-1)


def swing_up_reward(state: Tensor, context: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Return the swing-up's reward, of the state in which the action is taken."""
    return (1.0 + state[..., 2]) / 2.0 * torch.exp(-state[..., 0].square() / 2.0)


def _goal_distance(context: Tensor, next_state: Tensor) -> Tensor:
    return (next_state[..., :2] - context).norm(dim=-1)


def goal_distance_reward(
    state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Return ``exp(-distance to the goal in m)``."""
    return torch.exp(-_goal_distance(context, next_state))


def goal_reached_reward(
    state: Tensor, context: Tensor, action: Tensor, next_state: Tensor
) -> Tensor:
    """Return 1 within 0.45 m of the goal, else 0."""
    return (_goal_distance(context, next_state) <= GOAL_RADIUS).to(next_state.dtype)
