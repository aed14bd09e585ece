"""A policy's imagined steps, with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import hold_out_net

from layeredrl_torchrl.imagination._members import step_by_any
from layeredrl_torchrl.predictors import Predictor

__all__ = ["FollowedPolicy", "follow"]


class FollowedPolicy(NamedTuple):
    """What a policy does and gets in ``H`` imagined steps from ``B`` starts."""

    reward: Tensor  # [H, B]
    log_prob: Tensor  # [H + 1, B], of the actions
    share: Tensor  # [H + 1, B], how much of what follows counts: discounted survival
    action: Tensor  # [B, A], the first
    last: TensorDict  # [B], state, context and action after H steps


def follow(
    predictor: Predictor,
    act: Callable[[TensorDictBase], Tensor],
    start: tuple[Tensor, Tensor],
    horizon: int,
    gamma: float,
) -> FollowedPolicy:
    """Follow a policy through a predictor, whose parameters get no gradient.

    Each step of each row is sampled from one member, newly drawn for it (TS-1).

    Args:
        predictor: What is imagined.
        act: Writes reparameterised actions to a TensorDict ``[B]`` of state and context, and
            returns their ``log_prob [B]``.
        start: State ``[B, D]`` and context ``[B, C]``.
        horizon: ``H``, may be 0.
        gamma: Discount.
    """
    state_key, context_key, action_key = predictor.model.in_keys
    state, context = start
    n = len(state)
    step = TensorDict({state_key: state, context_key: context}, [n])
    rewards, shares = [], [state.new_ones(n)]
    with hold_out_net(predictor):
        log_probs = [act(step)]
        first = step.get(action_key)
        for _ in range(horizon):
            taken = step.get(state_key), context, step.get(action_key)
            following, term_prob = step_by_any(predictor.model, *taken)
            rewards.append(predictor.reward_of(*taken, following))
            term_prob = predictor.term_prob_of(*taken, following, term_prob)
            shares.append(shares[-1] * gamma * (1.0 - term_prob))
            step = TensorDict({state_key: following, context_key: context}, [n])
            log_probs.append(act(step))
    reward = torch.stack(rewards) if rewards else state.new_zeros(0, n)
    return FollowedPolicy(reward, torch.stack(log_probs), torch.stack(shares), first, step)
