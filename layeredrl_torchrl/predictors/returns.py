"""Imagined returns: what a planner needs of a rollout, without the rollout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layeredrl_torchrl._checks import (
    check_callable,
    check_flag,
    check_instance,
    check_number,
    check_per_item,
)
from layeredrl_torchrl.models import Model, Propagation, TSInfinity
from layeredrl_torchrl.models.rollouts import ImaginedStep, imagine

__all__ = ["ReturnOptions", "imagined_returns"]


@dataclass(frozen=True, kw_only=True)
class ReturnOptions:
    """How imagined trajectories are scored.

    >>> ReturnOptions(discount=0.99, use_value_func=True).use_term_prob
    True

    Args:
        discount: Over one step of the model, in ``(0, 1]``.
        use_value_func: Whether the value of the last state counts; needs a ``val_func``.
        use_term_prob: Whether rewards count only as far as the episode has probably not ended.
        exploration_bonus: Callable of state, context and action as a reward function is, for
            example :class:`~layeredrl_torchrl.EnsembleDisagreement`; added to the reward,
            evaluated at the mean over particles.
        propagation: How uncertainty spreads over steps: :class:`~layeredrl_torchrl.TSInfinity`
            (the default), :class:`~layeredrl_torchrl.TS1` or
            :class:`~layeredrl_torchrl.Expectation`.
        deterministic: Whether members are followed in their mean instead of sampled.

    Raises:
        TypeError, ValueError: An option of another kind, or outside its range.
    """

    discount: float = 1.0
    use_value_func: bool = False
    use_term_prob: bool = True
    exploration_bonus: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    propagation: Propagation | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_number("discount", self.discount, 0.0, 1.0, open_low=True)
        for name in ("use_value_func", "use_term_prob", "deterministic"):
            check_flag(name, getattr(self, name))
        check_callable("exploration_bonus", self.exploration_bonus, optional=True)
        if self.propagation is not None:
            check_instance("propagation", self.propagation, Propagation, hint="pass TSInfinity()")


# Particles whose rewards are computed at once: enough that the time goes into the products and
# not into calling them, and few enough that what lies between two products stays in the caches.
_ROWS = 2048


def imagined_returns(
    model: Model,
    reward_of: Callable[..., Tensor],
    value_of: Callable[..., Tensor] | None,
    state: Tensor,
    context: Tensor | None,
    actions: Tensor,
    options: ReturnOptions,
) -> Tensor:
    """As ``Predictor.returns`` says; a few steps' particles are all that is kept."""
    batch, flat = model.prepare_rollout(state, context, actions)
    propagation = TSInfinity() if options.propagation is None else options.propagation
    n_models, n_part = propagation.particles(model.n_models, model.n_particles_per_model)
    particles = (n_models, len(flat[0]), n_part)
    ctx = flat[1][:, None].expand(*particles, -1)
    total = flat[0].new_zeros(particles)
    share = flat[0].new_ones(particles)
    n_steps = max(1, _ROWS // share.numel())
    steps: list[ImaginedStep] = []
    shares: list[Tensor] = []
    last: tuple[Tensor, ...] = ()
    imagined = imagine(model, *flat, propagation, deterministic=options.deterministic)
    for h, step in enumerate(imagined, start=1):
        steps.append(step)
        shares.append(share)
        alive = 1.0 - step.term_prob if options.use_term_prob else 1.0
        share = share * (options.discount * alive)
        if len(steps) < n_steps and h < flat[2].shape[1]:
            continue
        # Rewards of several steps at once: as much to compute, but fewer and larger operations.
        states = torch.stack([step.state for step in steps], 3)  # [M', N, P', h, D]
        action = torch.stack([step.action for step in steps], 1)  # [N, h, *]
        rows = states.shape[:-1]
        spread = action[:, None].expand(*rows, *action.shape[2:])
        gain = reward_of(states, ctx.unsqueeze(3).expand(*rows, -1), spread)
        check_per_item("rew_func", gain, rows)
        if options.exploration_bonus is not None:
            # At the mean over particles: the bonus asks all members itself.
            of_start = flat[1][:, None].expand(*action.shape[:2], -1)
            bonus = options.exploration_bonus(states.mean((0, 2)), of_start, action)
            check_per_item("exploration_bonus", bonus, action.shape[:2])
            gain = gain + bonus[:, None]
        total = total + (torch.stack(shares, -1) * gain).sum(-1)
        last = (step.next_state, ctx, spread[:, :, :, -1])
        steps, shares = [], []
    if value_of is not None:
        total = total + share * check_per_item("val_func", value_of(*last), particles)
    if not bool(torch.isfinite(total.detach().sum())):
        bad = (~torch.isfinite(total)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the imagined returns of member(s) {bad} are not finite over a horizon of "
                f"{flat[2].shape[1]}: shorten it, or train the predictor on data like these "
                "states and actions"
            )
    return total.movedim(0, 1).reshape(*batch, *total.shape[:1], total.shape[2])
