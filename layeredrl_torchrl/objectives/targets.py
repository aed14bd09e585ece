"""n-step value targets over slices of consecutive transitions.

Axis letters: ``B`` slices, ``L`` steps in a slice, ``k`` steps with a target, ``n`` rewards in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_finite, check_number, check_positive_int
from layeredrl_torchrl._watch import refuse

__all__ = ["NStepTargets", "n_step_targets"]


class NStepTargets(NamedTuple):
    """Discounted rewards of up to n steps, and where and with which discount to bootstrap.

    The value target of step ``j`` is ``returns[:, j] + bootstrap_discount[:, j] * V(s)``, where
    step ``bootstrap_index[:, j]`` of the slice leads to state ``s``.
    """

    returns: Tensor  # [B, k]
    bootstrap_index: Tensor  # [B, k], long, into the L steps of the slice
    bootstrap_discount: Tensor  # [B, k], 0 where that step terminated


def n_step_targets(
    reward: Tensor,
    terminated: Tensor,
    valid: Tensor,
    *,
    k_steps: int,
    n_steps: int,
    gamma: float,
    elapsed_steps: Tensor | None = None,
) -> NStepTargets:
    r"""Sum the discounted rewards of the next n steps for each of the first k steps of a slice.

    Step ``j`` looks ahead over ``m <= n`` steps: the valid ones from ``j`` up to the first gap.
    With :math:`d_i` = ``gamma ** elapsed_steps[i]``, the discount over transition ``i``,

    .. math::
        \text{returns}_j = \sum_{i<m} \Big(\prod_{l<i} d_{j+l}\Big) r_{j+i}, \qquad
        \text{discount}_j = (1 - \text{terminated}_{j+m-1}) \prod_{l<m} d_{j+l},

    and ``bootstrap_index[j] = j + m - 1``. So targets bootstrap at the end of truncated and of
    unfinished episodes, but not where an episode terminated. If step ``j`` itself is not valid, all
    three are 0.

    >>> no, reward = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[1.0, 2.0, 4.0]])
    >>> targets = n_step_targets(reward, no, ~no, k_steps=2, n_steps=2, gamma=0.5)
    >>> targets.returns, targets.bootstrap_index, targets.bootstrap_discount
    (tensor([[2., 4.]]), tensor([[1, 2]]), tensor([[0.2500, 0.2500]]))

    Args:
        reward: Reward of each step, ``[B, L]`` with ``L = k_steps + n_steps - 1``.
        terminated: Whether the step ended in a terminal state, ``[B, L]``, bool. The step after
            it must not be valid, as in the slices of
            :class:`~layeredrl_torchrl.objectives.slices.TransitionSlices`.
        valid: Whether the step belongs to the slice, ``[B, L]``, bool.
        k_steps: Number of steps ``k`` to give targets to.
        n_steps: Number of rewards ``n`` in a target.
        gamma: Discount over one environment step, in [0, 1].
        elapsed_steps: Environment steps that each transition took, ``[B, L]``; all 1 if None.

    Returns:
        The parts of the targets, each ``[B, k]``; in ``reward``'s precision, or float32 if that is
        higher.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If an argument has another shape, dtype or range, or a valid step's reward is
            not finite.
    """
    check_positive_int("k_steps", k_steps)
    check_positive_int("n_steps", n_steps)
    check_number("gamma", gamma, 0.0, 1.0)
    _check_tensors(reward, terminated, valid, elapsed_steps, length=k_steps + n_steps - 1)

    # One window of n steps per target, [B, k, n], as views. Steps after an invalid step do not
    # count.
    counts = valid.unfold(1, n_steps, 1).cumprod(-1)
    n_counted = counts.sum(-1)  # m
    # Accumulate steps instead of discounts, since integers add up without rounding. elapsed[..., i]
    # is the time before step i of the window, for 0 <= i <= n.
    if elapsed_steps is None:
        elapsed = torch.arange(n_steps + 1, device=reward.device).expand(*n_counted.shape, -1)
    else:
        passed = elapsed_steps.unfold(1, n_steps, 1).cumsum(-1)
        elapsed = torch.nn.functional.pad(passed, (1, 0))
    precision = torch.promote_types(reward.dtype, torch.float32)
    discount = torch.pow(gamma, elapsed.to(precision))

    # where() instead of a product with 0, since invalid steps may hold NaN.
    rewards = reward.to(precision).unfold(1, n_steps, 1)
    returns = torch.where(counts.bool(), discount[..., :-1] * rewards, 0.0).sum(-1)

    counted = n_counted > 0
    steps = torch.arange(k_steps, device=reward.device)
    index = torch.where(counted, steps + n_counted - 1, 0)
    bootstraps = counted & ~terminated.gather(1, index)
    reach = discount.gather(-1, n_counted.unsqueeze(-1)).squeeze(-1)
    return NStepTargets(returns, index, torch.where(bootstraps, reach, 0.0))


def _check_tensors(
    reward: Tensor, terminated: Tensor, valid: Tensor, elapsed_steps: Tensor | None, *, length: int
) -> None:
    tensors = {"reward": reward, "terminated": terminated, "valid": valid}
    if elapsed_steps is not None:
        tensors["elapsed_steps"] = elapsed_steps
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != length or len(tensor) != len(reward):
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}, expected [B, L] with the same B in all "
                f"and L = k_steps + n_steps - 1 = {length}; squeeze the last dimension of what a "
                "buffer stores as [B, L, 1], and sample slices of that length."
            )
    if not reward.is_floating_point():
        raise ValueError(f"reward: got {reward.dtype}, expected floating point; convert it.")
    for name in ("terminated", "valid"):
        if tensors[name].dtype != torch.bool:
            raise ValueError(
                f"{name}: got {tensors[name].dtype}, expected torch.bool; convert a probability "
                "to an event first."
            )
    check_finite(
        "reward (of the valid steps)",
        torch.where(valid, reward, 0.0),
        hint="check the environment and the buffer's transforms",
    )
    if elapsed_steps is not None:
        passes = (elapsed_steps >= 1) | ~valid
        steps = elapsed_steps
        refuse(
            ~passes.all(),
            lambda _: ValueError(
                f"elapsed_steps: got {steps[~passes][0].item()} in a valid step, expected at least "
                "1 environment step per transition."
            ),
        )
